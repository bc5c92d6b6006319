"""The loop over optimiser steps: records, evaluations, checkpoints and stops around them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from marble_jax import distributed
from marble_jax.compiling import compile_clock
from marble_jax.console import Clock, Console, duration
from marble_jax.errors import InputError, one_line
from marble_jax.prompts.groups import Draw
from marble_jax.rewards.base import RewardError
from marble_jax.training.guard import NotFinite
from marble_jax.training.iteration import Iteration
from marble_jax.training.profile import Profiler, phase
from marble_jax.training.rollout import Rollout
from marble_jax.training.state import TrainState
from marble_jax.training.step_line import WIDTH, step_line
from marble_jax.training.stops import Abandoned, Interrupted, StopRequests, stop_requests

_NAMED_SECONDS = 0.5
"""Of compiling in a step, from which on they are on record."""


class RecordError(InputError):
    """What a run writes down could not be written; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Optimiser steps after which a run is evaluated, saved and exported.

    Attributes:
      num_steps: optimiser steps of the run.
      evaluate_every: optimiser steps between evaluations; 0 for only before and after.
      checkpoint_every: optimiser steps between checkpoints.
      export_every: optimiser steps between exports; 0 for none.
      checkpoint_seconds: time since the last checkpoint after which the next step is saved, too; 0 for steps alone.
    """

    num_steps: int
    evaluate_every: int
    checkpoint_every: int
    export_every: int = 0
    checkpoint_seconds: float = 0.0

    def evaluates(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        if step in (0, self.num_steps):
            return True
        return self.evaluate_every > 0 and step % self.evaluate_every == 0

    def saves(self, step: int) -> bool:
        """Whether the state after `step` steps is saved."""
        return step == self.num_steps or step % self.checkpoint_every == 0

    def exports(self, step: int) -> bool:
        """Whether the state after `step` steps is exported."""
        if self.export_every == 0:
            return False
        return step == self.num_steps or step % self.export_every == 0


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls and does not know: the composition fills them in.

    Attributes:
      record: called with (step, flat record) after every optimiser step.
      evaluate: called with the state after a step that `Cadence.evaluates` and a function to be called now and then,
        which raises `Abandoned` when the run is to stop; returns the state.
      save: called with the state to save it.
      export: called with the state after a step that `Cadence.exports`.
      speed: figures that follow from a step's record, added to it.
      profiler: around every step.
      guard: called with the state after every step and its record; returns the state to go on from, which may be that
        of an earlier step.
      replace: called with a state whose step is saved already and whose best policy is a new one, to save that.
    """

    record: Callable[[int, dict[str, Any]], None]
    evaluate: Callable[[TrainState, Callable[[], None]], TrainState]
    save: Callable[[TrainState], None]
    export: Callable[[TrainState], None] = lambda state: None
    speed: Callable[[Mapping[str, Any]], dict[str, float]] = lambda record: {}
    profiler: Profiler = Profiler(range(0), "")
    guard: Callable[[TrainState, Mapping[str, Any]], TrainState] = lambda state, record: state
    replace: Callable[[TrainState], None] = lambda state: None


def train(
    state: TrainState, iteration: Iteration, cadence: Cadence, hooks: Hooks, console: Console
) -> TrainState:
    """Runs until `cadence.num_steps` optimiser steps are done.

    Args:
      state: where to start.
      iteration: what a step does.
      cadence: after which steps the run is evaluated, saved and exported.
      hooks: records, evaluations, checkpoints.
      console: the terminal.

    Raises:
      Interrupted: a signal came; the state was saved. What was still sampling images is given up, as a machine that
        is taken away leaves half a minute.
      RewardError: a reward failed and the run is not to go on without it; the state before the step was saved.
      NotFinite: too many gradients were not finite; the state was saved.
      RecordError: the records cannot be written; the state was saved if it could be.
      InputError: the state is not finite; it was not saved.
    """
    with stop_requests() as stops:
        run = _Run(state, iteration, cadence, hooks, console, stops)
        with run.saved_on_failure():
            if cadence.evaluates(run.step):
                run.make_up()
            while run.step < cadence.num_steps and not stops.agreed():
                if not run.one_step():
                    break
            # A signal can come after the last check, or while a step is sampled.
            reason = stops.agreed()
            if reason:
                run.save_once()
    if reason:
        raise Interrupted(run.step, "" if distributed.is_single_process() else reason)
    return run.state


class _Run:
    """A run in progress: the latest state, the last step that was saved, and what is done around a step."""

    def __init__(
        self,
        state: TrainState,
        iteration: Iteration,
        cadence: Cadence,
        hooks: Hooks,
        console: Console,
        stops: StopRequests,
    ):
        self.state = state
        self._iteration, self._cadence, self._hooks = iteration, cadence, hooks
        self._console, self._stops = console, stops
        self._saved_step = self.step
        self._clock: Clock | None = None
        # Seconds of what is done between two steps, for the record of the next one.
        self._between: dict[str, float] = {}
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state.step)

    def one_step(self) -> bool:
        """Takes an optimiser step with everything around it; False when the run is to stop before it."""
        done = self.step + 1
        with self._hooks.profiler.step(done):
            record = self._trained_step()
        if record is None:
            return False
        self.state = self._hooks.guard(self.state, record)
        if self.step != done:
            # Rolled back to a checkpoint: that step is the one that is saved.
            self._saved_step = self.step
            return True
        if self._cadence.evaluates(done):
            self.evaluate()
        # A machine that is taken away may not last until the next check.
        if self._cadence.saves(done) or self._saves_by_time() or self._stops.agreed():
            self._save()
        if self._cadence.exports(done):
            self._hooks.export(self.state)
        return True

    def _trained_step(self) -> dict[str, Any] | None:
        """Rollout and update; returns the step's record, or None when the step was given up."""
        compiles = self._clock is None
        if self._clock is None:
            # Only now: the evaluation before the first step comes once.
            self._clock = Clock(self.step, self._cadence.num_steps)
            self._console.say("the first step compiles the programs of rollout and training")
        start, step = time.perf_counter(), self.step
        # What was compiled between the steps is not this one's.
        compile_clock.lap()
        samples = self._iteration.sampling.draw(self.state.seed, step)
        rollout = self._rolled_out(samples, compiles)
        if rollout is None:
            return None
        rollout_compiled = compile_clock.lap()
        updated = self._updated(samples, rollout, compiles)
        if updated is None:
            return None
        self.state, record = updated
        record["time/step_s"] = time.perf_counter() - start
        self._note_compiling(record, rollout_compiled, compile_clock.lap())
        record |= self._hooks.speed(record) | self._between
        self._between = {}
        self._record(step, record)
        left = self._clock.left(step + 1)
        names = rollout.scores.names
        width = None if self._console.verbose else WIDTH
        self._console.say(step_line(record, names, self._cadence.num_steps, left, width))
        return record

    def _note_compiling(
        self, record: dict[str, Any], rollout_seconds: float, train_seconds: float
    ) -> None:
        """Puts a step's seconds of compiling on record, says them, and leaves them out of the time left."""
        seconds = rollout_seconds + train_seconds
        # Small programs are made now and then; their seconds are those of the step.
        if seconds < _NAMED_SECONDS or self._clock is None:
            return
        record["time/compile_s"] = seconds
        self._clock.leave_out(seconds)
        self._console.say(
            f"compiled for {duration(seconds)} in step {self.step} (rollout {duration(rollout_seconds)}, training "
            f"{duration(train_seconds)})"
        )

    def _record(self, step: int, record: dict[str, Any]) -> None:
        """Puts a step on record.

        Raises:
          RecordError: the place of the records is full, or out of reach.
        """
        try:
            self._hooks.record(step, record)
        except (OSError, InputError) as error:
            raise RecordError(_disk_line("the record of a step", error)) from error

    def _rolled_out(self, samples: Draw, compiles: bool) -> Rollout | None:
        """Images and scores of the step; None when the run is to stop."""
        title = _title(self.step, "rollout", compiles)
        with phase("rollout"), self._console.watched(len(samples.prompts), title, "sample") as bar:
            progress = partial(self._sampled, bar)
            try:
                return self._iteration.roll_out(self.state, samples, progress)
            except Abandoned:
                return None

    def _updated(
        self, samples: Draw, rollout: Rollout, compiles: bool
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """State after the step and its record; None when the run is to stop, with the state as it was."""
        title = _title(self.step, "training", compiles)
        with self._console.watched(0, title, "micro-batch") as bar:
            watch = partial(self._trained, bar)
            alive = partial(bar.update, 0)
            try:
                return self._iteration.update(self.state, samples, rollout, watch, alive)
            except Abandoned:
                return None

    def _trained(self, bar: Any, done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        # Between groups of micro-batches, and while one is under way: the state before the step is still there.
        self._stops.give_way()

    def _sampled(self, bar: Any, count: int) -> None:
        bar.update(count)
        # Between batches of images, where a step can be given up without loss.
        self._stops.give_way()

    def make_up(self) -> None:
        """The evaluation of the state to start from: the first one, or one in which the run was stopped."""
        best = int(self.state.best_step)
        self.evaluate()
        # Steps give the state that is saved without its best policy no second chance: the evaluation is on record.
        if self.step > 0 and int(self.state.best_step) != best:
            self._hooks.replace(self.state)

    def evaluate(self) -> None:
        """An evaluation that is given up is made up for when the run goes on."""
        try:
            self.state = self._hooks.evaluate(self.state, self._stops.give_way)
        except Abandoned:
            return

    def save_once(self) -> None:
        """Saves the latest state unless it is saved."""
        if self.step != self._saved_step:
            self._save()

    def _save(self) -> None:
        start = time.perf_counter()
        self._hooks.save(self.state)
        # Writing goes on beside the next step; these are the seconds for which the run stands still.
        self._between["time/checkpoint_s"] = time.perf_counter() - start
        self._saved_step = self.step
        self._saved_at = time.monotonic()

    def _saves_by_time(self) -> bool:
        """Whether the last checkpoint is old; processes go by the clock of the first."""
        longest = self._cadence.checkpoint_seconds
        if longest == 0:
            return False
        return distributed.broadcast_from_first(
            "checkpoint", lambda: time.monotonic() - self._saved_at >= longest
        )

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Saves the latest state when rewards or numbers stop the run."""
        try:
            yield
        except OSError as error:
            line = _disk_line("what a run writes down", error)
            raise RecordError(f"{line}{self._save_before(error)}") from error
        except (RewardError, NotFinite, RecordError) as error:
            # Nothing has been learnt yet: there is no state worth a checkpoint.
            if self.step == 0:
                raise
            raise type(error)(f"{error}{self._save_before(error)}") from error

    def _save_before(self, error: Exception) -> str:
        """Saves the latest state before a run ends with an error; returns what is to be said of it."""
        try:
            self.save_once()
        except Exception as problem:  # where the disk is full, it may be so for the state as well
            return f"; not saved after step {self.step}: {one_line(problem, 200)}"
        return f"; saved after step {self.step}, the same command goes on from there"


def _title(step: int, part: str, compiles: bool) -> str:
    """What the bar of a part of a step is called."""
    title = f"step {step + 1} {part}"
    return f"{title} (compiling)" if compiles else title


def _disk_line(what: str, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"workdir: expected room for {what}; received {error.strerror or error}"
    return str(error)
