"""The transformer against diffusers and PEFT on tiny random weights, from the embeddings up to the whole model."""

import copy
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sd3_lora import LoraSpec, init_adapter, merge, num_parameters, stack
from transformer_checks import (
    QUICK,
    assert_close,
    assert_saved_bit_for_bit,
    gradient_of,
    random_leaves,
)

from marble_jax.config import default_config, settings_of
from marble_jax.errors import InputError
from marble_jax.families.sd3.blocks import Block
from marble_jax.families.sd3.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from marble_jax.families.sd3.embedders import PatchEmbed, TimeTextEmbed, position_table
from marble_jax.families.sd3.layer_names import crop_table, entries, load_mmdit
from marble_jax.families.sd3.transformer import MMDiT, abstract_params, velocity
from marble_jax.networks.attention import IMPLEMENTATIONS, attend
from marble_jax.programs.open_model import network_options

TINY = MMDiTConfig(
    sample_size=16, in_channels=3, num_layers=5, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=10,
    caption_projection_dim=16, pooled_projection_dim=6, out_channels=3, pos_embed_max_size=12,
    dual_attention_layers=(0, 1), qk_norm="rms_norm",
)  # fmt: skip
VARIANTS = {
    "medium": TINY,
    "plain": dataclasses.replace(TINY, dual_attention_layers=(), qk_norm=None),
    "alternating": dataclasses.replace(TINY, dual_attention_layers=(1, 4), out_channels=2),
}
SPEC = LoraSpec(rank=3, alpha=6.0)
run_velocity = jax.jit(velocity, static_argnums=0, compiler_options=QUICK)


def randomise(module):
    """Every tensor random, norm weights around one, so that no bias or scale can hide."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            centre = 1.0 if ".norm_" in name and tensor.ndim == 1 and "linear" not in name else 0.0
            spread = 0.3 if tensor.ndim == 1 else 1.0 / math.sqrt(tensor[0].numel())
            tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))


def reference(config, path):
    """A diffusers transformer with random weights, saved under `path`."""
    pytest.importorskip("torch")
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(**dataclasses.asdict(config)).eval()
    randomise(model)
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(diffusers model, our model, our parameters, directory) of the medium-like tiny config."""
    path = tmp_path_factory.mktemp("transformer")
    model = reference(TINY, path)
    return (model, *load_mmdit(path, lora_scale=SPEC.scale), path)


def inputs(config, num=2, height=8, width=12, tokens=5):
    """Latents, sigma and conditioning; non-square, as are all images here."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    cond = {
        "embeds": draw(num, tokens, config.joint_attention_dim),
        "pooled": draw(num, config.pooled_projection_dim),
    }
    return (
        draw(num, height, width, config.in_channels),
        np.asarray([0.913349, 0.0089286][:num], np.float32),
        cond,
    )


def torch_velocity(model, xt, sigma, cond):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        out = model(
            torch.from_numpy(xt.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(cond["embeds"]),
            torch.from_numpy(cond["pooled"]),
            torch.from_numpy(sigma * 1000),
            return_dict=False,
        )[0]
    return out.numpy().transpose(0, 2, 3, 1)


def random_adapter(params, spec=SPEC, seed=0):
    return random_leaves(lambda: init_adapter(jax.random.key(0), params, spec), seed)


@pytest.mark.parametrize("size", [(8, 12), (24, 6)])
def test_patch_embedding(pair, size):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    xt = inputs(TINY, height=size[0], width=size[1])[0]
    embed = PatchEmbed(TINY, TINY.pos_embed_max_size)
    out = embed.apply({"params": params["pos_embed"]}, jnp.asarray(xt))
    with torch.no_grad():
        assert_close(out, theirs.pos_embed(torch.from_numpy(xt.transpose(0, 3, 1, 2).copy())))


def test_position_table_of_a_new_model_is_the_published_formula(pair):
    table = pair[0].pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(position_table(TINY, 12), table, atol=2e-6)
    np.testing.assert_allclose(position_table(TINY, 4), crop_table(table, 4), atol=2e-6)


def test_time_text_embedding(pair):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    _, sigma, cond = inputs(TINY)
    out = TimeTextEmbed(TINY.width).apply(
        {"params": params["time_text_embed"]},
        jnp.asarray(sigma * 1000),
        jnp.asarray(cond["pooled"]),
    )
    with torch.no_grad():
        assert_close(
            out,
            theirs.time_text_embed(
                torch.from_numpy(sigma * 1000), torch.from_numpy(cond["pooled"])
            ),
        )


@pytest.mark.parametrize(
    "index, run, offset", [(1, "blocks_0", 1), (3, "blocks_2", 1), (4, "block_4", None)]
)
def test_block(pair, index, run, offset):
    torch = pytest.importorskip("torch")
    theirs, _, params, _ = pair
    rng = np.random.default_rng(5)
    x, c, temb = (
        rng.standard_normal(s).astype(np.float32) for s in ((2, 6, 16), (2, 5, 16), (2, 16))
    )
    own = params[run] if offset is None else jax.tree.map(lambda leaf: leaf[offset], params[run])
    block = jax.jit(Block(TINY, dual=index < 2, last=index == 4).apply, compiler_options=QUICK)
    (x_out, c_out), _ = block({"params": own}, (x, c), temb)
    with torch.no_grad():
        c_ref, x_ref = theirs.transformer_blocks[index](
            *(torch.from_numpy(a) for a in (x, c, temb))
        )
    assert_close(x_out, x_ref)
    assert c_ref is None if index == 4 else assert_close(c_out, c_ref) is None


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_model(name, tmp_path):
    config = VARIANTS[name]
    theirs = reference(config, tmp_path)
    model, params = load_mmdit(tmp_path)
    assert model.config == config
    out = run_velocity(model, params, None, *inputs(config))
    assert out.dtype == jnp.float32
    assert_close(out, torch_velocity(theirs, *inputs(config)))


def test_bfloat16_stays_near_float32(pair):
    _, model, params, path = pair
    low, low_params = load_mmdit(path, jnp.bfloat16, dtype=jnp.bfloat16)
    want = run_velocity(model, params, None, *inputs(TINY))
    assert_close(run_velocity(low, low_params, None, *inputs(TINY)), want, 0.03)


def test_float32_streams_make_a_difference_more_exact_in_bfloat16(pair, tmp_path):
    """Diffusers in float32 on the weights that bfloat16 holds is the truth: of the velocity of a base model, and of its
    difference from one whose attention was moved by 2 % of a weight's size, which bfloat16 alone rounds away."""
    torch = pytest.importorskip("torch")
    theirs, num = copy.deepcopy(pair[0]), 64
    rng = np.random.default_rng(5)
    xt, _, cond = inputs(TINY, num=num, height=8, width=8)
    arguments = (xt, rng.uniform(0.05, 1, num).astype(np.float32), cond)
    truth, found = [], {None: [], jnp.float32: []}
    for number in range(2):
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                if number and name.endswith("attn.to_v.weight"):
                    tensor.mul_(1 + 2.0**-5)
                tensor.copy_(tensor.bfloat16().float())
        truth.append(torch_velocity(theirs, *arguments).astype(np.float64))
        theirs.save_pretrained(tmp_path / str(number))
        for streams, velocities in found.items():
            low, params = load_mmdit(
                tmp_path / str(number), jnp.bfloat16, dtype=jnp.bfloat16, stream_dtype=streams
            )
            velocities.append(np.asarray(run_velocity(low, params, None, *arguments), np.float64))

    def error(velocities, of):
        return np.linalg.norm(of(velocities) - of(truth)) / np.linalg.norm(of(truth))

    for of, shrinks in ((lambda v: v[0], 0.9), (lambda v: v[1] - v[0], 0.75)):
        rounded, streams = (error(velocities, of) for velocities in found.values())
        assert 0 < streams < shrinks * rounded


def test_streams_are_those_of_the_products_unless_told_otherwise(pair):
    _, model, params, _ = pair
    wide = model.clone(stream_dtype=jnp.float32)
    np.testing.assert_array_equal(
        run_velocity(wide, params, None, *inputs(TINY)),
        run_velocity(model, params, None, *inputs(TINY)),
    )
    settings = settings_of(default_config()).model
    assert network_options(settings, 1.0).stream_dtype is None
    settings = dataclasses.replace(settings, stream_dtype="float32")
    options = network_options(settings, 1.0)
    assert options.stream_dtype == jnp.float32 and options.dtype == jnp.bfloat16


def test_cropped_table_gives_the_same_velocity(pair):
    _, model, params, path = pair
    cropped, cropped_params = load_mmdit(path, table_side=6)
    assert cropped_params["pos_embed"]["pos_embed"].shape == (1, 36, 16)
    want = run_velocity(model, params, None, *inputs(TINY))
    np.testing.assert_array_equal(run_velocity(cropped, cropped_params, None, *inputs(TINY)), want)


def test_weights_round_trip_bit_for_bit(pair):
    _, _, params, path = pair
    assert_saved_bit_for_bit(params, entries, path)


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [
        (SD35_MEDIUM, 909, 2_243_171_520),
        (SD3_MEDIUM, 683, 2_028_328_000),
        (SD35_LARGE, 1227, 8_056_627_520),
    ],
)
def test_published_sizes(config, tensors, parameters):
    shapes = abstract_params(MMDiT(config))
    assert len(entries(shapes)) == tensors
    assert num_parameters(shapes) - config.pos_embed_max_size**2 * config.width == parameters


def test_lora_matches_peft(pair, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = type(pair[0]).from_pretrained(pair[3])
    theirs.add_adapter(
        peft.LoraConfig(
            r=SPEC.rank,
            lora_alpha=SPEC.alpha,
            target_modules=list(SPEC.targets),
            init_lora_weights="gaussian",
        )
    )
    generator, pairs = torch.Generator().manual_seed(1), {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            pairs[name] = (a.numpy().T, b.numpy().T)
    assert len(pairs) == 5 * 8 - 1
    _, model, params, _ = pair
    out = run_velocity(model, params, stack(pairs, params), *inputs(TINY))
    assert_close(out, torch_velocity(theirs, *inputs(TINY)))
    assert np.linalg.norm(
        out - run_velocity(model, params, None, *inputs(TINY))
    ) > 0.1 * np.linalg.norm(out)


OTHER_TARGETS = (
    "attn.to_q", "attn2.to_v", "ff.net.0.proj", "ff_context.net.2", "norm1.linear", "1.norm1_context.linear",
    "context_embedder", "text_embedder.linear_1", "timestep_embedder.linear_2", "norm_out.linear", "proj_out",
)  # fmt: skip


@pytest.mark.parametrize("targets", [SPEC.targets, OTHER_TARGETS])
def test_merged_equals_unmerged(pair, targets):
    """Also on every other dense layer: a target that a layer does not read would be ignored in silence."""
    _, model, params, _ = pair
    adapter = random_adapter(params, LoraSpec(3, 6.0, targets))
    want = run_velocity(model, params, adapter, *inputs(TINY))
    assert_close(
        run_velocity(model, merge(params, adapter, model.lora_scale), None, *inputs(TINY)), want
    )


def test_new_adapter_is_the_identity(pair):
    _, model, params, _ = pair
    adapter = init_adapter(jax.random.key(0), params, SPEC)
    want = run_velocity(model, params, None, *inputs(TINY))
    np.testing.assert_array_equal(run_velocity(model, params, adapter, *inputs(TINY)), want)


gradient = gradient_of(velocity)
run_gradient = jax.jit(gradient, static_argnums=0, compiler_options=QUICK)


@pytest.mark.parametrize(
    "changes",
    # In a loop and out of it: runs have two blocks, so that any number above 1 unrolls them whole.
    [{"remat": "dots"}, {"unroll": 50, "remat": "full"}],
    ids=str,
)
def test_how_a_run_of_blocks_is_compiled_keeps_the_gradient(pair, changes):
    _, model, params, _ = pair
    adapter = random_adapter(params)
    want = run_gradient(model, params, adapter, *inputs(TINY))
    got = run_gradient(model.clone(**changes), params, adapter, *inputs(TINY))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


@pytest.mark.parametrize("unroll, shown", [(1, {1}), (2, {2}), (50, {2})])
def test_blocks_in_one_turn_are_at_most_those_of_a_run(pair, unroll, shown):
    _, model, params, _ = pair
    jaxpr = str(
        jax.make_jaxpr(lambda *args: velocity(model.clone(unroll=unroll), params, None, *args))(
            *inputs(TINY)
        )
    )
    assert {int(n) for n in re.findall(r"\bunroll=(\d+)", jaxpr)} == shown


def test_text_queries_of_the_last_block_have_no_gradient(pair):
    _, model, params, _ = pair
    grads = run_gradient(model, params, random_adapter(params), *inputs(TINY))
    dead = {path for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)}
    assert {jax.tree_util.keystr(p, simple=True, separator="/") for p in dead} == {
        "block_4/attn/add_q_proj/a",
        "block_4/attn/add_q_proj/b",
    }


def test_gradient_matches_finite_differences(pair):
    _, model, params, _ = pair
    adapter, direction = random_adapter(params), random_adapter(params, seed=1)
    objective = lambda s: jnp.sum(
        jnp.sin(
            run_velocity(
                model,
                params,
                jax.tree.map(lambda a, d: a + s * d, adapter, direction),
                *inputs(TINY),
            )
        )
    )
    slope = (objective(1e-2) - objective(-1e-2)) / 2e-2
    grads = run_gradient(model, params, adapter, *inputs(TINY))
    inner = sum(
        jnp.vdot(g, d)
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(inner, slope, rtol=1e-2)


def test_vmap_over_one_adapter_per_sample(pair):
    _, model, params, _ = pair
    xt, sigma, cond = inputs(TINY)
    adapters = [random_adapter(params), random_adapter(params, seed=1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    single = lambda a, x, s, c: gradient(
        model, params, a, x[None], s, jax.tree.map(lambda y: y[None], c)
    )
    together = jax.jit(jax.vmap(single), compiler_options=QUICK)(stacked, xt, sigma, cond)
    for i, adapter in enumerate(adapters):
        own = jax.tree.map(lambda y, i=i: y[i : i + 1], (xt, sigma, cond))
        alone = run_gradient(model, params, adapter, *own)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            together,
            alone,
        )


def test_depth_does_not_change_the_program():
    def equations(layers):
        config = dataclasses.replace(TINY, num_layers=layers)
        model = MMDiT(config)
        shapes = abstract_params(model)
        xt, sigma, cond = jax.tree.map(jnp.asarray, inputs(config))
        program = jax.make_jaxpr(lambda p: velocity(model, p, None, xt, sigma, cond))(shapes)
        return len(str(program).splitlines())

    assert equations(30) == equations(5)


@pytest.mark.parametrize("name", ["xla", "einsum", "own"])
def test_attention_implementations_agree_with_numpy(name):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, t, 3, 4)).astype(np.float32) for t in (5, 6, 6))
    logits = np.einsum("nqhd,nkhd->nhqk", q.astype(np.float64), k) / 2.0
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(-1, keepdims=True), v)
    implementation = IMPLEMENTATIONS["einsum"] if name == "own" else name
    np.testing.assert_allclose(attend(q, k, v, implementation), want, atol=1e-6)


def test_config_ignores_private_keys():
    config = {
        **dataclasses.asdict(TINY),
        "_class_name": "SD3Transformer2DModel",
        "dual_attention_layers": [0, 1],
    }
    assert MMDiTConfig.from_dict(config) == TINY


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layer": 3}, r"received 'num_layer'; did you mean 'num_layers'\?"),
        ({"qk_norm": "layer_norm"}, "expected qk_norm 'rms_norm' or null; received 'layer_norm'"),
        (
            {"caption_projection_dim": 8},
            r"num_attention_heads \* attention_head_dim = 16; received 8",
        ),
        ({"dual_attention_layers": [5]}, r"expected dual_attention_layers in 0..4; received \[5\]"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(InputError, match=message):
        MMDiTConfig.from_dict({**dataclasses.asdict(TINY), **change})


@pytest.mark.parametrize(
    "options, shape, message",
    [
        (
            {"remat": "ful"},
            (1, 4, 4, 3),
            "remat: expected one of none, full, dots, products; received 'ful'; did you",
        ),
        (
            {"attention": "flash"},
            (1, 4, 4, 3),
            "attention: expected one of xla, einsum, cudnn, splash, auto",
        ),
        (
            {"attention": "cudnn"},
            (1, 4, 4, 3),
            "attention 'cudnn': expected float16 or bfloat16; received float32",
        ),
        ({"table_side": 5}, (1, 4, 4, 3), "table_side: expected an even side up to 12; received 5"),
        ({}, (1, 5, 4, 3), "latents: expected sides divisible by 2 and up to 24; received 5 x 4"),
        ({}, (1, 4, 26, 3), "latents: expected sides divisible by 2 and up to 24; received 4 x 26"),
        ({}, (1, 3, 4, 4), r"latents: expected \[N, h, w, 3\]; received \[1, 3, 4, 4\]"),
    ],
)
def test_model_errors(options, shape, message):
    model = MMDiT(TINY, **options)
    cond = {"embeds": jnp.zeros((1, 2, 10)), "pooled": jnp.zeros((1, 6))}
    with pytest.raises(InputError, match=message):
        params = abstract_params(MMDiT(TINY, table_side=None))
        jax.eval_shape(lambda p: velocity(model, p, None, jnp.zeros(shape), 0.5, cond), params)
