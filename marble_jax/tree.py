"""Algebra of pytrees of arrays: inner products, norms, Gram matrices and weighted sums, accumulated in float32.

A *stacked* tree holds K trees of one structure with the index as the first axis of every leaf; per-reward gradients
are kept that way. Every sum is taken leaf by leaf, so a sharded tree needs no gathering.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zeros_like(tree: Tree, stack: int | None = None) -> Tree:
    """Float32 (or wider) zeros shaped like `tree`; with `stack=K` every leaf gains a leading axis of length K."""
    lead = () if stack is None else (stack,)
    return jax.tree.map(
        lambda x: jnp.zeros(lead + x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree
    )


def add(x: Tree, y: Tree) -> Tree:
    """x + y, leaf by leaf."""
    return jax.tree.map(jnp.add, x, y)


def scale(tree: Tree, factor: jax.Array | float) -> Tree:
    """factor * tree; the leaves keep their dtypes."""
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


def lerp(x: Tree, y: Tree, weight: jax.Array | float) -> Tree:
    """weight * x + (1 - weight) * y; the leaves keep the dtypes of `x`."""
    return jax.tree.map(lambda a, b: (weight * a + (1.0 - weight) * b).astype(a.dtype), x, y)


def vdot(x: Tree, y: Tree) -> jax.Array:
    """Inner product of two trees of the same structure: scalar, at least float32."""
    parts = jax.tree.map(lambda a, b: jnp.sum(_wide(a) * _wide(b)), x, y)
    return jax.tree.reduce(jnp.add, parts, jnp.zeros((), jnp.float32))


def norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves: scalar, at least float32."""
    return jnp.sqrt(vdot(tree, tree))


def stack(trees: list[Tree] | tuple[Tree, ...]) -> Tree:
    """K trees of one structure -> one stacked tree with leaves [K, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(stacked: Tree, index: int | jax.Array) -> Tree:
    """The tree at `index` of a stacked tree."""
    return jax.tree.map(lambda x: x[index], stacked)


def gram(stacked: Tree) -> jax.Array:
    """Matrix of inner products of the K trees in a stacked tree.

    Args:
      stacked: leaves [K, ...].

    Returns:
      [K, K], symmetric, at least float32. A non-finite entry in tree k makes row and column k non-finite.
    """

    def one(leaf: jax.Array) -> jax.Array:
        flat = _wide(leaf).reshape(leaf.shape[0], -1)
        return jnp.einsum("kp,lp->kl", flat, flat, precision=_HIGHEST)

    total = jax.tree.reduce(jnp.add, jax.tree.map(one, stacked))
    return 0.5 * (total + total.T)


def weighted_sum(weights: jax.Array, stacked: Tree) -> Tree:
    """sum_k weights[k] * tree_k, without the leading axis.

    A weight of exactly 0 removes its tree altogether, so a non-finite gradient that left the solve cannot leak.

    Args:
      weights: [K].
      stacked: leaves [K, ...].
    """

    def one(leaf: jax.Array) -> jax.Array:
        keep = (weights != 0).reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.einsum(
            "k,k...->...", weights.astype(leaf.dtype), jnp.where(keep, leaf, 0), precision=_HIGHEST
        )

    return jax.tree.map(one, stacked)


def all_finite(tree: Tree) -> jax.Array:
    """Scalar bool: every number of every leaf is finite."""
    return jax.tree.reduce(
        jnp.logical_and, jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree), jnp.array(True)
    )


def num_elements(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))


def full_batches(tree: Tree, count: int, size: int) -> Iterator[Tree]:
    """Slices of `size` rows of every leaf; the last slice repeats the last row until it is full.

    Args:
      tree: leaves [count, ...].
      count: rows.
      size: rows of a slice, so that a compiled function sees one shape.

    Raises:
      InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"batch: expected 1 or more; received {size}")
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], tree)
