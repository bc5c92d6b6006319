"""Pickles of numbers, without the rest of the language: what older reward servers answer.

A pickle is a program that may import and call anything. Here it may build None, booleans, numbers, texts, bytes,
lists, tuples, dicts, sets and NumPy arrays, and everything else it names is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from marble_jax.rewards.base import RewardError

ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    # The same functions under the names that NumPy has given them since 2.0.
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}
"""Module and attribute of everything that NumPy's own pickles name."""


def _as_bytes(text: str, encoding: str) -> bytes:
    """The bytes that pickle protocols before 3 write as an encoded text."""
    # Other codecs do more than to map characters: some decompress.
    if encoding != "latin1":
        raise RewardError("pickle: expected containers, numbers and arrays; received a codec")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Looks up what a pickle names, if that is allowed."""
        if (module, name) == ("_codecs", "encode"):
            return _as_bytes
        if (module, name) not in ALLOWED:
            raise RewardError(
                f"pickle: expected containers, numbers and arrays; received {module}.{name}"
            )
        # Pickles of NumPy 1 are read by NumPy 2, where the old names warn.
        present = module.replace("numpy.core", "numpy._core")
        return super().find_class(present, name)

    def persistent_load(self, pid: Any) -> Any:
        """Refuses references to objects outside the pickle."""
        raise RewardError(
            "pickle: expected containers, numbers and arrays; received a persistent id"
        )


def load_plain(data: bytes) -> Any:
    """The value in a pickle of plain containers, numbers and arrays.

    Raises:
      RewardError: it names anything else, or is damaged.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except RewardError:
        raise
    # A damaged pickle may raise nearly anything, as its bytes are a program.
    except Exception as error:
        raise RewardError(
            f"pickle: expected a whole one; received one that ends in {type(error).__name__}"
        ) from None
