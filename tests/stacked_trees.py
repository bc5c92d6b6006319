"""Stacked trees put together and taken apart: trees of one structure along a leading axis of every leaf."""

import jax
import jax.numpy as jnp


def stack(trees):
    """K trees of one structure as one tree with leaves [K, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(stacked, index):
    """The tree at `index` of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)
