"""Pickles of numbers, without the rest of the language: what older reward servers answer.

A pickle is a program that may import and call anything. Here it may build None, booleans, numbers, texts, bytes,
lists, tuples, dicts, sets and NumPy arrays, and everything else it names is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from marble_jax.rewards.base import RewardError

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((module, name) for module in _MULTIARRAY for name in ("_reconstruct", "scalar")),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
}
"""What NumPy's own pickles name."""


def _as_bytes(text: str, encoding: str) -> bytes:
    """What protocols before 3 write bytes as."""
    if encoding != "latin1":
        raise RewardError("pickle: expected containers, numbers and arrays; received a codec")
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _as_bytes
        if (module, name) not in ALLOWED:
            raise RewardError(
                f"pickle: expected containers, numbers and arrays; received {module}.{name}"
            )
        return super().find_class(
            module.replace("numpy.core", "numpy._core"), name
        )  # NumPy 1 and 2

    def persistent_load(self, pid: Any) -> Any:
        raise RewardError(
            "pickle: expected containers, numbers and arrays; received a persistent id"
        )


def load_plain(data: bytes) -> Any:
    """What a pickle of plain containers, numbers and arrays holds.

    Raises:
      RewardError: it names anything else, or is damaged.
    """
    try:
        return _Plain(io.BytesIO(data)).load()
    except RewardError:
        raise
    except Exception as error:  # damaged pickles raise many kinds
        raise RewardError(
            f"pickle: expected a whole one; received one that ends in {type(error).__name__}"
        ) from None
