"""FLUX.1's transformer against diffusers and PEFT on tiny random weights, from rotary tables up to the whole model."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flux1_models import (
    DEV,
    GUIDANCE,
    SCHNELL,
    SIZES,
    SPEC,
    guidance_of,
    inputs,
    random_adapter,
    reference,
    token_ids,
    torch_velocity,
)
from transformer_checks import (
    QUICK,
    assert_close,
    assert_published,
    assert_saved_bit_for_bit,
    gradient_of,
    relative_error,
)

from marble_jax.errors import InputError
from marble_jax.families.flux1.blocks import DoubleBlock, SingleBlock
from marble_jax.families.flux1.config import FLUX1_DEV, FLUX1_SCHNELL, FluxConfig
from marble_jax.families.flux1.family import FAMILY
from marble_jax.families.flux1.layer_names import entries, load_transformer
from marble_jax.families.flux1.packing import pack, unpack
from marble_jax.families.flux1.rotary import rotary_tables
from marble_jax.families.flux1.transformer import (
    FluxTransformer,
    TimeGuidanceTextEmbed,
    abstract_params,
    velocity,
)
from marble_jax.networks.rotary import rotate
from marble_jax.trainable import lora
from marble_jax.trainable.lora import LoraSpec, merge, num_parameters

run_velocity = jax.jit(velocity, static_argnums=0, compiler_options=QUICK)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(diffusers model, our model, our parameters, directory) of the tiny guidance-distilled config."""
    path = tmp_path_factory.mktemp("transformer")
    model = reference(DEV, path)
    return (model, *load_transformer(path, lora_scale=SPEC.scale, embedded_guidance=GUIDANCE), path)


@pytest.mark.parametrize("size", SIZES)
def test_packing_is_that_of_the_pipeline(size):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    latents = inputs(DEV, *size)[0]
    channels_first = torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous()
    want = diffusers.FluxPipeline._pack_latents(
        channels_first, 2, latents.shape[-1], size[0], size[1]
    )
    np.testing.assert_array_equal(pack(latents), want)
    np.testing.assert_array_equal(unpack(pack(latents), *size), latents)


def test_packing_by_hand():
    """A token of two channels: both rows of the first channel, then those of the second."""
    cells = np.asarray([[[1.0, 5], [2, 6]], [[3, 7], [4, 8]]])[None]
    assert pack(cells).tolist() == [[[1, 2, 3, 4, 5, 6, 7, 8]]]


def test_rotary_tables_and_rotation():
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    published = rotary_tables(FLUX1_DEV, 3, 40, 70)
    ids = np.concatenate([np.zeros((3, 3), np.float32), token_ids(40, 70)])
    want = FluxPosEmbed(10000, FLUX1_DEV.axes_dims_rope)(torch.from_numpy(ids))
    for table, reference_table in zip(published, want, strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, reference_table, atol=1e-7)
    x = np.random.default_rng(0).standard_normal((2, 2803, 3, 128)).astype(np.float32)
    turned = apply_rotary_emb(torch.from_numpy(x), want, sequence_dim=1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), published), turned, atol=1e-6)


def test_rotation_by_hand():
    """One pair at coordinate 1 of the second axis, whose first frequency is 1."""
    config = dataclasses.replace(DEV, attention_head_dim=6, axes_dims_rope=(2, 2, 2))
    tables = rotary_tables(config, 0, 2, 1)
    x = np.zeros((1, 2, 1, 6), np.float32)
    x[0, :, 0, 2] = 1
    turned = np.asarray(rotate(jnp.asarray(x), tables))[0, :, 0]
    np.testing.assert_allclose(turned[0], x[0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(turned[1, 2:4], [np.cos(1.0), np.sin(1.0)], atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_time_guidance_text_embedding(pair, dtype):
    """In bfloat16, too: the reference rounds noise levels and guidance scales, which moves an embedding far more."""
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    _, sigma, cond = inputs(DEV)
    kind = getattr(torch, dtype)
    embed = TimeGuidanceTextEmbed(DEV.width, jnp.dtype(dtype))
    guidance = jnp.full(2, GUIDANCE)
    own = jax.tree.map(lambda leaf: leaf.astype(dtype), params["time_text_embed"])
    out = embed.apply(
        {"params": own}, jnp.asarray(sigma), guidance, jnp.asarray(cond["pooled"], dtype)
    )
    with torch.no_grad():
        want = theirs.time_text_embed.to(kind)(
            torch.from_numpy(sigma).to(kind) * 1000,
            torch.full((2,), GUIDANCE).to(kind) * 1000,
            torch.from_numpy(cond["pooled"]).to(kind),
        )
        theirs.time_text_embed.to(torch.float32)
    assert_close(np.asarray(out, np.float32), want.float(), 1e-5 if dtype == "float32" else 1e-2)


def block_inputs(config, num_text=5, rows=2, columns=3):
    rng = np.random.default_rng(5)
    shapes = ((2, rows * columns, config.width), (2, num_text, config.width), (2, config.width))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("index", [0, 1])
def test_double_block(pair, index):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    x, c, temb = block_inputs(DEV)
    own = jax.tree.map(lambda leaf: leaf[index], params["blocks_double"])
    block = jax.jit(DoubleBlock(DEV).apply, compiler_options=QUICK)
    (x_out, c_out), _ = block({"params": own}, (x, c), temb, rotary_tables(DEV, 5, 2, 3))
    ids = torch.from_numpy(np.concatenate([np.zeros((5, 3), np.float32), token_ids(2, 3)]))
    with torch.no_grad():
        c_want, x_want = theirs.transformer_blocks[index](
            *(torch.from_numpy(array) for array in (x, c, temb)),
            image_rotary_emb=theirs.pos_embed(ids),
        )
    assert_close(x_out, x_want)
    assert_close(c_out, c_want)


@pytest.mark.parametrize("index", [0, 2])
def test_single_block(pair, index):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    x, c, temb = block_inputs(DEV)
    own = jax.tree.map(lambda leaf: leaf[index], params["blocks_single"])
    block = jax.jit(SingleBlock(DEV).apply, compiler_options=QUICK)
    both = np.concatenate([c, x], axis=1)
    out, _ = block({"params": own}, both, temb, rotary_tables(DEV, 5, 2, 3))
    ids = torch.from_numpy(np.concatenate([np.zeros((5, 3), np.float32), token_ids(2, 3)]))
    with torch.no_grad():
        want = theirs.single_transformer_blocks[index](
            *(torch.from_numpy(array) for array in (x, c, temb)),
            image_rotary_emb=theirs.pos_embed(ids),
        )
    assert_close(out, torch.cat(want, dim=1))


def test_a_single_block_keeps_one_wide_array_for_its_backward_pass():
    """Under its tokens' feed-forward, four times as wide: the input of the activation, from which its slope follows."""
    width, tokens = DEV.width, 7
    x = jnp.ones((1, tokens, width))
    temb = jnp.ones((1, width))
    tables = (jnp.ones((tokens, DEV.attention_head_dim)),) * 2
    block = SingleBlock(DEV)
    variables = block.init(jax.random.key(0), x, temb, tables)
    _, pull = jax.vjp(lambda x: block.apply(variables, x, temb, tables)[0], x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert shapes.count((1, tokens, 4 * width)) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [DEV, SCHNELL], ids=["dev", "schnell"])
def test_whole_model(config, size, tmp_path):
    theirs = reference(config, tmp_path)
    model, params = load_transformer(tmp_path, embedded_guidance=guidance_of(config))
    assert model.config == config
    out = run_velocity(model, params, None, *inputs(config, *size))
    assert out.dtype == jnp.float32
    assert_close(out, torch_velocity(theirs, *inputs(config, *size)))


def test_the_guidance_scale_counts(pair):
    _, model, params, _ = pair
    one, other = (
        run_velocity(model.clone(embedded_guidance=scale), params, None, *inputs(DEV))
        for scale in (1.0, 4.0)
    )
    assert relative_error(one, other) > 0.01


def test_bfloat16_is_as_near_to_float32_as_the_reference(pair):
    """Both against float32 with the noise levels and guidance that bfloat16 rounds to exactly."""
    torch = pytest.importorskip("torch")
    theirs, model, params, path = pair
    xt, _, cond = inputs(DEV)
    # 1000 times them is a bfloat16, so that no rounding of inputs hides the rounding of the network.
    sigma = np.asarray([0.5, 0.125], np.float32)
    low, low_params = load_transformer(
        path, jnp.bfloat16, dtype=jnp.bfloat16, embedded_guidance=4.0
    )
    exact = run_velocity(model.clone(embedded_guidance=4.0), params, None, xt, sigma, cond)
    ours = relative_error(run_velocity(low, low_params, None, xt, sigma, cond), exact)
    half = type(theirs).from_pretrained(path, torch_dtype=torch.bfloat16)
    out = torch_velocity(half, xt, sigma, cond, dtype=torch.bfloat16, guidance=4.0)
    reference_error = relative_error(out, exact)
    assert ours < 0.03 and ours <= 1.5 * reference_error


def test_weights_round_trip_bit_for_bit(pair):
    _, _, params, path = pair
    assert_saved_bit_for_bit(params, entries, path)


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [(FLUX1_DEV, 1160, 11_901_408_320), (FLUX1_SCHNELL, 1156, 11_891_178_560)],
    ids=["dev", "schnell"],
)
def test_published_sizes(config, tensors, parameters):
    shapes = abstract_params(FluxTransformer(config))
    assert_published(shapes, entries, "FluxTransformer2DModel", config, tensors, parameters)


FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@pytest.mark.parametrize(
    "more, modules, values",
    [
        ((), 266, 104_595_456),
        (FEED_FORWARD, 342, 179_306_496),
        # The final layer is called like the single blocks' last projections.
        ((*FEED_FORWARD, "proj_mlp", "proj_out"), 419, 261_488_640 + 64 * (3072 + 64)),
    ],
)
def test_adapted_layers_of_the_published_model(more, modules, values):
    """Rank 64 on attention, with feed-forward and with the single blocks' projections."""
    shapes = abstract_params(FluxTransformer(FLUX1_DEV))
    spec = LoraSpec(64, 64.0, (*FAMILY.default_targets, *more))
    adapter = jax.eval_shape(
        lambda: lora.init_adapter(jax.random.key(0), FAMILY.layers_at, shapes, spec)
    )
    assert len(lora.target_layers(FAMILY.layers_at, shapes, spec.targets)) == modules
    assert num_parameters(adapter) == values


def test_a_target_that_matches_nothing_is_refused():
    shapes = abstract_params(FluxTransformer(FLUX1_DEV))
    with pytest.raises(InputError, match="received 'attn2.to_q'; did you mean 'attn.to_q'"):
        lora.target_layers(FAMILY.layers_at, shapes, ("attn2.to_q",))


def test_lora_matches_peft(pair):
    """Suffixes take the single blocks' projections along, as PEFT's do."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = type(pair[0]).from_pretrained(pair[3])
    targets = (*SPEC.targets, "ff.net.0.proj", "ff_context.net.2", "proj_mlp")
    theirs.add_adapter(
        peft.LoraConfig(r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules=list(targets))
    )
    generator, pairs = torch.Generator().manual_seed(1), {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            pairs[name] = (a.numpy().T, b.numpy().T)
    assert len(pairs) == 2 * 8 + 3 * 3 + 2 * 2 + 3
    _, model, params, _ = pair
    out = run_velocity(model, params, lora.stack(FAMILY.layers_at, pairs, params), *inputs(DEV))
    assert_close(out, torch_velocity(theirs, *inputs(DEV)))
    assert relative_error(run_velocity(model, params, None, *inputs(DEV)), out) > 0.1


OTHER_TARGETS = (
    "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "2.proj_out", "norm1.linear", "1.norm1_context.linear",
    "norm.linear", "context_embedder", "x_embedder", "text_embedder.linear_1", "guidance_embedder.linear_2",
    "norm_out.linear",
)  # fmt: skip


@pytest.mark.parametrize("targets", [SPEC.targets, OTHER_TARGETS], ids=["attention", "others"])
def test_merged_equals_unmerged(pair, targets):
    """Also on every other dense layer: a target that a layer does not read would be ignored in silence."""
    _, model, params, _ = pair
    adapter = random_adapter(params, LoraSpec(3, 6.0, targets))
    want = run_velocity(model, params, adapter, *inputs(DEV))
    merged = merge(params, adapter, model.lora_scale)
    assert_close(run_velocity(model, merged, None, *inputs(DEV)), want)


def test_new_adapter_is_the_identity(pair):
    _, model, params, _ = pair
    adapter = lora.init_adapter(jax.random.key(0), FAMILY.layers_at, params, SPEC)
    want = run_velocity(model, params, None, *inputs(DEV))
    np.testing.assert_array_equal(run_velocity(model, params, adapter, *inputs(DEV)), want)


gradient = gradient_of(velocity)
run_gradient = jax.jit(gradient, static_argnums=0, compiler_options=QUICK)


@pytest.mark.parametrize(
    "changes",
    [{"remat": "dots", "unroll": 2}, {"unroll": 50, "remat": "full"}],
    ids=str,
)
def test_how_a_run_of_blocks_is_compiled_keeps_the_gradient(pair, changes):
    _, model, params, _ = pair
    adapter = random_adapter(params)
    want = run_gradient(model, params, adapter, *inputs(DEV))
    got = run_gradient(model.clone(**changes), params, adapter, *inputs(DEV))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("unroll, shown", [(1, {1}), (2, {2}), (50, {2, 3})])
def test_blocks_in_one_turn_are_at_most_those_of_a_run(pair, unroll, shown):
    _, model, params, _ = pair
    jaxpr = str(
        jax.make_jaxpr(lambda *args: velocity(model.clone(unroll=unroll), params, None, *args))(
            *inputs(DEV)
        )
    )
    assert {int(n) for n in re.findall(r"\bunroll=(\d+)", jaxpr)} == shown


def test_gradient_matches_finite_differences(pair):
    _, model, params, _ = pair
    adapter, direction = random_adapter(params), random_adapter(params, seed=1)

    def objective(step):
        moved = jax.tree.map(lambda a, d: a + step * d, adapter, direction)
        return jnp.sum(jnp.sin(run_velocity(model, params, moved, *inputs(DEV))))

    slope = (objective(1e-3) - objective(-1e-3)) / 2e-3
    grads = run_gradient(model, params, adapter, *inputs(DEV))
    parts = jax.tree.map(jnp.vdot, grads, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), slope, rtol=2e-2)


def test_vmap_over_one_adapter_per_sample(pair):
    _, model, params, _ = pair
    xt, sigma, cond = inputs(DEV)
    adapters = [random_adapter(params), random_adapter(params, seed=1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)

    def single(adapter, x, level, c):
        one = jax.tree.map(lambda leaf: leaf[None], c)
        return velocity(model, params, adapter, x[None], level, one)[0]

    together = jax.jit(jax.vmap(single), compiler_options=QUICK)(stacked, xt, sigma, cond)
    for i, adapter in enumerate(adapters):
        own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (xt, sigma, cond))
        assert_close(together[i : i + 1], run_velocity(model, params, adapter, *own))


def test_depth_does_not_change_the_program():
    def equations(layers):
        config = dataclasses.replace(SCHNELL, num_layers=layers, num_single_layers=2 * layers)
        model = FluxTransformer(config)
        shapes = abstract_params(model)
        arguments = jax.tree.map(jnp.asarray, inputs(config))
        program = jax.make_jaxpr(lambda p: velocity(model, p, None, *arguments))(shapes)
        return len(str(program).splitlines())

    assert equations(19) == equations(2)


def test_config_ignores_private_keys():
    config = {
        **dataclasses.asdict(DEV),
        "_class_name": "FluxTransformer2DModel",
        "axes_dims_rope": [4, 6, 6],
    }
    assert FluxConfig.from_dict(config) == DEV


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layer": 3}, r"received 'num_layer'; did you mean 'num_layers'\?"),
        ({"patch_size": 2}, "expected patch_size 1; received 2"),
        ({"in_channels": 6}, "expected in_channels divisible by 4; received 6"),
        ({"out_channels": 8}, "expected out_channels null or in_channels = 16; received 8"),
        ({"num_single_layers": 0}, "num_single_layers: expected a number >= 1; received 0"),
        ({"axes_dims_rope": [4, 6, 8]}, r"three even numbers that add up to 16; received \[4, 6, 8\]"),
        ({"axes_dims_rope": [4, 5, 7]}, r"three even numbers that add up to 16; received \[4, 5, 7\]"),
    ],
)  # fmt: skip
def test_config_errors(change, message):
    with pytest.raises(InputError, match=message):
        FluxConfig.from_dict({**dataclasses.asdict(DEV), **change})


@pytest.mark.parametrize(
    "config, options, shape, message",
    [
        (SCHNELL, {"remat": "ful"}, (1, 4, 4, 4), "remat: expected one of none, full, dots"),
        (SCHNELL, {"attention": "flash"}, (1, 4, 4, 4), "attention: expected one of xla, einsum"),
        (SCHNELL, {}, (1, 5, 4, 4), "sides divisible by 2, as a token is 2 x 2 cells; received 5 x 4"),
        (SCHNELL, {}, (1, 4, 4, 3), r"latents: expected \[N, h, w, 4\]; received \[1, 4, 4, 3\]"),
        (SCHNELL, {"embedded_guidance": 3.5}, (1, 4, 4, 4), "expected none, as this model has no guidance embedding"),
        (DEV, {}, (1, 4, 4, 4), "expected a guidance scale, as this model has a guidance embedding"),
    ],
)  # fmt: skip
def test_model_errors(config, options, shape, message):
    model = FluxTransformer(config, **options)
    cond = {"embeds": jnp.zeros((1, 2, 10)), "pooled": jnp.zeros((1, 6))}
    params = abstract_params(FluxTransformer(config))
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda p: velocity(model, p, None, jnp.zeros(shape), 0.5, cond), params)
