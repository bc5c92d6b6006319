"""Programs that are compiled before they are called, so that compiling can be given up and a call is short."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax


class AheadOfTime:
    """A jitted program and what it was compiled to, once for every kind of arguments.

    Args:
      program: from `jax.jit`; donations and shardings are its own.
    """

    def __init__(self, program: Any):
        self._program = program
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def compiled_for(self, *arguments: Any) -> Callable[..., Any]:
        """Returns the executable for arguments like these, which are neither read nor overwritten.

        Args:
          *arguments: pytrees of arrays that lie where those of the call will.
        """
        kind = _kind(arguments)
        if kind not in self._compiled:
            self._compiled[kind] = self._program.lower(*arguments).compile()
        return self._compiled[kind]

    @property
    def num_compiled(self) -> int:
        """Kinds of arguments that it was compiled for."""
        return len(self._compiled)


def _kind(arguments: Any) -> Hashable:
    """Returns what an executable depends on: the tree, and every array's shape, dtype and place."""
    leaves, structure = jax.tree.flatten(arguments)
    # A number of the host has no place of its own.
    places = [getattr(leaf, "sharding", None) for leaf in leaves]
    types = [(leaf.shape, leaf.dtype) for leaf in leaves]
    return structure, tuple(types), tuple(places)
