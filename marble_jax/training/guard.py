"""When numbers stop being numbers: how long a run puts up with it, and that they never reach a checkpoint.

A gradient that is not finite moves nothing (`update.finish`), so a state stays good through it. What is left to decide
is when to give up, and what then; and to notice a state that is not finite all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from marble_jax import tree
from marble_jax.errors import InputError
from marble_jax.streams import Stream, stream_key
from marble_jax.training.state import TrainState


class NotFinite(InputError):
    """Too many steps in a row without a finite gradient; the state is good. The message is one line."""


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Scalar bool: every number that training goes on from is finite. The best score is -inf before an evaluation."""
    return tree.all_finite(
        (
            state.current,
            state.old,
            state.ema,
            state.best,
            state.opt_state,
            state.alpha,
            state.balancer,
        )
    )


def fresh_stream(state: TrainState, number: int) -> TrainState:
    """The state with other prompts, noise and timesteps from here on; different for every `number` from 1."""

    def other(key: jax.Array) -> jax.Array:
        return jax.random.key_data(
            stream_key(jax.random.wrap_key_data(key), Stream.ROLLBACK, number)
        )

    return state.replace(key=jax.jit(other, out_shardings=state.key.sharding)(state.key))


class Guard:
    """Looks at every step's outcome.

    Args:
      policy: "skip" goes on for ever, "stop" ends the run, "rollback" goes back to the last good checkpoint.
      patience: steps in a row without a finite gradient before that, >= 1.
      max_rollbacks: after so many the run is stopped.
      rollback: called with what happened and the number of the rollback; returns the state to go on from.
    """

    def __init__(
        self,
        policy: str,
        patience: int,
        max_rollbacks: int,
        rollback: Callable[[str, int], TrainState],
    ):
        self._policy, self._patience, self._max_rollbacks = policy, patience, max_rollbacks
        self._rollback, self._row, self._rollbacks = rollback, 0, 0

    def __call__(self, state: TrainState, record: Mapping[str, Any]) -> TrainState:
        """The state to go on from: `state`, or that of an earlier step.

        Raises:
          NotFinite: enough; `state` is good.
          InputError: `state` is not.
        """
        good = bool(all_finite(state))
        self._row = 0 if good and not record["training/skipped"] else self._row + 1
        if good and (self._policy == "skip" or self._row < self._patience):
            return state
        what = (
            f"no finite gradient in {self._row} step(s) in a row"
            if good
            else "a state with numbers that are not"
        )
        what += f" after step {int(state.step)}"
        if self._policy == "rollback" and self._rollbacks < self._max_rollbacks:
            self._rollbacks, self._row = self._rollbacks + 1, 0
            return self._rollback(what, self._rollbacks)
        what += f" and {self._rollbacks} rollback(s)" if self._rollbacks else ""
        if good:
            raise NotFinite(f"training: expected finite numbers; received {what}")
        raise InputError(
            f"training: expected finite numbers; received {what}; it was not saved, the same command goes "
            "on from the newest checkpoint"
        )
