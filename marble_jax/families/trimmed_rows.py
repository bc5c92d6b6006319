"""Conditioning arrays without the rows of zeros at their end, which some families add up to a fixed length.

A short prompt of Wan has 512 rows of 8 KB, of which a few tens are not zero. What is kept in memory and on disk is cut
behind the last row that is not zero to the bit, so that it comes back exactly as it was.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trimmed:
    """An array [rows, ...] without its trailing rows of zeros.

    Attributes:
      array: the rows in front; all of the array where it has fewer than two axes.
      rows: of the whole array; 0 where it has fewer than two axes.
    """

    array: np.ndarray
    rows: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept."""
        return self.array.nbytes

    def whole(self) -> np.ndarray:
        """The array as it was."""
        missing = self.rows - len(self.array) if self.rows else 0
        if missing == 0:
            return self.array
        zeros = np.zeros((missing, *self.array.shape[1:]), self.array.dtype)
        return np.concatenate([self.array, zeros])


def trim(array: np.ndarray) -> Trimmed:
    """Cuts the trailing rows of zeros off a copy of an array [rows, ...]."""
    if array.ndim < 2:
        return Trimmed(np.array(array))
    # By their bytes: a negative zero is one to arithmetic and another number to whoever compares bits.
    contiguous = np.ascontiguousarray(array)
    filled = contiguous.view(np.uint8).reshape(len(array), -1).any(axis=1)
    used = np.flatnonzero(filled)
    # One row at least, as an array without any has no shape to come back to in some formats.
    count = int(used[-1]) + 1 if used.size else min(1, len(array))
    # A copy: a slice would keep the whole array in memory.
    return Trimmed(np.array(contiguous[:count]), len(array))
