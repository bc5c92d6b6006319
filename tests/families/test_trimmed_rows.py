"""Conditioning without its rows of zeros: exact to the bit, in memory and on disk."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.families.trimmed_rows import trim


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_come_back_to_the_bit(dtype):
    array = np.zeros((6, 3), jnp.dtype(dtype))
    array[1, 2] = 1.5
    # A zero with a sign is a number of its own.
    array[3, 0] = -0.0
    trimmed = trim(array)
    assert trimmed.array.shape == (4, 3) and trimmed.rows == 6
    assert trimmed.nbytes == 12 * array.itemsize
    assert trimmed.whole().tobytes() == array.tobytes() and trimmed.whole().dtype == array.dtype


@pytest.mark.parametrize("shape, kept", [((4, 2), (1, 2)), ((4,), (4,)), ((), ())])
def test_zeros_and_vectors(shape, kept):
    zeros = np.zeros(shape, np.float32)
    trimmed = trim(zeros)
    assert trimmed.array.shape == kept
    np.testing.assert_array_equal(trimmed.whole(), zeros)


def test_what_is_kept_shares_no_memory_with_the_batch():
    batch = np.ones((2, 3, 4), np.float32)
    assert not np.shares_memory(trim(batch[0]).array, batch)
