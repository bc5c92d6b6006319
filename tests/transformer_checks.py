"""What the tests of every family's transformer compare, and with which random adapter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from marble_jax.trainable.lora import num_parameters
from marble_jax.weights.key_map import published_shape, save_params
from marble_jax.weights.safetensors_files import SafetensorsDir

QUICK = {"xla_backend_optimization_level": 0}
"""For programs that are compiled for one run each."""


def relative_error(got, want) -> float:
    """Relative error in the Euclidean norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_close(got, want, tolerance: float = 1e-5) -> None:
    assert relative_error(got, want) <= tolerance


def random_leaves(new_adapter, seed: int = 0):
    """An adapter with both leaves random, shaped like that of `new_adapter()`: a fresh one would be the identity."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
        jax.eval_shape(new_adapter),
    )


def gradient_of(velocity):
    """(model, params, adapter, xt, sigma, cond) -> gradient of a scalar of the velocity over the adapter."""

    def gradient(model, params, adapter, xt, sigma, cond):
        return jax.grad(lambda a: jnp.sum(jnp.sin(velocity(model, params, a, xt, sigma, cond))))(
            adapter
        )

    return gradient


def assert_saved_bit_for_bit(params, entries, path) -> None:
    """Parameters give back the file in `path` that they were read from."""
    saved, source = save_params(params, entries(params)), SafetensorsDir(path)
    assert saved.keys() == set(source.keys())
    for key in source.keys():
        np.testing.assert_array_equal(saved[key], source.read(key))


def assert_published(shapes, entries, reference, config, tensors: int, parameters: int) -> None:
    """Counts, and names and shapes of all tensors, against diffusers' model `reference` without memory."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    leaves = traverse_util.flatten_dict(shapes)
    ours = {
        entry.key: published_shape(entry, leaves[entry.path].shape) for entry in entries(shapes)
    }
    assert len(ours) == tensors and num_parameters(shapes) == parameters
    with torch.device("meta"):
        theirs = getattr(diffusers, reference)(**dataclasses.asdict(config))
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
