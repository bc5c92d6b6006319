"""Products of eight bits: numbers and scales against NumPy, and what they do to whole transformers."""

import functools
import importlib.resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from loaded_pipeline import load_pipeline

from marble_jax.api.settings import load_settings
from marble_jax.errors import InputError
from marble_jax.networks import quantized
from marble_jax.networks.quantized import KINDS, SCALES, quantize, quantize_blocks, quantized_matmul
from marble_jax.programs.build import build
from marble_jax.programs.check_settings import check_settings

EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded"))
PIPELINES = {"images": EMBEDDED / "pipeline", "clips": EMBEDDED / "video" / "pipeline"}


def _matrix(rows, columns, seed=0):
    # Rows of very different size, as tokens are.
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=(rows, 1)))


def test_int8_is_the_nearest_of_255_numbers():
    x = _matrix(6, 40)
    numbers, scales = quantize(jnp.asarray(x, jnp.float32), -1, jnp.int8)
    expected = np.abs(x).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(np.asarray(numbers, int)).max(axis=1), 127)
    assert np.all(np.abs(np.asarray(numbers, float) * expected - x) <= 0.5001 * expected)


def test_fp8_keeps_three_bits_behind_the_first():
    x = _matrix(6, 40)
    numbers, scales = quantize(jnp.asarray(x, jnp.float32), -1, jnp.float8_e4m3fn)
    back = np.asarray(numbers.astype(jnp.float32), float) * np.asarray(scales, float)
    # Half of the last bit; far below the maximum numbers are evenly spaced.
    spacing = np.maximum(np.abs(x) / 16, np.asarray(scales, float) * 2.0**-10)
    assert np.all(np.abs(back - x) <= 1.001 * spacing)
    assert np.isfinite(back).all()


@pytest.mark.parametrize("kind", KINDS.values())
def test_zeros_stay_zeros(kind):
    numbers, scales = quantize(jnp.zeros((2, 3)), -1, kind)
    assert not np.asarray(numbers.astype(jnp.float32)).any() and np.isfinite(scales).all()


def test_a_product_is_that_of_whole_numbers():
    x, kernel = _matrix(5, 64), _matrix(64, 7, seed=1)
    numbers, scales = quantize(jnp.asarray(kernel, jnp.float32), -2, jnp.int8)
    found = quantized_matmul(jnp.asarray(x, jnp.float32), numbers, scales)
    own = np.abs(x).max(axis=1, keepdims=True) / 127
    whole = np.rint(x / own).astype(np.int64) @ np.asarray(numbers, np.int64)
    np.testing.assert_allclose(found, whole * own * np.asarray(scales, float), rtol=1e-6)
    # A percent of the true product's size.
    error = np.asarray(found, float) - x @ kernel
    assert 0 < np.linalg.norm(error) < 0.02 * np.linalg.norm(x @ kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerators_multiply_the_same_numbers(monkeypatch, kind):
    x, kernel = jnp.asarray(_matrix(5, 64), jnp.bfloat16), jnp.asarray(_matrix(64, 7, 1))
    numbers, scales = quantize(kernel, -2, KINDS[kind])
    here = quantized_matmul(x, numbers, scales)
    monkeypatch.setattr(quantized.jax, "default_backend", lambda: "tpu")
    text = str(jax.make_jaxpr(quantized_matmul)(x, numbers, scales))
    there = quantized_matmul(x, numbers, scales)
    assert here.dtype == there.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(there, np.float32), np.asarray(here, np.float32), rtol=1e-2
    )
    product = next(line for line in text.splitlines() if "dot_general" in line)
    assert {"int8": "i32[5,7]", "fp8": "f32[5,7]"}[kind] in product


@functools.cache
def _pipeline(name):
    return load_pipeline(PIPELINES[name], text_encoders=False)


@functools.cache
def _inputs(name):
    pipeline = _pipeline(name)
    size = pipeline.networks.default_size
    if name == "clips":
        size = size.__class__(48, 48, 5)
    shape = pipeline.networks.latent_shape(size)
    rng = np.random.default_rng(0)
    cond = {
        key: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else jnp.ones(leaf.shape, leaf.dtype)
        for key, leaf in pipeline.networks.conditioning_shapes(2, 16).items()
    }
    xt = jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    return xt, jnp.asarray([0.3, 0.9]), cond


@functools.cache
def _velocity(name, kind):
    networks = _pipeline(name).networks
    params = networks.params if kind == "model" else quantize_blocks(networks.params, kind)
    return np.asarray(jax.jit(networks.velocity)(params, None, *_inputs(name)), np.float64)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind, most", [("int8", 0.03), ("fp8", 0.08)])
def test_a_transformer_of_eight_bits_is_nearly_the_same(name, kind, most):
    exact, narrow = _velocity(name, "model"), _velocity(name, kind)
    error = np.linalg.norm(narrow - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < most


@pytest.mark.parametrize("name", PIPELINES)
def test_only_token_layers_of_blocks_are_narrow(name):
    params = _pipeline(name).networks.params
    leaves = traverse_util.flatten_dict(dict(quantize_blocks(params, "int8")))
    narrow = {path for path, leaf in leaves.items() if leaf.dtype == jnp.int8}
    assert {path[-2] for path in narrow} >= {
        "to_q",
        "to_k",
        "to_v",
        "to_out_0",
        "net_0_proj",
        "net_2",
    }
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if path in narrow:
            scales = leaves[(*path[:-1], SCALES)]
            assert scales.shape == (*leaf.shape[:-2], 1, leaf.shape[-1])
            continue
        assert leaves[path].dtype == leaf.dtype
        is_product = path[-1] == "kernel" and path[0].startswith("block")
        assert not is_product or path[-2] == "linear"


def test_rollouts_alone_are_narrow():
    changes = {"rollout.products": "int8", "rollout.merge_adapter": False}
    settings = load_settings("embedded:smoke", changes)
    run = build(settings)
    try:
        iteration = run.iteration
        params, adapter = iteration.rollout_policy(run.state)
        # Beside the weights, in its own precision.
        assert adapter is run.state.rollout
        kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
        assert kinds == {"int8", "float32"}
        # What is trained and evaluated is what was read.
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(iteration.params)} == {"float32"}
    finally:
        run.collector.scorer.close()
        run.evaluator.scorer.close()


@pytest.mark.parametrize(
    "preset, changes, reason",
    [
        ("embedded:flow_grpo", {}, "objective.name=policy_gradient"),
        (
            "embedded:smoke",
            {"mesh.fsdp": 2},
            "weights split over devices .mesh.fsdp=2, mesh.tensor=1.",
        ),
        (
            "embedded:smoke",
            {"mesh.tensor": 2},
            "weights split over devices .mesh.fsdp=1, mesh.tensor=2.",
        ),
        (
            "embedded:smoke",
            {},
            "rollout.merge_adapter=True, .*--config.rollout.merge_adapter=False",
        ),
    ],
)
def test_what_training_could_not_follow_is_refused(preset, changes, reason):
    settings = load_settings(preset, {"rollout.products": "fp8", **changes})
    with pytest.raises(InputError, match=f"^rollout.products: expected 'model' with {reason}"):
        check_settings(settings)
