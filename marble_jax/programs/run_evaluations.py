"""Evaluations of a training run: against the base model, on record, and the best averaged policy kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax import distributed
from marble_jax.compiling import compile_clock
from marble_jax.console import Console, duration
from marble_jax.evaluation.joint_rates import joint_rates, reward_sets
from marble_jax.evaluation.statistics import gains, raw_mean, standardised_gain, summary
from marble_jax.programs.base_scores import (
    BASE_SCORES,
    base_score_record,
    read_base_scores,
    scores_of,
)
from marble_jax.programs.build import Run
from marble_jax.programs.run_rewards import deciding_rewards
from marble_jax.storage.images import save_sample
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable import lora
from marble_jax.training.metric_writer import MetricWriter
from marble_jax.training.state import TrainState
from marble_jax.training.trackers import Shown
from marble_jax.types import Adapter, Params, Scores


class RunEvaluations:
    """Evaluates states, compares with the base model, records, and keeps the best averaged adapter.

    Args:
      run: whose policies are evaluated.
      workdir: where records go.
      console: the terminal.
      writer: where figures go besides.
    """

    def __init__(self, run: Run, workdir: Workdir, console: Console, writer: MetricWriter):
        self._run, self._workdir, self._console, self._writer = run, workdir, console, writer
        self._deciding = deciding_rewards(run.settings.rewards, run.settings.evaluation.best)
        self._by_raw_mean = run.settings.evaluation.best_by == "raw_mean"
        self._base: Scores | None = None
        # Seconds that the last evaluation compiled for; None before the first one.
        self._compiled: float | None = None

    def __call__(
        self, state: TrainState, give_way: Callable[[], None] = lambda: None
    ) -> TrainState:
        """Evaluates the averaged policy (the base model at step 0, which it equals).

        Args:
          state: to evaluate.
          give_way: called after every batch of images; what it raises comes through, and nothing is on record.
        """
        step = int(state.step)
        # All processes have to agree on what is left to do.
        recorded = dict(distributed.broadcast_from_first("evaluations", self._recorded_scores))
        base = self._base_scores(0 in recorded, give_way)
        if step == 0:
            return self._with_base_as_best(state, base)
        if step in recorded:
            return _with_better(state, recorded[step])
        scores, images, seconds = self._scores(state.ema, f"step {step} evaluation", give_way)
        gain = gains(scores, base, self._run.evaluator.groups)
        if self._by_raw_mean:
            score = raw_mean(scores, self._deciding)
        else:
            score = standardised_gain(scores, base, self._deciding)
        compared = {"gain": gain, "joint": self._joint(scores, base), "best_by": score}
        distributed.broadcast_from_first(
            "evaluation", lambda: self._write(step, "ema", scores, images, compared, seconds)
        )
        words = []
        for name in scores.names:
            words.append(f"{name} {gain[name]['mean']:+.3f}")
        num_prompts = len(self._run.evaluator.prompts)
        self._console.say(
            f"evaluation after step {step} ({num_prompts} held-out prompts, {self._took(seconds)}): "
            f"gain {' '.join(words)}"
        )
        return _with_better(state, score)

    def _with_base_as_best(self, state: TrainState, base: Scores) -> TrainState:
        """The state before the first step, its policy the best so far where raw scores decide, as upstream has it."""
        if not self._by_raw_mean or np.isfinite(float(state.best_score)):
            return state
        return _with_best(state, raw_mean(base, self._deciding))

    def _joint(self, scores: Scores, base: Scores) -> dict[str, Any]:
        """Shares of images above, and below, the base model's on all rewards at once, by set of rewards."""
        rates = {}
        for which, names in reward_sets(scores.names, self._run.settings.rewards.train).items():
            rates[which] = joint_rates(scores, base, names, self._run.evaluator.groups)
        return rates

    def _recorded_scores(self) -> list[tuple[int, float | None]]:
        """Steps of the evaluations that are on record, and what they decide the best policy by, where it is there."""
        recorded = []
        for record in self._workdir.read(self._workdir.evaluations):
            score = record.get("best_by")
            is_number = isinstance(score, int | float)
            recorded.append((record["step"], score if is_number else None))
        return recorded

    def _base_scores(self, on_record: bool, give_way: Callable[[], None]) -> Scores:
        """The base model's scores, evaluated once a run and read back on resume.

        Args:
          on_record: whether the evaluation is on record: a kill may come between it and the scores themselves.
          give_way: as in `__call__`.
        """
        if self._base is not None:
            return self._base
        file = self._workdir.path / BASE_SCORES
        saved = distributed.broadcast_from_first("base scores", lambda: read_base_scores(file))
        if saved is not None:
            self._base = scores_of(saved)
            return self._base
        scores, images, seconds = self._scores(None, "evaluation of the base model", give_way)

        def write() -> None:
            if not on_record:
                self._write(0, "base", scores, images, {}, seconds)
            record = base_score_record(scores, self._run.evaluator.prompts)
            self._workdir.write_json(BASE_SCORES, record)

        distributed.broadcast_from_first("evaluation", write)
        self._base = scores
        self._console.say(
            f"evaluation of the base model: {len(self._run.evaluator.prompts)} held-out prompts, "
            f"{self._took(seconds)}"
        )
        return scores

    def _scores(
        self, adapter: Adapter | None, what: str, give_way: Callable[[], None]
    ) -> tuple[Scores, list[np.ndarray | None], float]:
        """Scores and kept images of a policy, and the seconds they took."""
        start, run = time.perf_counter(), self._run
        compile_clock.lap()
        if self._compiled is None:
            self._console.say(f"{what}: the first one compiles its programs")
        params: Params = run.networks.params
        if adapter is not None and run.settings.rollout.merge_adapter:
            # As rollouts draw: merged weights round otherwise than a sum of two products.
            params, adapter = lora.merge(params, adapter, run.spec.scale), None
        with self._console.watched(len(run.evaluator.groups), what, "sample") as bar:

            def progress(count: int) -> None:
                bar.update(count)
                give_way()

            scores, images = run.evaluator(params, adapter, progress)
        self._compiled = compile_clock.lap()
        return scores, images, time.perf_counter() - start

    def _took(self, seconds: float) -> str:
        """Seconds of the last evaluation in words, and of its compiling where that is much of them."""
        # A share that nobody would notice is not named.
        if not self._compiled or self._compiled < max(1.0, 0.1 * seconds):
            return duration(seconds)
        return f"{duration(seconds)}, {duration(self._compiled)} of it compiling"

    def _write(
        self,
        step: int,
        policy: str,
        scores: Scores,
        images: Sequence[np.ndarray | None],
        compared: dict[str, Any],
        seconds: float,
    ) -> None:
        """Puts an evaluation on record: images first, so that a record never names images that are not there.

        Args:
          step: optimiser steps done.
          policy: whose images these are.
          scores: of them.
          images: that are kept, or clips; None in place of one that is not finite.
          compared: `gain` and `joint` over the base model, and `best_by`, the number that decides which policy is the
            best; empty for the base model itself.
          seconds: it took.
        """
        evaluator = self._run.evaluator
        folder = self._workdir.samples / f"step_{step:06d}"
        frames_per_second = self._run.family.frames_per_second
        shown = []
        tracked = {}
        for number, (index, image) in enumerate(zip(evaluator.kept, images, strict=True)):
            prompt = evaluator.prompts[index].text
            shown.append({"prompt": prompt, "seed": index})
            # Of an image that is none there is nothing to show; its scores are missing and counted.
            if image is None:
                continue
            texts = {"prompt": prompt, "step": str(step)}
            save_sample(folder / f"{number:02d}.png", image, texts, frames_per_second)
            tracked[f"samples/{number:02d}"] = Shown(prompt, image, frames_per_second or 1)
        of_images = [_scores_of_image(scores, index) for index in evaluator.kept]
        self._workdir.write_json(f"samples/{folder.name}/scores.json", of_images)
        self._workdir.write_json("samples/prompts.json", shown)
        record: dict[str, Any] = {
            "step": step,
            "policy": policy,
            "num_prompts": len(evaluator.prompts),
            "scores": summary(scores, evaluator.groups),
            "seconds": seconds,
        }
        record |= compared
        failed = _failures(scores)
        if failed:
            record["failed"] = failed
        self._workdir.append(self._workdir.evaluations, record)
        rewards = self._run.settings.rewards.train
        self._writer.write_evaluation(step, record, tracked, rewards)


def _scores_of_image(scores: Scores, index: int) -> dict[str, float | None]:
    """Scores of one image by reward, None where it has none. The first image of prompt i is image i."""
    row = {}
    for k, name in enumerate(scores.names):
        # A float32 has no more digits than eight, and its double would be written with many.
        value = float(f"{scores.values[index, k]:.8g}")
        row[name] = value if scores.valid[index, k] else None
    return row


def _with_better(state: TrainState, score: float | None) -> TrainState:
    """The state with its averaged policy as the best one, if its score is the highest; None is no score."""
    if score is None:
        return state
    # As the state keeps it. False for a score that is not a number: such a policy is never the best.
    if np.float32(score) > np.float32(float(state.best_score)):
        return _with_best(state, score)
    return state


def _with_best(state: TrainState, score: float) -> TrainState:
    """The state with its averaged policy as the best one."""
    # Placed like what they replace: an array that lies elsewhere would have the steps compiled anew.
    best_score = distributed.device_put_global(np.float32(score), state.best_score.sharding)
    step = np.int32(int(state.step))
    best_step = distributed.device_put_global(step, state.best_step.sharding)
    # A copy: steps overwrite the state they are given, buffers that it shares included.
    best = jax.tree.map(jnp.copy, state.ema)
    return dataclasses.replace(state, best_score=best_score, best_step=best_step, best=best)


def _failures(scores: Scores) -> dict[str, int]:
    """Number of failed scores of every reward that has some."""
    counts = {}
    for column, name in enumerate(scores.names):
        count = int(scores.failed[:, column].sum())
        if count:
            counts[name] = count
    return counts
