"""Which layers are adapted, how they start, and the way to the names of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sd3_lora import (
    LoraSpec,
    init_adapter,
    merge,
    num_parameters,
    stack,
    target_layers,
    unstack,
)

from marble_jax.errors import InputError
from marble_jax.families.sd3.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from marble_jax.families.sd3.transformer import MMDiT, abstract_params
from marble_jax.networks.lora_dense import LoraDense, check_adapter

TINY = MMDiTConfig(
    num_layers=4, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=5, caption_projection_dim=8,
    pooled_projection_dim=6, pos_embed_max_size=4, dual_attention_layers=(0, 1), qk_norm="rms_norm",
)  # fmt: skip
SHAPES = abstract_params(MMDiT(TINY))
SPEC = LoraSpec(rank=3, alpha=6.0)


def test_sd35_medium_gets_191_modules_and_18776064_values():
    shapes = abstract_params(MMDiT(SD35_MEDIUM))
    names = {layer.name for layer in target_layers(shapes)}
    assert len(names) == 191
    assert not any("attn2" in name for name in names)
    assert "transformer_blocks.23.attn.add_q_proj" in names
    assert "transformer_blocks.23.attn.to_add_out" not in names
    adapter = jax.eval_shape(lambda key: init_adapter(key, shapes, LoraSpec()), jax.random.key(0))
    assert num_parameters(adapter) == 18_776_064
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("config, count", [(SD3_MEDIUM, 191), (SD35_LARGE, 303)])
def test_other_published_models(config, count):
    assert len(target_layers(abstract_params(MMDiT(config)))) == count


def test_scale_is_alpha_over_rank():
    assert LoraSpec().scale == 2.0
    assert LoraSpec(rank=16, alpha=8.0).scale == 0.5


def test_initial_values():
    """Standard deviation 1/rank: 3 blocks of 8 x 64 draws put the sample's within 2 % at one sigma."""
    adapter = init_adapter(jax.random.key(0), SHAPES, LoraSpec(rank=64))
    run = adapter["blocks_0"]["attn"]["to_q"]
    assert run["a"].shape == (2, 8, 64) and run["b"].shape == (2, 64, 8)
    values = np.concatenate(
        [np.ravel(leaf) for leaf in (run["a"], adapter["blocks_2"]["attn"]["to_k"]["a"])]
    )
    assert abs(values.std() * 64 - 1) < 0.08 and abs(values.mean() * 64) < 0.08
    assert not np.any(run["b"])
    assert not np.array_equal(run["a"][0], run["a"][1])


def test_a_layer_draws_the_same_values_whatever_else_is_adapted():
    every = unstack(init_adapter(jax.random.key(0), SHAPES, SPEC))
    alone = unstack(init_adapter(jax.random.key(0), SHAPES, LoraSpec(3, 6.0, ("attn.to_q",))))
    assert set(alone) == {f"transformer_blocks.{i}.attn.to_q" for i in range(4)}
    for name, (a, _) in alone.items():
        np.testing.assert_array_equal(a, every[name][0])


def test_untargeted_layers_of_a_run_are_zero():
    adapter = init_adapter(
        jax.random.key(0), SHAPES, LoraSpec(3, 6.0, ("transformer_blocks.1.attn.to_q",))
    )
    a = adapter["blocks_0"]["attn"]["to_q"]["a"]
    assert not np.any(a[0]) and np.all(np.any(a[1], axis=0))


def test_stack_inverts_unstack():
    rng = np.random.default_rng(0)
    adapter = init_adapter(jax.random.key(0), SHAPES, SPEC)
    adapter = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), adapter)
    pairs = unstack(adapter)
    assert len(pairs) == 4 * 8 - 1
    back = stack(pairs, SHAPES)
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


def test_merge_by_hand():
    params = {
        "dense": {"kernel": np.asarray([[1.0, 2.0]], np.float32), "bias": np.zeros(2, np.float32)}
    }
    adapter = {
        "dense": {"a": np.asarray([[3.0]], np.float32), "b": np.asarray([[1.0, -1.0]], np.float32)}
    }
    merged = merge(params, adapter, 2.0)
    np.testing.assert_array_equal(merged["dense"]["kernel"], [[7.0, -4.0]])
    np.testing.assert_array_equal(
        merge(merged, adapter, -2.0)["dense"]["kernel"], params["dense"]["kernel"]
    )
    half = {
        "dense": {
            "kernel": params["dense"]["kernel"].astype(np.float16),
            "bias": params["dense"]["bias"],
        }
    }
    assert merge(half, adapter, 2.0)["dense"]["kernel"].dtype == np.float16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_with_and_without_adapter(dtype):
    layer = LoraDense(2, dtype=dtype, lora_scale=2.0)
    variables = {"params": {"kernel": jnp.asarray([[1.0, 2.0]]), "bias": jnp.asarray([0.5, 0.25])}}
    x = jnp.asarray([[2.0]])
    plain = layer.apply(variables, x)
    assert plain.dtype == dtype
    np.testing.assert_array_equal(plain.astype(jnp.float32), [[2.5, 4.25]])
    adapted = layer.apply(
        {**variables, "lora": {"a": jnp.asarray([[3.0]]), "b": jnp.asarray([[1.0, -1.0]])}}, x
    )
    np.testing.assert_array_equal(adapted.astype(jnp.float32), [[14.5, -7.75]])


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: LoraSpec(targets="attn.to_q"),
            "targets: expected a list of module name suffixes; received 'attn",
        ),
        (
            lambda: LoraSpec(targets=()),
            r"adapter targets: expected a list of module name suffixes; received \(\)",
        ),
        (lambda: LoraSpec(rank=0), "adapter rank: expected at least 1; received 0"),
        (
            lambda: target_layers(SHAPES, ("attn.to_k", "attn.to_qq")),
            r"received 'attn.to_qq'; did you mean 'attn.to_q'\?",
        ),
        (
            lambda: target_layers(SHAPES, ("o_q",)),
            "adapter target: expected the end of a dense layer's name",
        ),
        (lambda: target_layers(SHAPES, ("pos_embed.proj",)), "received 'pos_embed.proj'"),
        (
            lambda: stack(
                {"transformer_blocks.9.attn.to_q": (np.zeros((8, 2)), np.zeros((2, 8)))}, SHAPES
            ),
            "expected a dense layer of the transformer; received 'transformer_blocks.9.attn.to_q'; did you mean",
        ),
        (
            lambda: stack(
                {"transformer_blocks.1.attn.to_q": (np.zeros((8, 2)), np.zeros((3, 8)))}, SHAPES
            ),
            r"attn.to_q, b: expected shape \(2, 8\); received \(3, 8\)",
        ),
        (
            lambda: stack(
                {"transformer_blocks.1.attn.to_q": (np.zeros((7, 2)), np.zeros((2, 8)))}, SHAPES
            ),
            r"attn.to_q, a: expected shape \(8, 2\); received \(7, 2\)",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize(
    "adapter, message",
    [
        (
            {"densee": {"a": np.zeros((1, 1)), "b": np.zeros((1, 2))}},
            "leaf densee/a: .*did you mean 'dense'",
        ),
        (
            {"dense": {"a": np.zeros((1, 1))}},
            "leaf dense/a: expected the pair 'a' and 'b'; received 'a' alone",
        ),
        (
            {"dense": {"a": np.zeros((1, 1)), "b": np.zeros((1, 2)), "c": 0}},
            "dense/c: expected the pair .*'c'",
        ),
        (
            {"dense": {"a": np.zeros((2, 1)), "b": np.zeros((1, 2))}},
            r"adapter of dense: .*\(1, 2\); received \(2, 1\)",
        ),
        (
            {"dense": {"a": np.zeros((1, 1)), "b": np.zeros((2, 2))}},
            r"adapter of dense: .*received \(1, 1\), \(2, 2\)",
        ),
    ],
)
def test_adapter_that_does_not_belong(adapter, message):
    with pytest.raises(InputError, match=message):
        check_adapter({"dense": {"kernel": np.zeros((1, 2)), "bias": np.zeros(2)}}, adapter)
