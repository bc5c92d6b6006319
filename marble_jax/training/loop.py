"""The loop: rollout, scores, advantages, update; records, evaluations and checkpoints around it."""
from __future__ import annotations

import dataclasses
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax import adapters, hosts
from marble_jax.advantages import Advantages, gdpo, per_reward, weighted_sum
from marble_jax.console import Clock, Console
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.groups import Draw, draw
from marble_jax.rewards.base import RewardError
from marble_jax.training.batch import Collector, Rollout
from marble_jax.training.guard import NotFinite
from marble_jax.training.microsteps import RolloutBatch
from marble_jax.training.presence import Presence
from marble_jax.training.profile import Profiler, phase
from marble_jax.training.records import flat_metrics, score_metrics
from marble_jax.training.state import TrainState
from marble_jax.training.steps import Steps
from marble_jax.types import Params, Scores


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
        return step in (0, self.num_steps) or bool(self.evaluate_every and step % self.evaluate_every == 0)

    def saves(self, step: int) -> bool:
        """Whether the state after `step` steps is saved."""
        return step == self.num_steps or step % self.checkpoint_every == 0

    def exports(self, step: int) -> bool:
        """Whether the state after `step` steps is exported."""
        return self.export_every > 0 and (step == self.num_steps or step % self.export_every == 0)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which prompts a step draws and how their scores become advantages."""

    prompts: Mapping[str, list[Prompt]]
    prompts_per_step: int
    images_per_prompt: int
    scale: str
    scalarise: str
    reward_weights: tuple[float, ...]
    presence: Presence = Presence()

    def prompts_of(self, step: int) -> Mapping[str, list[Prompt]]:
        """The prompts a step draws from, by source."""
        sources = self.presence.sources(step)
        return {name: self.prompts[name] for name in sources} if sources else self.prompts

    def draw(self, seed: int, step: int) -> Draw:
        """The samples of a step."""
        return draw(self.prompts_of(step), seed, step, self.prompts_per_step, self.images_per_prompt)


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
        super().__init__(f"stopped after step {step}{where and f' ({where})'}; the same command goes on from here")
        self.step = step


class Abandoned(Exception):
    """A step or an evaluation was given up while its pictures were sampled, because the run is to stop."""


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
def saved_on_failure(latest: Callable[[], tuple[TrainState, int]], save: Callable[[TrainState], None]
                     ) -> Iterator[None]:
    """Saves the latest state when rewards or numbers stop the run; `latest` gives it and the step that was saved last.
    """
    try:
        yield
    except (RewardError, NotFinite) as error:
        state, saved = latest()
        step = int(state.step)
        if step == 0:
            raise
        if step != saved:
            save(state)
        raise type(error)(f"{error}; saved after step {step}, the same command goes on from there") from error


def advantages_of(scores: Scores, groups: np.ndarray, sampling: Sampling, mask: np.ndarray | None = None
                  ) -> tuple[Advantages, np.ndarray, np.ndarray]:
    """Per-reward advantages, and the objective's rows [R, N] with their mask: one more when scalarised.

    Args:
      scores: of the K rewards.
      groups: [N] labels.
      sampling: how scores become advantages.
      mask: bool [K, N] valid scores that are trained on; all when None. It cuts the rows that are trained on: the
        rewards', or when scalarised the last one. The rewards' rows then stay whole, to show what the update does to
        every reward.
    """
    each = per_reward(scores.values, scores.valid, groups, sampling.scale)
    mask = scores.valid if mask is None else mask
    if sampling.scalarise == "none":
        return each, np.where(mask, each.values, 0), each.valid & mask
    weights = np.asarray(sampling.reward_weights) if sampling.reward_weights else None
    if sampling.scalarise == "gdpo":
        one = gdpo(scores.values, mask, groups, weights)
    else:
        one = per_reward(*weighted_sum(scores.values, mask, weights), groups, sampling.scale)
    return (each, np.concatenate([each.values, np.atleast_2d(one.values)]),
            np.concatenate([each.valid, np.atleast_2d(one.valid)]))


def train(state: TrainState, params: Params, collector: Collector, steps: Steps, sampling: Sampling,
          schedule: Schedule, hooks: Hooks, console: Console, lora_scale: float, merge: bool,
          place: Callable[[Any], Any]) -> TrainState:
    """Runs until `schedule.num_steps` optimiser steps are done.

    Args:
      state: where to start.
      params: base weights.
      collector: samples and scores.
      steps: the compiled optimiser steps.
      sampling: prompts and advantages.
      schedule: when what happens.
      hooks: records, evaluations, checkpoints.
      console: the terminal.
      lora_scale: alpha / rank.
      merge: fold the rollout policy's adapter into a copy of the weights before sampling. Faster; exact up to
        rounding in the weights' dtype, so meant for float32.
      place: puts a tree on every device.

    Raises:
      Interrupted: a signal came; the state was saved. What was still sampling pictures is given up, as a machine that
        is taken away leaves half a minute.
      RewardError: a reward failed and the run is not to go on without it; the state before the step was saved.
      NotFinite: too many gradients were not finite; the state was saved.
      InputError: the state is not finite; it was not saved.
    """
    def stopping() -> str:
        """Whether to stop, as all processes agree: the signal, with the process that received it if there are several.
        """
        return hosts.any_of("stop", ", ".join(signal.Signals(number).name for number in stops))

    def give_way() -> None:
        if stopping():
            raise Abandoned

    def evaluated(state: TrainState, done: int) -> TrainState:
        """One that is given up is made up for when the run goes on, but not after the last step."""
        try:
            return hooks.evaluate(state, give_way if done < schedule.num_steps else lambda: None)
        except Abandoned:
            return state

    def collected(bar: Any, *arguments: Any) -> Rollout | None:
        def progress(count: int) -> None:
            bar.update(count)
            give_way()

        try:
            return collector(*arguments, progress)
        except Abandoned:
            return None

    merged = jax.jit(lambda params, adapter: adapters.merge(params, adapter, lora_scale))
    first = saved = int(state.step)
    clock = Clock(first, schedule.num_steps)
    with stop_requests() as stops, saved_on_failure(lambda: (state, saved), hooks.save):
        if schedule.evaluates(first) and first == 0:
            state = evaluated(state, first)
        while (step := int(state.step)) < schedule.num_steps and not stopping():
            with hooks.profiler.step(step + 1):
                start = time.perf_counter()
                seed = state.seed
                samples = sampling.draw(seed, step)
                key = jax.random.wrap_key_data(jnp.asarray(hosts.whole(state.key)))
                key = jax.random.fold_in(jax.random.fold_in(key, step), 1)
                weights, adapter = (merged(params, state.old), None) if merge else (params, state.old)
                with phase("rollout"), console.bar(len(samples.prompts), f"step {step + 1} rollout", "img") as bar:
                    rollout = collected(bar, weights, adapter, samples, key)
                if rollout is None:
                    break
                del weights
                names, scored = rollout.scores.names, rollout.scores.valid
                mask = sampling.presence.mask(names, scored, seed, step)
                each, rows, valid = advantages_of(rollout.scores, samples.groups, sampling, mask)
                checksum = zlib.crc32(rows.tobytes() + valid.tobytes())
                hosts.same(f"advantages of step {step + 1}, ", {"checksum": checksum})
                batch = RolloutBatch(rollout.x0, *place((jnp.asarray(rollout.prompt), rollout.cond, jnp.asarray(rows),
                                                         jnp.asarray(valid))))
                trained = time.perf_counter()
                age = steps.every if sampling.presence.begins(step) else int(state.alpha.age)
                program = steps.due(bool(state.alpha.solved), age)
                with phase("train"):
                    state, metrics = program(state, params, batch)
                    trained_on = flat_metrics(metrics, names)
                record = {"step": step, "time": time.time()} | score_metrics(rollout.scores, each)
                record |= sampling.presence.metrics(names, scored, mask)
                record |= {f"rollout/{k}": v for k, v in rollout.health.items()} | trained_on
                end = time.perf_counter()
                record |= {f"time/{k}_s": v for k, v in rollout.seconds.items()}
                record |= {"time/train_s": end - trained, "time/step_s": end - start}
                record |= hooks.speed(record)
                hooks.record(step, record)
                console.say(step_line(record, names, schedule.num_steps, clock.left(step + 1)))
            done = step + 1
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
        raise Interrupted(int(state.step), "" if hosts.alone() else where)
    return state


def step_line(record: Mapping[str, Any], names: tuple[str, ...], total: int, left: str) -> str:
    """One line a step: scores of the rollouts, gradient norm, worst cosine, seconds, time left."""
    scores = " ".join(f"{n} {record[f'rollout/score_mean/{n}']:.3f}" for n in names)
    cosine = f" worst cos {record['harmonize/worst_cos']:+.2f}" if "harmonize/worst_cos" in record else ""
    lost = {n: record[f"rollout/failed_count/{n}"] for n in names}
    failed = "".join(f"  {n} failed {count}" for n, count in lost.items() if count)
    failed += "  update skipped, not finite" if record["training/skipped"] else ""
    speed = f"{record['speed/pictures_per_s']:.3g} img/s " if "speed/pictures_per_s" in record else ""
    if "speed/train_tflops_per_device" in record:
        speed += f"train {record['speed/train_tflops_per_device']:.3g} TFLOP/s a device "
    if "speed/train_mfu" in record:
        speed += f"(MFU {record['speed/train_mfu']:.0%}) "
    return (f"step {record['step'] + 1}/{total}  {scores}{failed}  |g| {record['training/grad_norm']:.3f}{cosine}  "
            f"{record['time/step_s']:.1f}s (rollout {record['time/rollout_s']:.1f} train {record['time/train_s']:.1f}) "
            f"{speed}{left} left")
