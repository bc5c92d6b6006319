"""A training run from end to end: workdir, start-up table, loop, evaluations, checkpoints, report."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax

from marble_jax import distributed, platform
from marble_jax.agreement import PolicyWatch, gap_limit, steps_alike_by_schedule
from marble_jax.config import Settings, flatten
from marble_jax.console import Console
from marble_jax.distributed import accelerators, probe
from marble_jax.errors import InputError
from marble_jax.programs.announce import announce_gains, announce_start
from marble_jax.programs.base_scores import check_base_scores
from marble_jax.programs.build import Run, build
from marble_jax.programs.export import PeriodicExports
from marble_jax.programs.locations import reward_directory
from marble_jax.programs.run_evaluations import RunEvaluations
from marble_jax.programs.run_record import run_record
from marble_jax.programs.step_flops import speed, step_flops_of
from marble_jax.programs.tracked_run import tracked_run
from marble_jax.report import write_report
from marble_jax.rewards.checks import before_training
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.files import is_remote, read_json_or_empty
from marble_jax.storage.workdir import Workdir
from marble_jax.training.guard import Guard, fresh_stream
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.metric_writer import MetricWriter
from marble_jax.training.profile import Profiler, parse_steps
from marble_jax.training.state import TrainState
from marble_jax.training.stops import Interrupted
from marble_jax.validation import validated
from marble_jax.weights import hub


def train_run(
    settings: Settings,
    workdir_path: str,
    command: str,
    verbose: bool = False,
    stated: Collection[str] | None = None,
) -> None:
    """Trains in `workdir_path`; goes on where an earlier run there stopped.

    With several processes all of them call this with the same arguments; the first one writes.

    Args:
      settings: of the run.
      workdir_path: its directory.
      command: as it was called, for the record.
      verbose: whether step lines may be longer than a hundred columns.
      stated: keys of which it is said if the run does not read them; all that were changed when None.

    Raises:
      InputError: whatever does not fit, before anything is written to the workdir.
      Interrupted: stopped by a signal, state saved.
    """
    workdir = Workdir(workdir_path)
    try:
        _train_run(settings, workdir, command, Console(verbose), stated)
    finally:
        hub.hold_to({})
        if distributed.is_first():
            workdir.let_go()


def _train_run(
    settings: Settings,
    workdir: Workdir,
    command: str,
    console: Console,
    stated: Collection[str] | None,
) -> None:
    start = time.perf_counter()
    platform.keep_compilations()
    config = flatten(settings)
    downloads = _hold_workdir(workdir, config, console)
    existed = downloads is not None
    checkpoints = _open_checkpoints(settings, workdir, console)
    expected = 0
    if existed:
        # Brought back first, as it is found out only once which checkpoint is the newest.
        checkpoints.recover()
        expected = checkpoints.latest() or 0
    embeddings = os.fspath(workdir.embeddings)
    run = distributed.run_on_all("build", lambda: build(settings, expected, embeddings))
    if downloads is not None:
        distributed.broadcast_from_first(
            "held-out prompts", lambda: _check_base_scores(run, workdir, console)
        )
        distributed.run_on_all("downloads", lambda: _check_downloads(workdir, downloads))
    cut = distributed.broadcast_from_first("long prompts", run.cut_prompts)
    distributed.run_on_all("reward check", lambda: _check_rewards(run, console))
    # Only now: settings that cannot be built must not claim a workdir, nor leave compiled programs there.
    if not existed:
        distributed.broadcast_from_first("claim", lambda: workdir.claim(config))
        _share_compilations(workdir)
    state, restored = _restore(run, checkpoints)
    done = int(state.step)
    if state.seed != settings.seed:
        # The run was rolled back before: it draws other prompts than its seed says.
        run.encode_ahead(state.seed, done)
    if existed:
        # Later than for a new workdir: a checkpoint that does not fit leaves the record of the run as it was.
        _claim_and_cut(workdir, config, done)
    announce_start(run, workdir, console, done if existed else None, stated)
    for line in cut:
        console.say(line)
    if done == settings.training.num_steps:
        console.say(
            f"all {done} steps are done: nothing to train; a larger training.num_steps goes on from here"
        )
    record = run_record(settings, command)
    distributed.broadcast_from_first("run.json", lambda: workdir.write_json("run.json", record))
    if settings.training.non_finite == "rollback" and not restored:
        # There must be something to roll back to.
        checkpoints.save(0, state)
    session = Session(run, workdir, console, checkpoints, done)
    state = session.train(state)
    if distributed.is_first():
        seconds = time.perf_counter() - start
        announce_gains(run, workdir, console, int(state.step), seconds)
    console.say(f"report: {session.report}")


def _hold_workdir(
    workdir: Workdir, config: dict[str, Any], console: Console
) -> dict[str, str] | None:
    """Holds the workdir of a run that is there, and the downloads of this process to its commits.

    Returns:
      Commits that the run has used so far, by repository; None for a new run, whose workdir is not held yet.
    """
    existed = distributed.broadcast_from_first("workdir", lambda: workdir.check(config))
    if existed:
        # A run that is there is held before anything of it is read: another process may be writing.
        distributed.broadcast_from_first("lock", lambda: workdir.hold(console.say))
    probe.check_shared_directory(workdir.path)
    if not existed:
        return None
    # Before anything is built: rewards and text encoders compile, too.
    _share_compilations(workdir)
    downloads = distributed.broadcast_from_first("downloads", lambda: _downloads(workdir))
    # What the run named without a revision may have moved on since.
    hub.hold_to(downloads)
    return downloads


def _claim_and_cut(workdir: Workdir, config: dict[str, Any], step: int) -> None:
    """Claims the workdir of a run that goes on after `step`, and cuts its records there."""
    distributed.broadcast_from_first("claim", lambda: workdir.claim(config))
    # Records beyond the checkpoint would come twice.
    distributed.broadcast_from_first("cut", lambda: workdir.truncate(step))


def _downloads(workdir: Workdir) -> dict[str, str]:
    """Commits of the Hub repositories that a run has used so far; empty where there is no record, or a damaged one."""
    try:
        record = read_json_or_empty(workdir.path / "run.json")
        return validated(dict[str, str], record.get("downloads", {}), "downloads")
    except InputError:
        return {}


def _check_downloads(workdir: Workdir, recorded: Mapping[str, str]) -> None:
    """Raises InputError where a repository of the run came at another commit than before."""
    for name, commit in hub.commits().items():
        expected = recorded.get(name, commit)
        if commit != expected:
            raise InputError(
                f"workdir {workdir.path}: {name}: expected commit {expected}, which the run began with; received "
                f"{commit}, as what its revision names has moved on; choose another --workdir"
            )


def _check_base_scores(run: Run, workdir: Workdir, console: Console) -> None:
    """Raises InputError where the run's held-out prompts are others than those of its base model's scores."""
    evaluator = run.evaluator
    names = [reward.name for reward in evaluator.scorer.rewards]
    check_base_scores(workdir, evaluator.prompts, evaluator.images_per_prompt, names, console.say)


def _share_compilations(workdir: Workdir) -> None:
    """Keeps compiled programs in the run's folder, where a cache of the host's own would not do."""
    if is_remote(workdir.path) or not distributed.is_single_process():
        # Only the first process writes compiled programs: in a folder of its own host the others never see them.
        platform.keep_compilations(str(workdir.path / "compiled"))


def _open_checkpoints(settings: Settings, workdir: Workdir, console: Console) -> Checkpoints:
    kept = settings.checkpoints
    return Checkpoints(workdir.checkpoints, kept.keep, kept.keep_every, console.say)


def _check_rewards(run: Run, console: Console) -> None:
    """Scores golden images with all rewards, in batches of the rollouts' size: what it compiles is used again."""
    settings = run.settings
    if not settings.rewards.check:
        return
    directory = reward_directory(settings.rewards)
    if settings.rewards.upstream_scoring:
        # Scores on record follow the published rules, not those of upstream's code: nothing to compare with.
        directory = None
    remarks = before_training(
        run.evaluator.scorer.rewards,
        settings.model.height,
        directory,
        settings.rollout.batch_size,
        settings.rewards.timeout,
        settings.model.num_frames,
    )
    for remark in remarks:
        console.say(remark)


def _restore(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, bool]:
    """The state to go on from, and whether it is from a checkpoint.

    Raises:
      InputError: the checkpoint is beyond the number of steps asked for.
    """
    state = run.state
    latest = checkpoints.latest()
    if latest is not None:
        _, state = checkpoints.restore(run.state, latest)
    done = int(state.step)
    wanted = run.settings.training.num_steps
    if done > wanted:
        raise InputError(
            f"training.num_steps: expected at least the {done} steps this workdir has done; received "
            f"{wanted}"
        )
    return state, latest is not None


class Session:
    """One call of the command: the hooks around the loop, and what is closed after it.

    Attributes:
      report: where the report is, once training ended.
    """

    def __init__(
        self, run: Run, workdir: Workdir, console: Console, checkpoints: Checkpoints, done: int
    ):
        self._run, self._workdir, self._console = run, workdir, console
        self._checkpoints = checkpoints
        self.report = ""
        settings = run.settings
        constants = settings.policy_gradient
        limit = gap_limit(settings.model.dtype, constants.clip_range, constants.form)
        policy = settings.rollout_policy
        by_schedule = steps_alike_by_schedule(policy.schedule, policy.delay)
        self._policies = PolicyWatch(limit, console.say, by_schedule)
        # One process writes for all.
        self._writer = MetricWriter.silent()
        if distributed.is_first():
            self._writer = MetricWriter(
                str(workdir.events),
                settings.logging,
                tracked_run(settings, workdir),
                done,
                console.say,
            )
        self._evaluations = RunEvaluations(run, workdir, console, self._writer)
        self._exports = PeriodicExports(settings, run.family, workdir, run.networks.params, console)
        self._flops = step_flops_of(settings, run.sizes, run.networks, run.state.current)
        self._accelerator = accelerators.by_device_kind(jax.devices()[0].device_kind)
        # Kept as shapes: the steps overwrite the state itself.
        self._blank = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            run.state,
        )

    def train(self, state: TrainState) -> TrainState:
        """Trains from a state to the end, and writes the report however that ends."""
        cadence = self._cadence()
        finished = False
        try:
            state = train(state, self._run.iteration, cadence, self._hooks(), self._console)
            finished = True
            return state
        except BaseException as error:
            distributed.exit_unless_agreed((Interrupted,), error)
            raise
        finally:
            self._close(hurried=not finished)

    def _cadence(self) -> Cadence:
        settings = self._run.settings
        return Cadence(
            settings.training.num_steps,
            settings.evaluation.every_steps,
            settings.checkpoints.every_steps,
            settings.export.every_steps,
            60.0 * settings.checkpoints.every_minutes,
        )

    def _hooks(self) -> Hooks:
        training = self._run.settings.training
        profiled = range(0)
        if distributed.is_first():
            profiled = parse_steps(self._run.settings.logging.profile_steps)
        guard = Guard(
            training.non_finite,
            training.non_finite_patience,
            training.max_rollbacks,
            self._roll_back,
        )
        return Hooks(
            record=self._record,
            evaluate=self._evaluations,
            save=lambda state: self._checkpoints.save(int(state.step), state),
            replace=lambda state: self._checkpoints.replace(int(state.step), state),
            export=self._exports,
            speed=self._speed,
            profiler=Profiler(profiled, self._workdir.path / "profile"),
            guard=guard,
        )

    def _record(self, step: int, values: dict[str, Any]) -> None:
        """Puts the figures of a step on record."""

        def write() -> None:
            self._workdir.append(self._workdir.metrics, values)
            self._writer.write(step, values)

        distributed.broadcast_from_first("record", write)
        self._policies.see(values)

    def _speed(self, record: Mapping[str, Any]) -> dict[str, float]:
        images, devices = self._run.sizes.images, jax.device_count()
        return speed(self._flops, record, images, devices, self._accelerator)

    def _roll_back(self, reason: str, number: int) -> TrainState:
        """The newest checkpoint with other random numbers."""
        step, state = self._checkpoints.restore(self._blank)
        distributed.broadcast_from_first("cut", lambda: self._workdir.truncate(step))
        most = self._run.settings.training.max_rollbacks
        self._console.say(
            f"{reason}: back to step {step} with other random numbers (rollback {number} of {most})"
        )
        state = fresh_stream(state, number)
        # Other random numbers draw other prompts.
        self._run.encode_ahead(state.seed, step)
        return state

    def _close(self, hurried: bool) -> None:
        self._checkpoints.close()
        self._writer.close(hurried)
        self._exports.close(hurried)
        self._run.collector.scorer.close()
        self._run.evaluator.scorer.close()
        self.report = distributed.broadcast_from_first("report", self._write_report)

    def _write_report(self) -> str:
        """Where the report is, or why there is none: how a run ends must not hang on it."""
        workdir = self._workdir
        if not workdir.evaluations.exists():
            return "none before the first evaluation"
        try:
            return str(write_report(str(workdir.path)))
        except Exception as error:
            # Whatever goes wrong in drawing: the records are safe.
            return (
                f"not written ({type(error).__name__}: {error}); marble-jax report "
                f"--workdir={workdir.path} tries again"
            )
