"""Wan's transformer against diffusers and PEFT on tiny random weights, from rotary tables up to the whole model."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from transformer_checks import (
    QUICK,
    assert_close,
    assert_published,
    assert_saved_bit_for_bit,
    gradient_of,
    relative_error,
)
from wan_models import (
    SIZES,
    SPEC,
    TARGETS,
    TINY,
    channels_first,
    inputs,
    random_adapter,
    reference,
    torch_velocity,
)

from marble_jax.distributed.device_mesh import AXES
from marble_jax.errors import InputError
from marble_jax.families.wan import flops
from marble_jax.families.wan.blocks import WanBlock
from marble_jax.families.wan.config import WAN21_1_3B, WAN21_14B, WanConfig
from marble_jax.families.wan.layer_names import entries, layers_at, load_transformer
from marble_jax.families.wan.patches import PatchEmbedding, patchify, token_grid, unpatchify
from marble_jax.families.wan.rotary import rotary_tables
from marble_jax.families.wan.sharding_rules import transformer_rules
from marble_jax.families.wan.transformer import (
    ConditionEmbedder,
    WanTransformer,
    abstract_params,
    velocity,
)
from marble_jax.networks.rotary import rotate
from marble_jax.trainable import lora
from marble_jax.trainable.lora import LoraSpec, merge, num_parameters

run_velocity = jax.jit(velocity, static_argnums=0, compiler_options=QUICK)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(diffusers model, our model, our parameters, directory) of the tiny config."""
    path = tmp_path_factory.mktemp("transformer")
    theirs = reference(TINY, path)
    return (theirs, *load_transformer(path, lora_scale=SPEC.scale), path)


def block_inputs(tokens=24, num_text=5):
    rng = np.random.default_rng(5)
    shapes = ((2, tokens, TINY.width), (2, num_text, TINY.width), (2, 6, TINY.width))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_rotary_tables_and_rotation():
    """Of the published width, at more frames than a clip has: float32 angles would be off by more."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    assert WAN21_1_3B.axis_widths == (44, 42, 42)
    ours = rotary_tables(WAN21_1_3B, (300, 3, 5))
    theirs = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.zeros(1, 16, 300, 6, 10))
    for table, want in zip(ours, theirs, strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, want[0, :, 0], atol=1e-7)


def test_rotation_by_hand():
    """Frame 1, row 0, column 1: the first pairs of the first and of the third axis turn by one radian."""
    tables = rotary_tables(dataclasses.replace(TINY, attention_head_dim=6), (2, 1, 2))
    x = np.zeros((1, 4, 1, 6), np.float32)
    x[..., ::2] = 1
    turned = np.asarray(rotate(jnp.asarray(x), tables))[0, 3, 0]
    cosine, sine = np.cos(1.0), np.sin(1.0)
    np.testing.assert_allclose(turned, [cosine, sine, 1, 0, cosine, sine], atol=1e-7)


def test_patches(pair):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    latents = jnp.asarray(inputs()[0])
    grid = token_grid(latents.shape[1:])
    np.testing.assert_array_equal(unpatchify(patchify(latents), grid), latents)
    got = PatchEmbedding(TINY.width).apply({"params": params["patch_embedding"]}, latents)
    with torch.no_grad():
        want = theirs.patch_embedding(torch.from_numpy(channels_first(latents)))
    assert_close(got, want.flatten(2).transpose(1, 2))


def test_condition_embedder(pair):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    _, sigma, cond = inputs()
    embed = ConditionEmbedder(TINY.width)
    arrays = (jnp.asarray(sigma), jnp.asarray(cond["embeds"]))
    got = embed.apply({"params": params["condition_embedder"]}, *arrays)
    with torch.no_grad():
        temb, modulation, text, _ = theirs.condition_embedder(
            torch.from_numpy(sigma) * 1000, torch.from_numpy(cond["embeds"])
        )
    for ours, want in zip(got, (temb, modulation.unflatten(1, (6, -1)), text), strict=True):
        assert_close(ours, want)


@pytest.mark.parametrize("index", [0, 2])
def test_block(pair, index):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    x, text, modulation = block_inputs()
    own = jax.tree.map(lambda leaf: leaf[index], params["blocks_all"])
    block = jax.jit(WanBlock(TINY).apply, compiler_options=QUICK)
    out, _ = block({"params": own}, x, text, modulation, rotary_tables(TINY, (4, 2, 3)))
    with torch.no_grad():
        want = theirs.blocks[index](
            *(torch.from_numpy(array) for array in (x, text, modulation)),
            rotary_emb=theirs.rope(torch.zeros(1, 4, 4, 4, 6)),
        )
    assert_close(out, want)


@pytest.mark.parametrize("size", SIZES)
def test_whole_model(pair, size):
    theirs, model, params, _ = pair
    assert model.config == TINY
    arguments = inputs(TINY, *size)
    out = run_velocity(model, params, None, *arguments)
    assert out.dtype == jnp.float32
    assert_close(out, torch_velocity(theirs, *arguments))


def test_rows_beyond_the_prompt_count(pair):
    """Zero embeddings are attended to: more of them, another velocity, as in the reference."""
    theirs, model, params, _ = pair
    xt, sigma, cond = inputs()
    longer = {"embeds": np.pad(cond["embeds"], ((0, 0), (0, 4), (0, 0)))}
    out = run_velocity(model, params, None, xt, sigma, longer)
    assert_close(out, torch_velocity(theirs, xt, sigma, longer))
    assert relative_error(run_velocity(model, params, None, xt, sigma, cond), out) > 1e-3


def test_bfloat16_is_as_near_to_float32_as_the_reference(pair):
    """Weights that diffusers keeps in float32 are float32 here too."""
    torch = pytest.importorskip("torch")
    theirs, model, params, path = pair
    xt, sigma, cond = inputs()
    low, low_params = load_transformer(path, jnp.bfloat16, dtype=jnp.bfloat16)
    half = type(theirs).from_pretrained(path, torch_dtype=torch.bfloat16)
    leaves = traverse_util.flatten_dict(low_params)
    wide = {entry.key for entry in entries(low_params) if leaves[entry.path].dtype == jnp.float32}
    kept = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == kept
    exact = run_velocity(model, params, None, xt, sigma, cond)
    ours = relative_error(run_velocity(low, low_params, None, xt, sigma, cond), exact)
    other = relative_error(torch_velocity(half, xt, sigma, cond, torch.bfloat16), exact)
    assert ours < 0.03 and ours <= 1.2 * other
    # A float32 stream between the layers, and a float32 head.
    wide = low.clone(stream_dtype=jnp.float32)
    assert relative_error(run_velocity(wide, low_params, None, xt, sigma, cond), exact) < ours


def test_weights_round_trip_bit_for_bit(pair):
    _, _, params, path = pair
    assert_saved_bit_for_bit(params, entries, path)


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [(WAN21_1_3B, 825, 1_418_996_800), (WAN21_14B, 1095, 14_288_491_584)],
    ids=["1.3B", "14B"],
)
def test_published_sizes(config, tensors, parameters):
    shapes = abstract_params(WanTransformer(config))
    assert_published(shapes, entries, "WanTransformer3DModel", config, tensors, parameters)


FEED_FORWARD = ("ffn.net.0.proj", "ffn.net.2")


@pytest.mark.parametrize(
    "config, more, modules, values",
    [
        (WAN21_1_3B, (), 240, 23_592_960),
        (WAN21_1_3B, FEED_FORWARD, 300, 43_745_280),
        (WAN21_14B, (), 320, 104_857_600),
    ],
)
def test_adapted_layers_of_the_published_models(config, more, modules, values):
    """Rank 32 on both attentions, and with the feed-forward."""
    shapes = abstract_params(WanTransformer(config))
    spec = LoraSpec(32, 64.0, (*TARGETS, *more))
    adapter = jax.eval_shape(lambda: lora.init_adapter(jax.random.key(0), layers_at, shapes, spec))
    assert len(lora.target_layers(layers_at, shapes, spec.targets)) == modules
    assert num_parameters(adapter) == values


def test_a_target_that_matches_nothing_is_refused():
    shapes = abstract_params(WanTransformer(WAN21_1_3B))
    with pytest.raises(InputError, match="received 'attn1.q_proj'"):
        lora.target_layers(layers_at, shapes, ("attn1.q_proj",))
    # A convolution's window is no layer of an adapter.
    with pytest.raises(InputError, match="received 'patch_embedding'"):
        lora.target_layers(layers_at, shapes, ("patch_embedding",))


EVERYWHERE = (
    *TARGETS,
    *FEED_FORWARD,
    "time_embedder.linear_2",
    "time_proj",
    "text_embedder.linear_1",
    "proj_out",
)


def test_lora_matches_peft(pair):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = type(pair[0]).from_pretrained(pair[3])
    theirs.add_adapter(
        peft.LoraConfig(r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules=list(EVERYWHERE))
    )
    generator, pairs = torch.Generator().manual_seed(1), {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            pairs[name] = (a.numpy().T, b.numpy().T)
    assert len(pairs) == 3 * 10 + 4
    _, model, params, _ = pair
    out = run_velocity(model, params, lora.stack(layers_at, pairs, params), *inputs())
    assert_close(out, torch_velocity(theirs, *inputs()))
    assert relative_error(run_velocity(model, params, None, *inputs()), out) > 0.1


def test_merged_equals_unmerged(pair):
    _, model, params, _ = pair
    adapter = random_adapter(params, LoraSpec(3, 6.0, EVERYWHERE))
    want = run_velocity(model, params, adapter, *inputs())
    merged = merge(params, adapter, model.lora_scale)
    assert_close(run_velocity(model, merged, None, *inputs()), want)


gradient = gradient_of(velocity)
run_gradient = jax.jit(gradient, static_argnums=0, compiler_options=QUICK)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots", "unroll": 2}], ids=str)
def test_how_the_blocks_are_compiled_keeps_the_gradient(pair, changes):
    _, model, params, _ = pair
    adapter = random_adapter(params)
    want = run_gradient(model, params, adapter, *inputs())
    got = run_gradient(model.clone(**changes), params, adapter, *inputs())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_gradient_matches_finite_differences(pair):
    _, model, params, _ = pair
    adapter, direction = random_adapter(params), random_adapter(params, seed=1)

    def objective(step):
        moved = jax.tree.map(lambda a, d: a + step * d, adapter, direction)
        return jnp.sum(jnp.sin(run_velocity(model, params, moved, *inputs())))

    slope = (objective(1e-3) - objective(-1e-3)) / 2e-3
    grads = run_gradient(model, params, adapter, *inputs())
    parts = jax.tree.map(jnp.vdot, grads, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), slope, rtol=2e-2)


def test_vmap_over_one_adapter_per_sample(pair):
    _, model, params, _ = pair
    xt, sigma, cond = inputs()
    adapters = [random_adapter(params), random_adapter(params, seed=1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)

    def single(adapter, x, level, c):
        one = jax.tree.map(lambda leaf: leaf[None], c)
        return velocity(model, params, adapter, x[None], level, one)[0]

    together = jax.jit(jax.vmap(single), compiler_options=QUICK)(stacked, xt, sigma, cond)
    for i, adapter in enumerate(adapters):
        own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (xt, sigma, cond))
        assert_close(together[i : i + 1], run_velocity(model, params, adapter, *own))


def test_a_fused_kernel_sees_queries_of_the_clip_and_keys_of_text(pair):
    _, model, params, _ = pair
    seen = []

    def kernel(q, k, v):
        seen.append((q.shape, k.shape))
        return jax.nn.dot_product_attention(q, k, v)

    xt, sigma, cond = jax.tree.map(jnp.asarray, inputs())
    out = velocity(model.clone(attention=kernel), params, None, xt, sigma, cond)
    assert_close(out, run_velocity(model, params, None, xt, sigma, cond))
    assert set(seen) == {((2, 18, 2, 16), (2, 18, 2, 16)), ((2, 18, 2, 16), (2, 5, 2, 16))}


def test_depth_does_not_change_the_program():
    def equations(layers):
        config = dataclasses.replace(TINY, num_layers=layers)
        model = WanTransformer(config)
        arguments = jax.tree.map(jnp.asarray, inputs(config))
        program = jax.make_jaxpr(lambda p: velocity(model, p, None, *arguments))(
            abstract_params(model)
        )
        return len(str(program).splitlines())

    assert equations(30) == equations(2)


def test_every_parameter_has_a_sharding_rule():
    """1.3B has 12 heads: a tensor axis of 4 splits them, one of 8 does not; 14B has 40."""

    def specs(config, tensor):
        mesh = jax.sharding.AbstractMesh((1, 4, tensor), AXES)
        shapes = traverse_util.flatten_dict(abstract_params(WanTransformer(config)))
        rules = transformer_rules(config.attention_head_dim)
        return {"/".join(p): rules.spec_of(mesh, p, leaf.shape) for p, leaf in shapes.items()}

    kernel = "blocks_all/attn2/to_q/kernel"
    assert specs(WAN21_1_3B, 4)[kernel] == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert specs(WAN21_1_3B, 8)[kernel] == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert specs(WAN21_14B, 8)[kernel] == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    "config, grid, teraflop",
    [
        (WAN21_1_3B, (2, 16, 16), 1.53),
        (WAN21_1_3B, (9, 15, 26), 11.5),
        (WAN21_1_3B, (21, 30, 52), 283),
        (WAN21_14B, (1, 30, 52), 42),
    ],
)
def test_flops_of_the_published_models(config, grid, teraflop):
    """Against the count of every product by hand: (4 + 2) D^2 a token and self-attention, and so on."""
    shapes = abstract_params(WanTransformer(config))
    tokens, text, width = int(np.prod(grid)), 512, config.width
    block = (6 * width**2 + 2 * width * config.ffn_dim) * tokens + 2 * width**2 * text
    block += 2 * tokens**2 * width + 2 * tokens * text * width
    outside = tokens * width * 128 + text * (4096 * width + width**2)
    outside += width * 256 + width**2 + 6 * width**2
    counted = flops.transformer(config, shapes, {}, tokens, text)
    assert counted.base == pytest.approx(2 * (config.num_layers * block + outside), rel=1e-12)
    assert counted.base / 1e12 == pytest.approx(teraflop, rel=1e-2)


def test_config_ignores_private_keys():
    config = {**dataclasses.asdict(TINY), "_class_name": "x", "patch_size": [1, 2, 2]}
    assert WanConfig.from_dict(config) == TINY


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layer": 3}, r"received 'num_layer'; did you mean 'num_layers'\?"),
        ({"patch_size": [2, 2, 2]}, r"expected patch_size \(1, 2, 2\); received \(2, 2, 2\)"),
        ({"image_dim": 1280}, "image conditioning is not supported; received image_dim 1280"),
        ({"added_kv_proj_dim": 64}, "image conditioning is not supported; received added_kv_proj"),
        ({"in_channels": 36, "out_channels": 16}, "out_channels = in_channels = 36, .* received 16"),
        ({"in_channels": 48, "out_channels": 48}, "received in_channels 48, as Wan 2.2 5B has"),
        ({"qk_norm": "rms_norm"}, "expected qk_norm rms_norm_across_heads; received rms_norm"),
        ({"cross_attn_norm": False}, "expected cross_attn_norm True; received False"),
        ({"eps": 1e-5}, "expected eps 1e-06; received 1e-05"),
        ({"freq_dim": 128}, "expected freq_dim 256; received 128"),
        ({"num_layers": 0}, "num_layers: expected a number >= 1; received 0"),
        ({"attention_head_dim": 7}, "expected an even attention_head_dim of 6 or more; received 7"),
    ],
)  # fmt: skip
def test_config_errors(change, message):
    with pytest.raises(InputError, match=message):
        WanConfig.from_dict({**dataclasses.asdict(TINY), **change})


@pytest.mark.parametrize(
    "options, shape, message",
    [
        ({"remat": "ful"}, (1, 1, 4, 4, 4), "remat: expected one of none, full, dots"),
        ({"attention": "flash"}, (1, 1, 4, 4, 4), "attention: expected one of xla, einsum"),
        ({}, (1, 1, 5, 4, 4), "sides divisible by 2, as a token is 2 x 2 cells; received 5 x 4"),
        ({}, (1, 9, 2, 2, 4), "at most 8 frames of tokens, the positions .*; received 9"),
        ({}, (1, 1, 2, 18, 4), "at most 8 columns of tokens, .*; received 9"),
    ],
)
def test_model_errors(options, shape, message):
    model = WanTransformer(TINY, **options)
    cond = {"embeds": jnp.zeros((1, 2, 10))}
    params = abstract_params(WanTransformer(TINY))
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda p: velocity(model, p, None, jnp.zeros(shape), 0.5, cond), params)


def test_unrolled_blocks_are_at_most_those_there_are(pair):
    _, model, params, _ = pair
    jaxpr = str(
        jax.make_jaxpr(lambda *args: velocity(model.clone(unroll=50), params, None, *args))(
            *inputs()
        )
    )
    assert {int(n) for n in re.findall(r"\bunroll=(\d+)", jaxpr)} == {3}
