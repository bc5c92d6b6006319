"""Algebra of pytrees of arrays: inner products, norms, Gram matrices and weighted sums, accumulated in float32.

A *stacked* tree holds K trees of one structure with the index as the first axis of every leaf; per-reward gradients
are kept that way. Every sum is taken leaf by leaf, so a sharded tree needs no gathering.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
"""A pytree of arrays."""

HIGHEST = jax.lax.Precision.HIGHEST
"""Precision of products that gradients are compared and combined by.

Accelerators multiply float32 in fewer bits by default; a Gram matrix of nearly parallel gradients needs all of them.
"""


def _wide_dtype(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(_wide_dtype(leaf))


def zeros_like(tree: Tree, stack: int | None = None) -> Tree:
    """Float32 (or wider) zeros shaped like `tree`; with `stack=K` every leaf gains a leading axis of length K."""
    lead: tuple[int, ...] = ()
    if stack is not None:
        lead = (stack,)

    def zeros(leaf: jax.Array) -> jax.Array:
        shape = lead + leaf.shape
        return jnp.zeros(shape, _wide_dtype(leaf))

    return jax.tree.map(zeros, tree)


def along_first(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns [K] values with trailing axes of length 1, one for each of the K trees that a stacked leaf holds.

    Args:
      values: [K].
      leaf: [K, ...], which the result broadcasts against.
    """
    return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def add(x: Tree, y: Tree) -> Tree:
    """x + y, leaf by leaf."""
    return jax.tree.map(jnp.add, x, y)


def scale(tree: Tree, factor: jax.Array | float) -> Tree:
    """factor * tree; the leaves keep their dtypes."""

    def one(leaf: jax.Array) -> jax.Array:
        scaled = leaf * factor
        # A float32 array as factor would widen a leaf of half precision.
        return scaled.astype(leaf.dtype)

    return jax.tree.map(one, tree)


def lerp(x: Tree, y: Tree, weight: jax.Array | float) -> Tree:
    """weight * x + (1 - weight) * y; the leaves keep the dtypes of `x`."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        mixed = weight * a + (1.0 - weight) * b
        return mixed.astype(a.dtype)

    return jax.tree.map(one, x, y)


def vdot(x: Tree, y: Tree) -> jax.Array:
    """Inner product of two trees of the same structure: scalar, at least float32."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        # Widened before the product: half precision overflows at 65504, and the sum loses small
        # terms.
        products = _wide(a) * _wide(b)
        return jnp.sum(products)

    parts = jax.tree.map(one, x, y)
    zero = jnp.zeros((), jnp.float32)
    return jax.tree.reduce(jnp.add, parts, zero)


def norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves: scalar, at least float32."""
    squared = vdot(tree, tree)
    return jnp.sqrt(squared)


def gram(stacked: Tree) -> jax.Array:
    """Matrix of inner products of the K trees in a stacked tree.

    Args:
      stacked: leaves [K, ...].

    Returns:
      [K, K], symmetric, at least float32. A non-finite entry in tree k makes row and column k non-finite.
    """

    def one(leaf: jax.Array) -> jax.Array:
        num_trees = leaf.shape[0]
        flat = _wide(leaf).reshape(num_trees, -1)
        return jnp.einsum("kp,lp->kl", flat, flat, precision=HIGHEST)

    parts = jax.tree.map(one, stacked)
    total = jax.tree.reduce(jnp.add, parts)
    # A matrix product need not be symmetric to the last bit, and the solvers rely on a symmetric
    # matrix.
    return 0.5 * (total + total.T)


def products(one: Tree, other: Tree) -> jax.Array:
    """Matrix [K, L] of inner products of the K trees in a stacked tree with the L trees in another.

    Args:
      one: leaves [K, ...].
      other: leaves [L, ...].
    """

    def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        rows = _wide(a).reshape(a.shape[0], -1)
        columns = _wide(b).reshape(b.shape[0], -1)
        return jnp.einsum("kp,lp->kl", rows, columns, precision=HIGHEST)

    parts = jax.tree.map(of_leaf, one, other)
    return jax.tree.reduce(jnp.add, parts)


def weighted_sum(weights: jax.Array, stacked: Tree) -> Tree:
    """sum_k weights[k] * tree_k, without the leading axis.

    A weight of exactly 0 removes its tree altogether, so a non-finite gradient that left the solve cannot leak.

    Args:
      weights: [K].
      stacked: leaves [K, ...].
    """

    def one(leaf: jax.Array) -> jax.Array:
        keep = along_first(weights != 0, leaf)
        # 0 * inf is NaN, so a tree of weight 0 is replaced before the product rather than
        # multiplied away.
        kept = jnp.where(keep, leaf, 0)
        factors = weights.astype(leaf.dtype)
        return jnp.einsum("k,k...->...", factors, kept, precision=HIGHEST)

    return jax.tree.map(one, stacked)


def all_finite(tree: Tree) -> jax.Array:
    """Scalar bool: every number of every leaf is finite."""
    finite = jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
    # The initial value also makes an empty tree finite.
    return jax.tree.reduce(jnp.logical_and, finite, jnp.array(True))


def equal(x: Tree, y: Tree) -> jax.Array:
    """Scalar bool: every number of two trees of the same structure is the same; what is not a number never is."""
    same = jax.tree.map(lambda a, b: jnp.all(a == b), x, y)
    return jax.tree.reduce(jnp.logical_and, same, jnp.array(True))
