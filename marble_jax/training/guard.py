"""Numbers that are not finite: how long a run puts up with them, and that they never reach a checkpoint.

A gradient that is not finite moves nothing (`policy_update.apply_update`), so a state stays good through it. What is
left to decide is when to give up, and what then; and to notice a state that is not finite all the same.
"""

from __future__ import annotations

import dataclasses
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
    policies = state.current, state.rollout, state.ema, state.best
    return tree.all_finite((*policies, state.opt_state, state.alpha, state.balancer))


def fresh_stream(state: TrainState, number: int) -> TrainState:
    """The state with other prompts, noise and timesteps from here on; different for every `number` from 1."""

    def rekeyed(data: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(data)
        return jax.random.key_data(stream_key(key, Stream.ROLLBACK, number))

    # Placed like the key it replaces: an array that lies elsewhere would have the steps compiled anew.
    return dataclasses.replace(
        state, key=jax.jit(rekeyed, out_shardings=state.key.sharding)(state.key)
    )


class Guard:
    """Checks the outcome of every step.

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
        self._rollback = rollback
        self._bad_in_a_row = self._num_rollbacks = 0

    def __call__(self, state: TrainState, record: Mapping[str, Any]) -> TrainState:
        """The state to go on from: `state`, or that of an earlier step.

        Raises:
          NotFinite: enough; `state` is good.
          InputError: `state` is not.
        """
        # A skipped update keeps the state good; that it did is checked all the same before it may be saved.
        good = bool(all_finite(state))
        self._bad_in_a_row += 1
        if good and not record["training/skipped"]:
            self._bad_in_a_row = 0
        if good and self._puts_up():
            return state
        problem = "a state with numbers that are not"
        if good:
            problem = f"no finite gradient in {self._bad_in_a_row} step(s) in a row"
        problem += f" after step {int(state.step)}"
        if self._policy == "rollback" and self._num_rollbacks < self._max_rollbacks:
            # The checkpoint is older than the bad steps, so patience starts anew.
            self._num_rollbacks += 1
            self._bad_in_a_row = 0
            return self._rollback(problem, self._num_rollbacks)
        if self._num_rollbacks:
            problem += f" and {self._num_rollbacks} rollback(s)"
        if good:
            raise NotFinite(f"training: expected finite numbers; received {problem}")
        raise InputError(
            f"training: expected finite numbers; received {problem}; it was not saved, the same command goes "
            "on from the newest checkpoint"
        )

    def _puts_up(self) -> bool:
        return self._policy == "skip" or self._bad_in_a_row < self._patience
