"""Checkpoints of any pytree with Orbax: asynchronous, atomic, the newest complete one restored.

A checkpoint becomes visible only when it is complete (Orbax renames it), so a run killed at any moment resumes from
its last complete one. Restoring goes onto the caller's own arrays: their shapes, dtypes and shardings, not those of the
machine that saved.
"""
from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from marble_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one run.

    Args:
      path: directory; made when the first checkpoint is saved.
      keep: number of checkpoints kept, >= 1.
    """

    def __init__(self, path: epath.PathLike, keep: int = 3):
        if keep < 1:
            raise InputError(f"checkpoints.keep: expected at least 1; received {keep}")
        self._path = epath.Path(path).resolve() if "://" not in str(path) else epath.Path(path)
        self._manager = ocp.CheckpointManager(
            self._path, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Saves in the background; a step that is there already is left alone."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, state: Any, step: int | None = None) -> tuple[int, Any]:
        """The state saved at `step` (newest if None), placed like `state` (arrays or `jax.ShapeDtypeStruct`s).

        Raises:
          InputError: there is no such checkpoint, or its tree or shapes are not those of `state`.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise InputError(f"checkpoint: expected one of {list(self._manager.all_steps()) or 'none saved yet'} in "
                             f"{self._path}; received {step}")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            return step, self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise InputError(f"checkpoint {self._path}/{step}: expected the state of this configuration; received "
                             f"another one ({reason[0] if reason else type(error).__name__})") from error

    def wait(self) -> None:
        """Blocks until everything saved so far is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
