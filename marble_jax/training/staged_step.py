"""An optimiser step in stages: loops over its micro-batches, one after the other, then the update that they lead to.

Called as a function, a staged step is one program from beginning to end, which is what `plan` compiles. A run drives
the stages from the host (`training.grouped_step`), in groups of micro-batches between which it can stop. Sums are
taken in the same order either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from marble_jax.training.micro_batches import RolloutBatch, sum_over
from marble_jax.training.policy_update import Metrics
from marble_jax.training.state import TrainState
from marble_jax.types import Params

Context = Any
"""What the stages of a step share: its micro-batches, and what follows from the state before the step."""

Carry = Any
"""Pytree of what a loop has come to so far, such as sums of gradients."""

Earlier = tuple[Carry, ...]
"""What the loops before a stage have come to."""

Bounds = tuple[int | jax.Array, int | jax.Array]
"""First place in a loop's order and the one behind its last."""


@runtime_checkable
class Loop(Protocol):
    """A loop over micro-batches."""

    @property
    def per_device(self) -> Any:
        """Bools, a prefix of the carry's tree: which leaves have a leading axis of devices (`Shards.map_shards`)."""
        ...

    def bounds(self, context: Context) -> Bounds:
        """Places of the loop's turns; arrays where the state decides how many there are."""
        ...

    def start(self, context: Context) -> Carry:
        """The carry before the first turn."""
        ...

    def turns(self, context: Context, earlier: Earlier, carry: Carry, bounds: Bounds) -> Carry:
        """The carry after the turns at some places, which may be traced."""
        ...

    def whole(self, context: Context, earlier: Earlier) -> Carry:
        """The carry after all turns, in one loop of one program."""
        ...


@dataclasses.dataclass(frozen=True)
class SumLoop:
    """A loop that adds up what every micro-batch gives.

    Attributes:
      order: micro-batches of the step, int32 [m]; the loop takes some neighbours among them.
      places: see `Loop.bounds`.
      part: of the context and earlier carries, the function from a micro-batch's index to a pytree that is added up.
      per_device: see `Loop.per_device`.
      zeros: of the context, the sums before the first turn; None where `part` has to be traced to know them.
    """

    order: Callable[[Context], jax.Array]
    places: Callable[[Context], Bounds]
    part: Callable[[Context, Earlier], Callable[[jax.Array], Any]]
    per_device: Any = True
    zeros: Callable[[Context], Carry] | None = None

    def bounds(self, context: Context) -> Bounds:
        """See `Loop.bounds`."""
        return self.places(context)

    def start(self, context: Context) -> Carry:
        """See `Loop.start`."""
        if self.zeros is not None:
            return self.zeros(context)
        # What earlier loops came to decides no shapes.
        shapes = jax.eval_shape(self.part(context, ()), jnp.zeros((), jnp.int32))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def turns(self, context: Context, earlier: Earlier, carry: Carry, bounds: Bounds) -> Carry:
        """See `Loop.turns`."""
        part, order = self.part(context, earlier), self.order(context)

        def turn(place: jax.Array, sums: Carry) -> Carry:
            return jax.tree.map(jnp.add, sums, part(order[place]))

        return jax.lax.fori_loop(*bounds, turn, carry)

    def whole(self, context: Context, earlier: Earlier) -> Carry:
        """See `Loop.whole`."""
        part, order = self.part(context, earlier), self.order(context)
        first, last = self.bounds(context)
        if isinstance(first, int) and isinstance(last, int):
            return sum_over(part, order[first:last])
        return sum_over(part, order, (first, last))


@dataclasses.dataclass(frozen=True, eq=False)
class StagedStep:
    """One optimiser step.

    Attributes:
      open: of state, base weights and rollouts, what the stages share; computed anew in every program.
      count: of the rollouts, how many micro-batches they make: a matter of shapes.
      loops: of the number of micro-batches, the loops in their order.
      finish: of the context and all carries, the state after the step and its numbers.
    """

    open: Callable[[TrainState, Params, RolloutBatch], Context]
    count: Callable[[RolloutBatch], int]
    loops: Callable[[int], tuple[Loop, ...]]
    finish: Callable[[Context, Earlier], tuple[TrainState, Metrics]]

    def __call__(
        self, state: TrainState, params: Params, batch: RolloutBatch
    ) -> tuple[TrainState, Metrics]:
        """The whole step; see `policy_update.Step`."""
        context = self.open(state, params, batch)
        carries: Earlier = ()
        for loop in self.loops(self.count(batch)):
            carries += (loop.whole(context, carries),)
        return self.finish(context, carries)
