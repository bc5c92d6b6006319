"""The leading axis that all leaves of a tree share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.errors import InputError


def common_length(arrays: Any, what: str, expected: str) -> int:
    """The common length of the first axes.

    Args:
      arrays: pytree of arrays.
      what: they are, in a message.
      expected: shape of the leaves, in a message.

    Raises:
      InputError: no leaves, scalars, or lengths that differ.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(arrays)]
    lengths = sorted({shape[0] for shape in shapes if shape})
    if len(lengths) != 1 or not all(shapes) or not lengths[0]:
        received = ", ".join(str(list(shape)) for shape in shapes[:5]) or "none"
        raise InputError(f"{what}: expected leaves {expected}; received {received}")
    return lengths[0]


def num_objectives(gradients: Any) -> int:
    """K of a tree of gradients with leaves [K, ...].

    Raises:
      InputError: leaves of another kind.
    """
    return common_length(gradients, "gradients", "[K, ...] with the same K")
