"""Parameters of a network as shapes, found by tracing it once and remembered."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax


def parameter_shapes(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything.

    Args:
      model: the network; only its fields count, so that equal networks are traced once.
      inputs: shapes and dtypes of what it is called with.
    """
    found = _traced(model, inputs)
    # Containers of the caller's own: what is remembered stays as it is.
    return jax.tree.map(lambda leaf: leaf, found)


@functools.lru_cache(maxsize=64)
def _traced(model: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> dict[str, Any]:
    # Tracing a transformer takes a second or more, and a program asks for the same shapes several times.
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return variables["params"]
