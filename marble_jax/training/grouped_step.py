"""An optimiser step driven from the host: groups of micro-batches, between which a run can stop, then the update.

A group is a call of a compiled loop that takes the sums so far and overwrites them. The state is given away to the last
call alone, which is compiled before, so that a step which is given up leaves it as it was. How many micro-batches make
a group follows from the time that the last ones took and is the same on all hosts; sums do not depend on it, as they
are taken one micro-batch after the other.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from marble_jax import distributed
from marble_jax.distributed import device_mesh
from marble_jax.distributed.device_mesh import Shards
from marble_jax.distributed.waiting import call_beside, wait_for
from marble_jax.training.ahead_of_time import AheadOfTime
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.policy_update import Metrics
from marble_jax.training.several_updates import (
    first_figures,
    several_updates,
    update_key,
    update_part,
)
from marble_jax.training.staged_step import Bounds, Carry, Earlier, Loop, StagedStep
from marble_jax.training.state import TrainState
from marble_jax.types import Params

GROUP_SECONDS = 5.0
"""Time that a group of micro-batches is meant to take; one that takes longer is a group by itself."""

Watch = Callable[[int, int], None]
"""watch(micro-batches done, of the step): called after every group and now and then while one is waited for. What it
raises gives the step up."""


Alive = Callable[[], object]
"""alive(): called now and then while a call is waited for that overwrites the state, so it must not raise."""


def unwatched(done: int, total: int) -> None:
    """Watches nothing."""


def unheard() -> None:
    """Takes no note of a sign of life."""


class GroupSize:
    """How many micro-batches make the next group of a loop."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._groups = 0

    def next(self, left: int) -> int:
        """Micro-batches of the next group, at most those that are left; the same on all hosts.

        The first group compiles and the second is timed, with one micro-batch each.
        """
        size = 1
        if self._seconds > 0:
            size = max(1, int(GROUP_SECONDS / self._seconds))
        if not distributed.is_single_process():
            # Hosts that ran loops of different lengths would wait for each other.
            size = distributed.broadcast_from_first("group of micro-batches", lambda: size)
        return min(size, left)

    def took(self, count: int, seconds: float) -> None:
        """Takes note of a group's time."""
        self._groups += 1
        if self._groups > 1:
            self._seconds = seconds / count


@dataclasses.dataclass
class _Progress:
    """Micro-batches of a step that are done, and who is to know.

    Attributes:
      watch: see `Watch`.
      done: so far.
      total: of the step.
    """

    watch: Watch
    done: int
    total: int

    def tell(self) -> None:
        """Calls the watch, whose exceptions go through."""
        self.watch(self.done, self.total)


class _Programs(NamedTuple):
    """Compiled programs of a step. All of them begin with (state, base weights, rollouts, number of the update).

    Attributes:
      start: the carries before the first turn of every loop, and the places of their turns, int32 [loops, 2].
      turns: of every loop, from (earlier carries, own carry, first place, last place) to the carry.
      hold: from all carries to the state after an update that is followed by another one from the same rollouts.
      finish: the same after the last update; overwrites the state.
    """

    start: Any
    turns: tuple[Any, ...]
    hold: AheadOfTime
    finish: AheadOfTime


class GroupedStep:
    """One optimiser step in groups of micro-batches; a `policy_update.Step` that can be watched.

    Args:
      last: the update after which the rollout policy follows.
      before: the update where another one from the same rollouts follows; alike but for how it finishes.
      updates: updates that share a rollout.
      shards: the devices that share the samples of a micro-batch.
      reports: the objective's `first_reports`.
    """

    def __init__(
        self,
        last: StagedStep,
        before: StagedStep,
        updates: int,
        shards: Shards,
        reports: Sequence[str] = (),
    ):
        self._last, self._before, self._updates = last, before, updates
        self._reports = reports
        self._mesh = shards.mesh
        self._sizes: dict[int, GroupSize] = {}
        self._programs: dict[int, _Programs] = {}

    def __call__(
        self,
        state: TrainState,
        params: Params,
        batch: RolloutBatch,
        watch: Watch = unwatched,
        alive: Alive = unheard,
    ) -> tuple[TrainState, Metrics]:
        """The state after the step, in place of `state`, and its numbers.

        Args:
          state: before the step; as it was where `watch` raises.
          params: base weights.
          batch: rollouts.
          watch: see `Watch`.
          alive: see `Alive`.
        """
        first: Metrics = {}
        count = self._count(batch)
        programs = self._programs_of(count)
        progress = _Progress(watch, 0, self._updates * count)
        for update in range(self._updates):
            of_step = (state, params, batch, np.int32(update))
            carries = self._sums(programs, of_step, progress)
            is_last = update == self._updates - 1
            end = programs.finish if is_last else programs.hold
            # Compiling may take longer than a machine that is taken away lasts: it can be given up, the call cannot.
            compiled = call_beside(partial(end.compiled_for, *of_step, carries), poll=progress.tell)
            # Before the last update the state that the step began with is still there.
            poll = alive if is_last else progress.tell
            state, metrics = call_beside(partial(compiled, *of_step, carries), poll)
            wait_for(metrics, poll)
            if update == 0 and self._updates > 1:
                first = first_figures(metrics, self._reports)
        return state, metrics | first

    def trace(self, state: Any, params: Any, batch: Any) -> Any:
        """The whole step as one traced program, to compile ahead of time; arguments may be shapes."""
        return self._whole.trace(state, params, batch)

    @cached_property
    def _whole(self) -> Any:
        whole = several_updates(self._last, self._before, self._updates, self._reports)
        return jax.jit(_in_scope(whole), donate_argnums=0)

    @property
    def num_compiled(self) -> int:
        """Compilations of the programs that do the work: one for every loop and for every kind of update is enough."""
        return sum(
            sum(turns._cache_size() for turns in programs.turns)
            + programs.hold.num_compiled
            + programs.finish.num_compiled
            for programs in self._programs.values()
        )

    def _sums(
        self,
        programs: _Programs,
        of_step: tuple[TrainState, Params, RolloutBatch, np.int32],
        progress: _Progress,
    ) -> Earlier:
        """Runs the loops of an update, group by group; their carries."""
        progress.tell()
        # The first call of a program compiles, and on a CPU a call may return no sooner than it is done.
        starts, places = call_beside(partial(programs.start, *of_step), poll=progress.tell)
        carries: Earlier = ()
        for number, turns in enumerate(programs.turns):
            first, end = np.asarray(places[number]).tolist()
            size = self._sizes.setdefault(number, GroupSize())
            # The list gives the carry up, so that the program may overwrite it.
            carry = _run_loop(
                partial(turns, *of_step, carries), starts.pop(0), first, end, size, progress
            )
            carries += (carry,)
        return carries

    def _count(self, batch: RolloutBatch) -> int:
        """Micro-batches of one update."""
        images = len(batch.prompt) // self._updates
        # Counting looks at the shape alone.
        shape: Any = jax.ShapeDtypeStruct((images,), jnp.int32)
        return self._last.count(dataclasses.replace(batch, prompt=shape))

    def _programs_of(self, count: int) -> _Programs:
        """The programs of a step whose updates have so many micro-batches."""
        if count in self._programs:
            return self._programs[count]
        loops = self._last.loops(count)
        whole = self._placed(False)
        per_loop = tuple(self._placed(loop.per_device) for loop in loops)
        programs = _Programs(
            start=_jitted(self._start(loops), (list(per_loop), whole)),
            turns=tuple(
                _jitted(self._turns(loop), placed, donate=5)
                for loop, placed in zip(loops, per_loop, strict=True)
            ),
            hold=AheadOfTime(_jitted(self._finish(self._before, False), whole)),
            finish=AheadOfTime(_jitted(self._finish(self._last, True), whole, donate=0)),
        )
        self._programs[count] = programs
        return programs

    def _placed(self, per_device: Any) -> Any:
        """Shardings of arrays with a leading axis of devices, and of those that every device has whole."""
        mesh = self._mesh
        if not isinstance(mesh, Mesh):
            return None

        def placed(split: bool) -> NamedSharding:
            return NamedSharding(mesh, device_mesh.BATCH if split else device_mesh.REPLICATED)

        if device_mesh.batch_shards(mesh) == 1:
            return placed(False)
        return jax.tree.map(placed, per_device)

    def _opened(
        self,
        step: StagedStep,
        state: TrainState,
        params: Params,
        batch: RolloutBatch,
        update: jax.Array,
    ) -> Any:
        """The context of an update."""
        if self._updates > 1:
            batch = update_part(batch, state.key, state.step, update, self._updates)
            state = dataclasses.replace(state, key=update_key(state.key, state.step, update))
        return step.open(state, params, batch)

    def _start(self, loops: tuple[Loop, ...]) -> Callable[..., Any]:
        def start(
            state: TrainState, params: Params, batch: RolloutBatch, update: jax.Array
        ) -> tuple[list[Carry], jax.Array]:
            context = self._opened(self._last, state, params, batch, update)
            places = [jnp.stack(_int32(loop.bounds(context))) for loop in loops]
            return [loop.start(context) for loop in loops], jnp.stack(places)

        return start

    def _turns(self, loop: Loop) -> Callable[..., Any]:
        def turns(
            state: TrainState,
            params: Params,
            batch: RolloutBatch,
            update: jax.Array,
            earlier: Earlier,
            carry: Carry,
            first: jax.Array,
            last: jax.Array,
        ) -> Carry:
            context = self._opened(self._last, state, params, batch, update)
            return loop.turns(context, earlier, carry, (first, last))

        return turns

    def _finish(self, step: StagedStep, is_last: bool) -> Callable[..., Any]:
        def finish(
            state: TrainState,
            params: Params,
            batch: RolloutBatch,
            update: jax.Array,
            carries: Earlier,
        ) -> tuple[TrainState, Metrics]:
            context = self._opened(step, state, params, batch, update)
            after, metrics = step.finish(context, carries)
            # All updates of a rollout are one step, with the run's own key.
            after = dataclasses.replace(after, key=state.key)
            if not is_last:
                after = dataclasses.replace(after, step=state.step)
            return after, metrics

        return finish


def _run_loop(
    turns: Callable[[Carry, np.int32, np.int32], Carry],
    carry: Carry,
    place: int,
    end: int,
    size: GroupSize,
    progress: _Progress,
) -> Carry:
    """Runs the turns of a loop from `place` to before `end`, group by group.

    Args:
      turns: from (carry, first place, last place) to the carry; overwrites the one that it is given.
      carry: before the first turn.
      place: of the first turn.
      end: the place behind the last.
      size: of the loop's groups.
      progress: of the step; told after every group and while one is waited for.
    """
    while place < end:
        taken = size.next(end - place)
        begun = time.perf_counter()
        call = partial(turns, carry, np.int32(place), np.int32(place + taken))
        carry = call_beside(call, progress.tell)
        wait_for(carry, progress.tell)
        size.took(taken, time.perf_counter() - begun)
        place += taken
        progress.done += taken
        progress.tell()
    return carry


def _int32(bounds: Bounds) -> list[jax.Array]:
    return [jnp.asarray(bound, jnp.int32) for bound in bounds]


def _in_scope(function: Callable[..., Any]) -> Callable[..., Any]:
    """The name of the phase on the devices' lines of a profiler trace, around a program."""

    def train(*arguments: Any) -> Any:
        with jax.named_scope("train"):
            return function(*arguments)

    return train


def _jitted(function: Callable[..., Any], placed: Any, donate: int | None = None) -> Any:
    options: dict[str, Any] = {}
    if placed is not None and not _is_unplaced(placed):
        options["out_shardings"] = placed
    if donate is not None:
        options["donate_argnums"] = donate
    # Arguments that a program does not use still decide where its results lie.
    return jax.jit(_in_scope(function), keep_unused=True, **options)


def _is_unplaced(placed: Any) -> bool:
    return not jax.tree.leaves(placed)
