"""FLUX.1 over devices: sharding rules, gradients on a mesh, the emulated fused kernel; and its FLOPs."""

from __future__ import annotations

import dataclasses

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flux1_models import DEV, GUIDANCE, inputs
from transformer_checks import assert_close

from marble_jax.distributed import device_mesh
from marble_jax.families.flux1 import flops
from marble_jax.families.flux1.config import FLUX1_DEV, FLUX1_SCHNELL
from marble_jax.families.flux1.family import FAMILY
from marble_jax.families.flux1.sharding_rules import (
    FLUX_RULES,
    component_rules,
    transformer_rules,
)
from marble_jax.families.flux1.transformer import FluxTransformer, abstract_params, velocity
from marble_jax.networks.fused_attention import FusedAttention
from marble_jax.networks.sharding_rules import AUTOENCODER, TEXT_ENCODERS
from marble_jax.trainable import lora

QUICK = {"xla_backend_optimization_level": 0}


def leaves(tree):
    return traverse_util.flatten_dict(dict(tree))


def test_every_weight_has_a_rule_and_every_rule_a_weight():
    rules, used = transformer_rules(128), set()
    for config in (FLUX1_DEV, FLUX1_SCHNELL):
        for path, leaf in leaves(abstract_params(FluxTransformer(config))).items():
            assert len(rules.logical_axes(path, len(leaf.shape))) == len(leaf.shape)
            used.add(rules.rule_of(path))
            # One block of a scanned run goes by a name of its own.
            if path[0].startswith("blocks_"):
                inner = (path[0].replace("blocks_", "block_"), *path[1:])
                assert rules.rule_of(inner) == rules.rule_of(path)
    assert used == set(FLUX_RULES)
    assert component_rules("transformer", 16) == transformer_rules(16)
    assert component_rules("vae", 16) is AUTOENCODER
    assert component_rules("text_encoder_2", 16) is TEXT_ENCODERS


@pytest.mark.parametrize(
    "count, tensor, heads",
    [(8, 8, 3), (3, 3, 8), (24, 24, 1), (5, 5, 24)],
)
def test_heads_are_dealt_out_whole(count, tensor, heads):
    """24 heads: over 8, 3 and 24 devices; not over 5."""
    mesh = device_mesh.abstract_mesh(count, 1, 1, tensor)
    params = abstract_params(FluxTransformer(FLUX1_DEV))
    lie = leaves(transformer_rules(128).shardings(mesh, params))
    for kind, name in (("double", "to_q"), ("double", "add_v_proj"), ("single", "to_k")):
        path = (f"blocks_{kind}", "attn", name, "kernel")
        shape = leaves(params)[path].shape
        assert lie[path].shard_shape(shape)[-1] == heads * 128


def test_the_published_model_over_devices():
    """23.8 GB in bfloat16: a sixteenth a device over fsdp, an eighth over tensor."""
    params = FAMILY.outline("FLUX.1-dev", options()).params
    rules = transformer_rules(128)
    for sizes, parts in (((1, 16, 1), 16), ((2, 1, 8), 8), ((1, 2, 8), 16)):
        layout = rules.layout(device_mesh.abstract_mesh(16, *sizes), params)
        assert layout.total == 2 * 11_901_408_320
        assert layout.device == pytest.approx(layout.total / parts, rel=0.03)


def options():
    from marble_jax.families.descriptions import NetworkOptions

    return NetworkOptions(dtype=jnp.bfloat16)


WIDE = dataclasses.replace(DEV, num_attention_heads=4)
"""Four heads, which two devices share."""


def gap_on_a_mesh() -> float:
    """Runs in a process with eight devices: how far gradients on a mesh are from those on one device."""
    model = FluxTransformer(WIDE, embedded_guidance=GUIDANCE)
    xt, sigma, cond = inputs(WIDE, num=2)
    xt, sigma, cond = jax.tree.map(lambda x: jnp.concatenate([x] * 4), (xt, sigma, cond))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        abstract_params(model),
    )
    spec = lora.LoraSpec(2, 2.0, (*FAMILY.default_targets, "proj_mlp", "proj_out", "ff.net.2"))
    shapes = jax.eval_shape(
        lambda: lora.init_adapter(jax.random.key(0), FAMILY.layers_at, params, spec)
    )
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes
    )

    def gradient(model, params, adapter, *batch):
        return jax.grad(lambda a: jnp.mean(velocity(model, params, a, *batch) ** 2))(adapter)

    want = jax.jit(gradient, static_argnums=0)(model, params, adapter, xt, sigma, cond)
    # Two devices along each axis.
    mesh = device_mesh.make_mesh(2, 2, 2)
    rules = transformer_rules(WIDE.attention_head_dim)
    split = jax.device_put(params, rules.shardings(mesh, params))
    batch = device_mesh.shard_batch(mesh, (xt, sigma, cond))
    on_mesh = model.clone(gather=rules.gather(mesh), remat="full")
    got = jax.jit(gradient, static_argnums=0)(
        on_mesh, split, device_mesh.replicate(mesh, adapter), *batch
    )
    gap = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)), got, want)
    return max(jax.tree.leaves(gap))


def test_gradients_on_a_mesh_are_those_of_one_device():
    assert fake_devices.call(gap_on_a_mesh) < 1e-4


def test_the_fused_kernel_of_tpus_gives_the_same_velocity():
    """Emulated: tokens padded to whole blocks, heads of another width than a register."""
    config = dataclasses.replace(DEV, num_layers=1, num_single_layers=1)
    model = FluxTransformer(config, embedded_guidance=GUIDANCE)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        abstract_params(model),
    )
    fused = model.clone(attention=FusedAttention("splash", interpret=True))
    want, got = (
        jax.jit(velocity, static_argnums=0)(m, params, None, *inputs(config))
        for m in (model, fused)
    )
    assert_close(got, want, 1e-5)


# Each run has one block, so that XLA's analysis, which counts the body of a loop once, sees all of it.
UNSCANNED = dataclasses.replace(
    FLUX1_DEV,
    in_channels=64,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=64,
    num_attention_heads=6,
    joint_attention_dim=512,
    pooled_projection_dim=256,
    axes_dims_rope=(8, 28, 28),
)
NUM, SIDE, TEXT = 2, 24, 40


@pytest.fixture(scope="module")
def unscanned():
    """(analytic work, forward, XLA's FLOPs a sample of a function of the model's inputs)."""
    model = FluxTransformer(UNSCANNED, attention="einsum", embedded_guidance=GUIDANCE)
    params = abstract_params(model)
    spec = lora.LoraSpec(16, 16.0, FAMILY.default_targets)
    adapter = jax.eval_shape(
        lambda: lora.init_adapter(jax.random.key(0), FAMILY.layers_at, params, spec)
    )
    struct = jax.ShapeDtypeStruct
    cond = {
        "embeds": struct((NUM, TEXT, UNSCANNED.joint_attention_dim), jnp.float32),
        "pooled": struct((NUM, UNSCANNED.pooled_projection_dim), jnp.float32),
    }
    xt, sigma = struct((NUM, SIDE, SIDE, 16), jnp.float32), struct((NUM,), jnp.float32)

    def forward(adapter, params, xt, sigma, cond):
        return velocity(model, params, adapter, xt, sigma, cond)

    def measured(function):
        lowered = jax.jit(function).lower(adapter, params, xt, sigma, cond)
        return lowered.compile(compiler_options=QUICK).cost_analysis()["flops"] / NUM

    work = flops.transformer(UNSCANNED, params, adapter, (SIDE // 2) ** 2, TEXT)
    return work, forward, measured


def test_flops_of_the_forward_pass_against_xla(unscanned):
    work, forward, measured = unscanned
    assert measured(forward) == pytest.approx(work.forward, rel=0.03)


def test_flops_of_the_gradient_against_xla(unscanned):
    work, forward, measured = unscanned
    found = measured(
        lambda adapter, *rest: jax.grad(lambda a: jnp.sum(forward(a, *rest) ** 2))(adapter)
    )
    assert found == pytest.approx(work.forward + work.backward, rel=0.03)


def test_flops_of_the_published_model_by_hand():
    """At 512 px with 512 text tokens, from the published widths."""
    params = abstract_params(FluxTransformer(FLUX1_DEV))
    spec = lora.LoraSpec(64, 64.0, FAMILY.default_targets)
    adapter = jax.eval_shape(
        lambda: lora.init_adapter(jax.random.key(0), FAMILY.layers_at, params, spec)
    )
    work = flops.transformer(FLUX1_DEV, params, adapter, 1024, 512)
    d, tokens = 3072, 1536
    # Twelve widths squared a token in either kind of block: four or three of attention, eight or nine behind it.
    blocks = (19 + 38) * 12 * tokens * d**2
    attention = (19 + 38) * 2 * tokens**2 * d
    modulation = d**2 * (19 * 12 + 38 * 3 + 2)
    embedders = d * (256 + d) * 2 + d * (768 + d)
    ends = 1024 * d * (64 + 64) + 512 * 4096 * d
    assert work.base == pytest.approx(2 * (blocks + attention + modulation + embedders + ends))
    assert work.attention == 2 * attention
    low_rank = 2 * 2 * 64 * d * (19 * 4 + 38 * 3) * tokens
    assert work.forward - work.base == pytest.approx(low_rank)
    assert 0.95 < work.backward / work.base < 1.15
