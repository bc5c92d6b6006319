"""A training run from end to end: workdir, start-up table, loop, evaluations, checkpoints, report."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from marble_jax import distributed, platform
from marble_jax.config import flatten
from marble_jax.console import Console, duration, joined, quantity, shown
from marble_jax.distributed import accelerators, probe, sharding
from marble_jax.errors import InputError
from marble_jax.evaluation.statistics import gains, standardised_gain, summary
from marble_jax.programs import build
from marble_jax.programs.export import PeriodicExports
from marble_jax.programs.step_flops import speed, work_of
from marble_jax.report import write_report
from marble_jax.rewards.checks import before_training
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.images import save_png
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable import lora
from marble_jax.training.guard import Guard, fresh_stream
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.profile import Profiler, parse_steps
from marble_jax.training.records import MetricWriter
from marble_jax.training.state import TrainState
from marble_jax.training.stops import Interrupted
from marble_jax.types import Scores

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "jaxopt",
    "ml_collections",
    "transformers",
)


class Evaluations:
    """Evaluates states, compares with the base model, records, and keeps the best averaged adapter."""

    def __init__(self, run: build.Run, workdir: Workdir, console: Console, events: MetricWriter):
        self._run, self._workdir, self._console, self._events = run, workdir, console, events
        self._deciding = deciding_rewards(run.config)
        self._base: Scores | None = None

    def __call__(
        self, state: TrainState, give_way: Callable[[], None] = lambda: None
    ) -> TrainState:
        """Evaluates the averaged policy (the base model at step 0, which it equals).

        Args:
          state: to evaluate.
          give_way: called after every batch of images; what it raises comes through, and nothing is on record.
        """
        step = int(state.step)
        records = self._workdir.evaluations
        done = distributed.broadcast_from_first(
            "evaluations", lambda: [r["step"] for r in self._workdir.read(records)]
        )
        base = self._reference(0 in done, give_way)
        if step in done:
            return state
        if step == 0:
            return state
        scores, images, seconds = self._scores(state, f"step {step} evaluation", give_way)
        gain = gains(scores, base, self._run.evaluator.groups)
        distributed.broadcast_from_first(
            "evaluation", lambda: self._write(step, "ema", scores, images, gain, seconds)
        )
        better = standardised_gain(scores, base, self._deciding)
        ups = " ".join(f"{n} {gain[n]['mean']:+.3f}" for n in scores.names)
        self._console.say(
            f"evaluation after step {step} ({len(self._run.evaluator.prompts)} held-out prompts, "
            f"{duration(seconds)}): gain {ups}"
        )
        if better > float(state.best_score):
            # Placed like what they replace: an array that lies elsewhere would have the steps compiled anew.
            state = state.replace(
                best_score=distributed.device_put_global(
                    np.float32(better), state.best_score.sharding
                ),
                best_step=distributed.device_put_global(np.int32(step), state.best_step.sharding),
                best=jax.tree.map(jnp.copy, state.ema),
            )
        return state

    def _reference(self, on_record: bool, give_way: Callable[[], None]) -> Scores:
        """The base model's scores, evaluated once a run and read back on resume; a kill may come between the record
        of the evaluation and the scores themselves."""
        if self._base is None:
            there = distributed.broadcast_from_first(
                "base scores", lambda: _read_scores(self._workdir.path / "base_scores.json")
            )
            if there is not None:
                self._base = _scores_of(there)
            else:
                scores, images, seconds = self._scores(
                    None, "evaluation of the base model", give_way
                )

                def write() -> None:
                    if not on_record:
                        self._write(0, "base", scores, images, None, seconds)
                    self._workdir.write_json(
                        "base_scores.json",
                        {
                            "names": scores.names,
                            "values": scores.values,
                            "valid": scores.valid,
                            "failed": scores.failed,
                        },
                    )

                distributed.broadcast_from_first("evaluation", write)
                self._base = scores
                self._console.say(
                    f"evaluation of the base model: {len(self._run.evaluator.prompts)} held-out prompts, "
                    f"{duration(seconds)}"
                )
        return self._base

    def _scores(
        self, state: TrainState | None, what: str, give_way: Callable[[], None]
    ) -> tuple[Scores, np.ndarray, float]:
        def progress(count: int) -> None:
            bar.update(count)
            give_way()

        start, run = time.perf_counter(), self._run
        params, adapter = run.pipeline.params, None if state is None else state.ema
        if adapter is not None and run.config.rollout.merge_adapter:
            params, adapter = lora.merge(params, adapter, run.spec.scale), None
        with self._console.bar(len(run.evaluator.groups), what, "img") as bar:
            scores, images = run.evaluator(params, adapter, progress)
        return scores, images, time.perf_counter() - start

    def _write(
        self,
        step: int,
        policy: str,
        scores: Scores,
        images: np.ndarray,
        gain: dict | None,
        seconds: float,
    ) -> None:
        evaluator = self._run.evaluator
        folder = self._workdir.samples / f"step_{step:06d}"
        for i, image in enumerate(images):
            prompt = evaluator.prompts[evaluator.kept[i]].text
            save_png(folder / f"{i:02d}.png", image, {"prompt": prompt, "step": str(step)})
        self._workdir.write_json(
            "samples/prompts.json",
            [{"prompt": evaluator.prompts[i].text, "seed": i} for i in evaluator.kept],
        )
        record: dict[str, Any] = {
            "step": step,
            "policy": policy,
            "num_prompts": len(evaluator.prompts),
            "scores": summary(scores, evaluator.groups),
            "seconds": seconds,
        }
        if gain is not None:
            record["gain"] = gain
        if scores.failed.any():
            record["failed"] = {
                n: int(f.sum()) for n, f in zip(scores.names, scores.failed.T) if f.any()
            }
        self._workdir.append(self._workdir.evaluations, record)
        self._events.write(
            step, {f"evaluation/score/{n}": v["mean"] for n, v in record["scores"].items()}
        )


def _read_scores(file: epath.Path) -> dict[str, Any] | None:
    """The record of scores in a file; None where there is none, or a damaged one."""
    try:
        found = json.loads(file.read_bytes()) if file.exists() else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"names", "values", "valid", "failed"} <= set(found):
        return None
    # One row an image, one number a reward: another shape is no record of these scores.
    whole = all(len(row) == len(found["names"]) for row in found["values"])
    return found if whole else None


def _scores_of(record: Mapping[str, Any]) -> Scores:
    return Scores(
        tuple(record["names"]),
        np.asarray(record["values"], np.float32),
        np.asarray(record["valid"], bool),
        np.asarray(record["failed"], bool),
    )


def train_run(config: ml_collections.ConfigDict, workdir_path: str, command: str) -> None:
    """Trains as `config` says in `workdir_path`; goes on where an earlier run there stopped.

    With several processes all of them call this with the same arguments; the first one writes.

    Raises:
      InputError: whatever does not fit, before anything is written to the workdir.
      Interrupted: stopped by a signal, state saved.
    """
    start = time.perf_counter()
    platform.keep_compilations()
    console = Console()
    workdir = Workdir(workdir_path)
    existed = distributed.broadcast_from_first("workdir", lambda: workdir.check(flatten(config)))
    probe.check_shared_directory(workdir.path)
    run = distributed.run_on_all("build", lambda: build.build(config))
    distributed.run_on_all("reward check", lambda: _check_rewards(run, console))
    if not existed:
        distributed.broadcast_from_first("claim", lambda: workdir.claim(flatten(config)))
    checkpoints = Checkpoints(
        workdir.checkpoints, config.checkpoints.keep, config.checkpoints.keep_every, console.say
    )
    state, resumed = run.state, checkpoints.latest()
    if resumed is not None:
        _, state = checkpoints.restore(run.state, resumed)
    done = int(state.step)
    if done > config.training.num_steps:
        raise InputError(
            f"training.num_steps: expected at least the {done} steps this workdir has done; received "
            f"{config.training.num_steps}"
        )
    if existed:
        distributed.broadcast_from_first("claim", lambda: workdir.claim(flatten(config)))
        distributed.broadcast_from_first("cut", lambda: workdir.truncate(done))
    _announce(run, workdir, console, done if existed else None)
    if done == config.training.num_steps:
        console.say(
            f"all {done} steps are done: nothing to train; a larger training.num_steps goes on from here"
        )
    distributed.broadcast_from_first(
        "run.json", lambda: workdir.write_json("run.json", _run_record(run, command))
    )
    events = MetricWriter(
        str(workdir.events),
        config.logging.tensorboard and distributed.is_first(),
        config.logging.wandb if distributed.is_first() else "",
        config.name,
        flatten(config),
    )
    evaluations = Evaluations(run, workdir, console, events)

    def record(step: int, values: dict[str, Any]) -> None:
        def write() -> None:
            workdir.append(workdir.metrics, values)
            events.write(step, values)

        distributed.broadcast_from_first("record", write)

    cadence = Cadence(
        config.training.num_steps,
        config.evaluation.every_steps,
        config.checkpoints.every_steps,
        config.export.every_steps,
    )
    exports = PeriodicExports(config, workdir, run.pipeline.params, console)
    work = work_of(config, run.sizes, run.pipeline, run.state.current)
    chip = accelerators.by_device_kind(jax.devices()[0].device_kind)
    profiler = Profiler(
        parse_steps(config.logging.profile_steps) if distributed.is_first() else range(0),
        workdir.path / "profile",
    )
    training = config.training
    # The steps overwrite the state itself.
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), run.state
    )

    def rollback(why: str, number: int) -> TrainState:
        step, found = checkpoints.restore(like)
        distributed.broadcast_from_first("cut", lambda: workdir.truncate(step))
        console.say(
            f"{why}: back to step {step} with other random numbers (rollback {number} of "
            f"{training.max_rollbacks})"
        )
        return fresh_stream(found, number)

    if training.non_finite == "rollback" and resumed is None:
        checkpoints.save(0, state)
    hooks = Hooks(
        record,
        evaluations,
        lambda s: checkpoints.save(int(s.step), s),
        exports,
        lambda r: speed(work, r, run.sizes.images, jax.device_count(), chip),
        profiler,
        Guard(training.non_finite, training.non_finite_patience, training.max_rollbacks, rollback),
    )
    try:
        if done and cadence.evaluates(done):
            state = evaluations(
                state
            )  # a reward may have stopped the run during this very evaluation
        state = train(state, run.iteration, cadence, hooks, console)
    except BaseException as error:
        distributed.exit_unless_agreed((Interrupted,), error)
        raise
    finally:
        checkpoints.close()
        events.close()
        run.collector.scorer.close()
        run.evaluator.scorer.close()
        report = distributed.broadcast_from_first("report", lambda: _report(workdir))
    if distributed.is_first():
        _conclude(run, workdir, console, state, time.perf_counter() - start)
    console.say(f"report: {report}")


def _report(workdir: Workdir) -> str:
    """Where the report is, or why there is none: how a run ends must not hang on it."""
    if not workdir.evaluations.exists():
        return "none before the first evaluation"
    try:
        return str(write_report(str(workdir.path)))
    except Exception as error:  # whatever goes wrong in drawing; the records are safe
        return f"not written ({type(error).__name__}: {error}); marble-jax report --workdir={workdir.path} tries again"


def _check_rewards(run: build.Run, console: Console) -> None:
    """Scores golden images with all rewards, in batches of the rollouts' size: what it compiles is used again."""
    config, rewards = run.config, run.evaluator.scorer.rewards
    if not config.rewards.check:
        return
    # What is on record was scored by our rules, not by upstream's.
    directory = None if config.rewards.upstream_scoring else build.reward_place(config)
    for remark in before_training(
        rewards,
        config.model.height,
        directory,
        config.rollout.batch_size,
        config.rewards.timeout,
    ):
        console.say(remark)


def _run_record(run: build.Run, command: str) -> dict[str, Any]:
    config = run.config
    devices = jax.devices()
    return {
        "name": config.name,
        "method": method_name(config),
        "rewards": list(config.rewards.train),
        "heldout_rewards": list(config.rewards.heldout),
        "num_steps": config.training.num_steps,
        "config": flatten(config),
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
        "hardware": {
            "device": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
        },
        "command": command,
        "differences_from_upstream": differences_from_upstream(config),
        "started": time.time(),
    }


def method_name(config: ml_collections.ConfigDict) -> str:
    """`MARBLE, amortized`, `weighted sum` and so on."""
    if config.advantages.scalarize != "none":
        name = config.advantages.scalarize.replace("_", " ")
    else:
        name = "MARBLE" if config.harmonize.balancer == "marble" else config.harmonize.balancer
        name = f"{name}, {config.harmonize.mode}"
    parts = [
        name,
        f"{len(config.reward_schedule.stages)} stages" if config.reward_schedule.stages else "",
        "reward dropout" if config.reward_schedule.dropout else "",
    ]
    return ", ".join(part for part in parts if part)


def deciding_rewards(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Names of the rewards that choose the best policy (`evaluation.best`)."""
    trained, heldout = tuple(config.rewards.train), tuple(config.rewards.heldout)
    return {"train": trained, "heldout": heldout or trained, "all": trained + heldout}[
        config.evaluation.best
    ]


def differences_from_upstream(config: ml_collections.ConfigDict) -> list[str]:
    """What this configuration does differently from upstream's code, a sentence each."""
    found = []
    if config.harmonize.mode != "upstream":
        found += [
            "alpha is solved on the whole batch of an optimiser step, not on one micro-step",
            "steps between solves weigh gradients, not advantages: a missing reward stays missing, and the "
            "factor mean|g|/|g_k| is kept",
        ]
    if not config.rollout.integer_timesteps:
        found.append(
            "rollouts see exact timesteps, as training does; upstream truncates them to integers"
        )
    found += [
        "resume restores every policy, the optimiser, alpha and the random state",
        f"the best policy is chosen by standardised gain ({joined(deciding_rewards(config))}), not by the mean "
        "of raw scores",
        "a failed reward is missing, never 0",
    ]
    return found


def _announce(run: build.Run, workdir: Workdir, console: Console, resumed: int | None) -> None:
    config, sizes = run.config, run.sizes
    devices = jax.devices()
    base = lora.num_parameters(run.pipeline.params)
    trained = lora.num_parameters(run.state.current)
    held = (
        trained * 4 * (2 + (config.nft.kl_weight > 0)) * run.recipe.micro_batching.chunk_size / 1e6
    )
    console.say(
        f"marble_jax: {config.name}, {method_name(config)}"
        + (f", resumed after step {resumed}" if resumed is not None else "")
    )
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    start = f", from {config.lora.init}" if config.lora.init else ""
    rows = [
        ("devices", f"{len(devices)} {devices[0].device_kind}, mesh {mesh}, jax {jax.__version__}"),
        (
            "model",
            f"{config.model.path}: transformer {quantity(base)} {config.model.dtype}, adapter "
            f"{quantity(trained)} (rank {config.lora.rank}{start}), {config.model.height} x {config.model.width} px",
        ),
        (
            "base weights",
            sharding.describe(
                run.mesh,
                "transformer",
                run.pipeline.params,
                run.pipeline.model.config.attention_head_dim,
            ),
        ),
        (
            "rewards",
            f"{joined(config.rewards.train)}; never trained on: {joined(config.rewards.heldout)}",
        ),
        (
            "step",
            f"{config.rollout.prompts_per_step} prompts x {config.rollout.images_per_prompt} = {sizes.images} "
            f"images in {sizes.rollout_batches} batches, {sizes.timesteps} of {config.rollout.num_steps} "
            f"timesteps: {sizes.samples} samples in {sizes.micro_batches} micro-batches",
        ),
        (
            "memory",
            f"per-sample adapter gradients up to {held:.0f} MB at a time, {len(config.rewards.train)} "
            f"accumulators of {trained * 4 / 1e6:.1f} MB",
        ),
        (
            "evaluation",
            f"{len(run.evaluator.prompts)} held-out prompts x {run.evaluator.images_per_prompt}, "
            f"{config.evaluation.num_steps} steps of "
            f"{config.evaluation.solver}"
            + (
                f", every {config.evaluation.every_steps} steps"
                if config.evaluation.every_steps
                else ""
            ),
        ),
        (
            "workdir",
            f"{workdir.path}: config.json metrics.jsonl evaluation.jsonl tensorboard/ samples/ checkpoints/ "
            "report.html",
        ),
    ]
    console.table(rows)


def _conclude(
    run: build.Run, workdir: Workdir, console: Console, state: TrainState, seconds: float
) -> None:
    records = workdir.read(workdir.evaluations)
    if len(records) < 2:
        return
    base, last = records[0], records[-1]
    rows = []
    for name in (*run.config.rewards.train, *run.config.rewards.heldout):
        gain = last["gain"][name]
        if gain["mean"] is None:
            rows.append((name, "-", "-", "no valid sample", "", ""))
            continue
        verdict = "up" if gain["low"] > 0 else "down" if gain["high"] < 0 else "not clear"
        note = " (never trained)" if name in run.config.rewards.heldout else ""
        rows.append(
            (
                name + note,
                shown(base["scores"][name]["mean"]),
                shown(last["scores"][name]["mean"]),
                shown(gain["mean"], gain["low"], gain["high"], sign=True),
                last["scores"][name]["count"],
                verdict,
            )
        )
    console.say(
        f"\nbefore and after {int(state.step)} steps, {last['num_prompts']} held-out prompts, gain with 95 % "
        f"bootstrap interval ({duration(seconds)} in all):"
    )
    console.table(
        [tuple(map(str, row)) for row in rows],
        ("reward", "before", "after", "gain", "images", ""),
    )
