"""Pull-backs of several directions at every sample, and their mixes for any number of objectives.

Samples that do not interact have gradients of their own. `J` directions pulled back at each of `n` samples give the
gradients of `K` objectives as products with weights [n, K, J], whatever `K` is; chunks of samples bound the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from marble_jax.errors import InputError, nearest_number
from marble_jax.tree import HIGHEST, Tree

_Sums = TypeVar("_Sums")


def mix_directions(mix: Float[Array, "n k j"], directions: Tree) -> Tree:
    """Sums over samples of K mixes of the J directions pulled back at each.

    Args:
      mix: weights of the directions, for every sample and objective.
      directions: leaves [n, J, ...].

    Returns:
      The same tree with leaves [K, ...], in the dtype of `mix`.
    """

    def one(leaf: jax.Array) -> jax.Array:
        mixed = leaf.astype(mix.dtype)
        return jnp.einsum("ckj,cj...->k...", mix, mixed, precision=HIGHEST)

    return jax.tree.map(one, directions)


def sum_over_chunks(
    part_sums: Callable[[Any], _Sums], whole: Any, zeros: _Sums, chunk_size: int
) -> _Sums:
    """Adds up a function of chunks of samples.

    Args:
      part_sums: sums over the samples of one chunk, in the structure of `zeros`.
      whole: arrays [n, ...] of all samples.
      zeros: the sums before the first chunk; their dtypes are kept.
      chunk_size: samples of a chunk, a divisor of n.
    """
    num_samples = len(jax.tree.leaves(whole)[0])

    def add_chunk(sums: _Sums, chunk: Any) -> tuple[_Sums, None]:
        return jax.tree.map(_add, sums, part_sums(chunk)), None

    if chunk_size == num_samples:
        # A loop of one turn stays a loop in the compiled program, with all that a loop copies.
        return add_chunk(zeros, whole)[0]
    return jax.lax.scan(add_chunk, zeros, _deal(whole, chunk_size))[0]


def _add(total: jax.Array, part: jax.Array) -> jax.Array:
    """Sum in the dtype of the total: the carry of a scan keeps its own, and half precision is added in float32."""
    return total + part.astype(total.dtype)


def _deal(batch: Any, chunk_size: int) -> Any:
    """Deals the leading axis of every leaf out: [n, ...] -> [n / chunk_size, chunk_size, ...].

    Every n / chunk_size-th sample makes a chunk, so that where samples are split over devices in blocks, each device
    has its share of every chunk.
    """

    def deal(x: jax.Array) -> jax.Array:
        num_samples, *shape = x.shape
        dealt = x.reshape(chunk_size, num_samples // chunk_size, *shape)
        return dealt.swapaxes(0, 1)

    return jax.tree.map(deal, batch)


def resolve_chunk(num: int, chunk_size: int | None) -> int:
    """The number of samples pulled back together: `chunk_size`, or all `num` of them when it is None.

    Raises:
      InputError: it does not divide `num`.
    """
    if chunk_size is None:
        return num
    if chunk_size < 1 or num % chunk_size:
        divisors = [c for c in range(1, num + 1) if num % c == 0]
        best = nearest_number(chunk_size, divisors)
        raise InputError(
            f"gradient chunk size: expected a divisor of the {num} samples of a micro-batch; "
            f"received {chunk_size} (nearest valid choice {best})"
        )
    return chunk_size
