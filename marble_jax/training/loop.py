"""The loop over optimiser steps: records, evaluations, checkpoints and stops around them."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from marble_jax import distributed
from marble_jax.console import Clock, Console
from marble_jax.prompts.groups import Draw
from marble_jax.rewards.base import RewardError
from marble_jax.training.guard import NotFinite
from marble_jax.training.iteration import Turn
from marble_jax.training.profile import Profiler, phase
from marble_jax.training.rollout import Rollout
from marble_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When what happens.

    Attributes:
      num_steps: optimiser steps of the run.
      evaluate_every: optimiser steps between evaluations; 0 for only before and after.
      checkpoint_every: optimiser steps between checkpoints.
      export_every: optimiser steps between exports; 0 for none.
    """

    num_steps: int
    evaluate_every: int
    checkpoint_every: int
    export_every: int = 0

    def evaluates(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        return step in (0, self.num_steps) or bool(
            self.evaluate_every and step % self.evaluate_every == 0
        )

    def saves(self, step: int) -> bool:
        """Whether the state after `step` steps is saved."""
        return step == self.num_steps or step % self.checkpoint_every == 0

    def exports(self, step: int) -> bool:
        """Whether the state after `step` steps is exported."""
        return self.export_every > 0 and (step == self.num_steps or step % self.export_every == 0)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls and does not know: the composition fills them in.

    Attributes:
      record: called with (step, flat record) after every optimiser step.
      evaluate: called with the state after a step that `Schedule.evaluates` and a function to be called now and then,
        which raises `Abandoned` when the run is to stop; returns the state.
      save: called with the state to save it.
      export: called with the state after a step that `Schedule.exports`.
      speed: figures that follow from a step's record, added to it.
      profiler: around every step.
      guard: called with the state after every step and its record; returns the state to go on from, which may be that
        of an earlier step.
    """

    record: Callable[[int, dict[str, Any]], None]
    evaluate: Callable[[TrainState, Callable[[], None]], TrainState]
    save: Callable[[TrainState], None]
    export: Callable[[TrainState], None] = lambda state: None
    speed: Callable[[Mapping[str, Any]], dict[str, float]] = lambda record: {}
    profiler: Profiler = Profiler(range(0), "")
    guard: Callable[[TrainState, Mapping[str, Any]], TrainState] = lambda state, record: state


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM or Ctrl-C, on any process) and its state is saved."""

    def __init__(self, step: int, where: str = ""):
        super().__init__(
            f"stopped after step {step}{where and f' ({where})'}; the same command goes on from here"
        )
        self.step = step


class Abandoned(Exception):
    """A step or an evaluation was given up while its images were sampled, because the run is to stop."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT into a list instead of dying from them; a second one does."""
    received: list[int] = []
    before = {}

    def handler(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def saved_on_failure(
    latest: Callable[[], tuple[TrainState, int]], save: Callable[[TrainState], None]
) -> Iterator[None]:
    """Saves the latest state when rewards or numbers stop the run; `latest` gives it and the step that was saved last."""
    try:
        yield
    except (RewardError, NotFinite) as error:
        state, saved = latest()
        step = int(state.step)
        if step == 0:
            raise
        if step != saved:
            save(state)
        raise type(error)(
            f"{error}; saved after step {step}, the same command goes on from there"
        ) from error


def train(
    state: TrainState, turn: Turn, schedule: Schedule, hooks: Hooks, console: Console
) -> TrainState:
    """Runs until `schedule.num_steps` optimiser steps are done.

    Args:
      state: where to start.
      turn: what a step does.
      schedule: when what happens around the steps.
      hooks: records, evaluations, checkpoints.
      console: the terminal.

    Raises:
      Interrupted: a signal came; the state was saved. What was still sampling images is given up, as a machine that
        is taken away leaves half a minute.
      RewardError: a reward failed and the run is not to go on without it; the state before the step was saved.
      NotFinite: too many gradients were not finite; the state was saved.
      InputError: the state is not finite; it was not saved.
    """

    def stopping() -> str:
        """Whether to stop, as all processes agree: the signal, with the process that received it if there are several."""
        return distributed.any_process(
            "stop", ", ".join(signal.Signals(number).name for number in stops)
        )

    def give_way() -> None:
        if stopping():
            raise Abandoned

    def evaluated(state: TrainState, done: int) -> TrainState:
        """One that is given up is made up for when the run goes on, but not after the last step."""
        try:
            return hooks.evaluate(state, give_way if done < schedule.num_steps else lambda: None)
        except Abandoned:
            return state

    def rolled_out(state: TrainState, samples: Draw) -> Rollout | None:
        """None when the run is to stop."""

        def progress(count: int) -> None:
            bar.update(count)
            give_way()

        what = f"step {int(state.step) + 1} rollout"
        with phase("rollout"), console.bar(len(samples.prompts), what, "img") as bar:
            try:
                return turn.roll_out(state, samples, progress)
            except Abandoned:
                return None

    first = saved = int(state.step)
    clock = Clock(first, schedule.num_steps)
    with stop_requests() as stops, saved_on_failure(lambda: (state, saved), hooks.save):
        if schedule.evaluates(first) and first == 0:
            state = evaluated(state, first)
        while (step := int(state.step)) < schedule.num_steps and not stopping():
            done = step + 1
            with hooks.profiler.step(done):
                start = time.perf_counter()
                samples = turn.sampling.draw(state.seed, step)
                rollout = rolled_out(state, samples)
                if rollout is None:
                    break
                state, record = turn.update(state, samples, rollout)
                record["time/step_s"] = time.perf_counter() - start
                record |= hooks.speed(record)
                hooks.record(step, record)
                console.say(
                    step_line(record, rollout.scores.names, schedule.num_steps, clock.left(done))
                )
            state = hooks.guard(state, record)
            if int(state.step) != done:
                saved = int(state.step)
                continue
            if schedule.evaluates(done):
                state = evaluated(state, done)
            if schedule.saves(done) or stopping():
                hooks.save(state)
                saved = done
            if schedule.exports(done):
                hooks.export(state)
        # A signal can come after that last check, or while a step is sampled.
        where = stopping()
        if where and saved != int(state.step):
            hooks.save(state)
    if where:
        raise Interrupted(int(state.step), "" if distributed.is_single_process() else where)
    return state


def step_line(record: Mapping[str, Any], names: tuple[str, ...], total: int, left: str) -> str:
    """One line a step: scores of the rollouts, gradient norm, worst cosine, seconds, time left."""
    scores = " ".join(f"{n} {record[f'rollout/score_mean/{n}']:.3f}" for n in names)
    cosine = (
        f" worst cos {record['harmonize/worst_cos']:+.2f}"
        if "harmonize/worst_cos" in record
        else ""
    )
    lost = {n: record[f"rollout/failed_count/{n}"] for n in names}
    failed = "".join(f"  {n} failed {count}" for n, count in lost.items() if count)
    failed += "  update skipped, not finite" if record["training/skipped"] else ""
    speed = f"{record['speed/images_per_s']:.3g} img/s " if "speed/images_per_s" in record else ""
    if "speed/train_tflops_per_device" in record:
        speed += f"train {record['speed/train_tflops_per_device']:.3g} TFLOP/s a device "
    if "speed/train_mfu" in record:
        speed += f"(MFU {record['speed/train_mfu']:.0%}) "
    return (
        f"step {record['step'] + 1}/{total}  {scores}{failed}  |g| {record['training/grad_norm']:.3f}{cosine}  "
        f"{record['time/step_s']:.1f}s (rollout {record['time/rollout_s']:.1f} train {record['time/train_s']:.1f}) "
        f"{speed}{left} left"
    )
