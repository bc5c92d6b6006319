"""Checkpoints of a run's state with Orbax: asynchronous, with checksums, and never loaded when damaged.

Orbax copies the state to the host, writes in the background beside the place and renames the folder when it is complete
(in a bucket: adds a marker). Before that, every file is read back from the disk and goes into the folder's manifest. A
run that is killed at any moment, or whose disk loses bytes, therefore goes on from the newest checkpoint whose files
are all as they were written; one that is not is named, skipped and put aside when its step is to be saved again.

    checkpoints/30/default/...      arrays
    checkpoints/30/manifest.json    size and SHA-256 of every file of them
    checkpoints/damaged_40          was skipped
    checkpoints/superseded_30       while another state of step 30 takes its place

Restoring goes onto the caller's own arrays: their shapes, dtypes and shardings, not those of the machines that saved.

Saving runs no program on the devices: it would queue behind what they are still at, such as a batch that was given up.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from marble_jax import distributed
from marble_jax.errors import InputError, one_line
from marble_jax.storage.files import check_no_pattern, is_remote, plain_path, write_whole
from marble_jax.storage.intact import FINAL_FILES, HAS_MANIFEST, ITEM, problem_in, read_back
from marble_jax.storage.leaves import quiet
from marble_jax.storage.manifest import MANIFEST, checksum, files_below, read_manifest
from marble_jax.validation import is_digits

_TEMPORARY = ".orbax-checkpoint-tmp"
_SUPERSEDED = "superseded_"


class Checkpoints:
    """The checkpoints of one run. In a run on several hosts every process makes the same calls.

    Args:
      path: directory; made when the first checkpoint is saved.
      keep: number of newest checkpoints kept, >= 1.
      keep_every: checkpoints of every so many steps are kept for good; 0 for none.
      say: called with one line about a checkpoint that is skipped or could not be written.

    Raises:
      InputError: `keep` is below 1.
    """

    def __init__(
        self,
        path: epath.PathLike,
        keep: int = 3,
        keep_every: int = 0,
        say: Callable[[str], object] = print,
    ):
        if keep < 1:
            raise InputError(f"checkpoints.keep: expected at least 1; received {keep}")
        check_no_pattern("checkpoints", path)
        # Orbax refuses relative paths; in a bucket there are none.
        self._path = epath.Path(path) if is_remote(path) else epath.Path(path).resolve()
        self._keep = keep
        self._keep_every = keep_every
        self._say = say
        self._saving = -1  # step of the save under way, or of the last one
        self._failure = ""  # why it could not be written
        self._problems: dict[int, str] = {}
        self._said: set[int] = set()
        self._manager: ocp.CheckpointManager | None = None
        self._silence = contextlib.ExitStack()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, intact or not."""
        self.wait()
        if not self._path.exists():
            return []
        # Unfinished and damaged checkpoints have names that are no numbers.
        return sorted(int(place.name) for place in self._path.iterdir() if is_digits(place.name))

    def latest(self) -> int | None:
        """Returns the newest intact step, or None without any checkpoint; says which ones are passed over.

        Raises:
          InputError: there are checkpoints and none is intact.
        """
        # One process reads the files for all.
        return distributed.broadcast_from_first("checkpoints", self._choose)

    def _choose(self) -> int | None:
        skipped: list[int] = []
        for step in reversed(self.steps()):
            if not self._problem(step):
                self._say_skipped(reversed(skipped), step)
                return step
            skipped.append(step)
        if skipped:
            newest = skipped[0]
            raise InputError(
                f"{self._path}: expected an intact checkpoint; received {len(skipped)} damaged (of step "
                f"{newest}: {self._problems[newest]}); nothing was changed: bring the folder back "
                "from a copy, or choose another --workdir"
            )
        return None

    def _say_skipped(self, skipped: Iterable[int], step: int) -> None:
        for damaged in skipped:
            if damaged not in self._said:
                self._said.add(damaged)
                self._say(
                    f"checkpoint of step {damaged} is damaged, going on from step {step}: "
                    f"{self._problems[damaged]}"
                )

    def _problem(self, step: int) -> str:
        """What is wrong with a checkpoint; empty for one that is intact. Every file is read, so only once."""
        if step not in self._problems:
            self._problems[step] = problem_in(self._path / str(step))
        return self._problems[step]

    def save(self, step: int, state: Any) -> None:
        """Saves in the background; a step that has a checkpoint already is left alone.

        A checkpoint that cannot be written (no room) is said at the next call, and the run goes on.

        Args:
          step: names the checkpoint.
          state: tree of arrays; they are copied before this returns, so that they may be donated.
        """
        manager = self._open()
        self._finish_save(manager)
        if step in manager.all_steps():
            return
        self._saving = step
        self._failure = ""
        self._problems.pop(step, None)
        # Forced, as Orbax otherwise refuses a step below the newest one, silently.
        options = {"force": True, "custom_metadata": {HAS_MANIFEST: True}}
        self._attempt(
            manager, lambda: manager.save(step, args=ocp.args.PyTreeSave(state), **options)
        )

    def replace(self, step: int, state: Any) -> None:
        """Saves another state of a step that has a checkpoint, and waits for it; the old one goes only then.

        Args:
          step: names the checkpoint.
          state: tree of arrays.
        """
        manager = self._open()
        self._finish_save(manager)
        aside = self._path / f"{_SUPERSEDED}{step}"
        if step in manager.all_steps():
            distributed.broadcast_from_first("superseded", lambda: self._rename(step, aside))
            manager.reload()
        self.save(step, state)
        self._finish_save(manager)
        distributed.broadcast_from_first("superseded", self._clear_superseded)
        manager.reload()

    def recover(self) -> None:
        """Brings back a checkpoint that a kill in `replace` left aside; for the one run that writes here."""
        distributed.broadcast_from_first("superseded", self._clear_superseded)

    def _rename(self, step: int, target: epath.Path) -> None:
        (self._path / str(step)).rename(target)

    def _clear_superseded(self) -> None:
        """Removes checkpoints that were replaced, and puts those back whose successors are not whole."""
        if not self._path.exists():
            return
        for aside in list(self._path.iterdir()):
            name = aside.name.removeprefix(_SUPERSEDED)
            if name == aside.name or not is_digits(name):
                continue
            successor = self._path / name
            if successor.exists() and not problem_in(successor):
                aside.rmtree()
                continue
            successor.rmtree(missing_ok=True)
            aside.rename(successor)

    def restore(self, state: Any, step: int | None = None) -> tuple[int, Any]:
        """Returns a step and the state saved at it, placed like `state`.

        Args:
          state: arrays or `jax.ShapeDtypeStruct`s.
          step: of the checkpoint; the newest intact one if None.

        Raises:
          InputError: there is no such checkpoint, it is damaged, or its tree or shapes are not those of `state`.
        """
        wanted = self.latest() if step is None else step
        step = distributed.broadcast_from_first("checkpoint", lambda: self._check(wanted))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            with quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(
                    plain_path(self._path / str(step) / ITEM),
                    args=ocp.args.StandardRestore(target),
                )
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise many kinds, also for files that changed since
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"checkpoint {self._path}/{step}: expected the state of this configuration; received "
                f"another one ({lines[0][:200]})"
            ) from error
        inner = getattr(restored, "step", step)
        if int(inner) != step:
            raise InputError(
                f"checkpoint {self._path}/{step}: expected the state of step {step}; received that of step "
                f"{int(inner)}"
            )
        return step, restored

    def _check(self, step: int | None) -> int:
        """The step, if its checkpoint is intact."""
        steps = self.steps()
        if step is None or step not in steps:
            raise InputError(
                f"checkpoint: expected one of {steps or 'none saved yet'} in {self._path}; "
                f"received {step}"
            )
        problem = self._problem(step)
        if problem:
            raise InputError(
                f"checkpoint of step {step}: expected an intact one; received {problem}"
            )
        return step

    def wait(self) -> None:
        """Blocks until everything saved so far is complete."""
        if self._manager is not None:
            self._finish_save(self._manager)

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads.

        Raises:
          InputError: the last checkpoint could not be written.
        """
        if self._manager is not None:
            self._finish_save(self._manager)
            self._manager.close()
            self._manager = None
            self._silence.close()
        if self._failure:
            raise InputError(
                f"{self._path}: expected a place with room for the checkpoint of step {self._saving}; "
                f"received {self._failure}"
            )

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, made when the first checkpoint is saved: until then nothing in the folder is touched."""
        if self._manager is None:
            self._silence.enter_context(quiet())
            # A damaged checkpoint in its place could not be saved again, and would count as the newest one.
            for step in [step for step, problem in self._problems.items() if problem]:
                self._put_aside(step)
            self._path.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                plain_path(self._path), options=self._options(), handler_registry=_handlers()
            )
        return self._manager

    def _options(self) -> ocp.CheckpointManagerOptions:
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(self._keep)]
        if self._keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(self._keep_every))
        options: dict[str, Any] = {}
        if is_remote(self._path):
            # Renaming a folder in a bucket copies it; Orbax knows that of gs:// only.
            options["atomicity_options"] = ocp.options.AtomicityOptions(
                ocp.options.AtomicityMode.COMMIT_FILE
            )
        return ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            # The folder is there; Orbax does not make it for processes that are named.
            create=False,
            multiprocessing_options=_processes(),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_manifest),
            **options,
        )

    def _put_aside(self, step: int) -> None:
        if distributed.is_first():
            aside = self._path / f"damaged_{step}"
            if aside.exists():
                aside.rmtree()
            (self._path / str(step)).rename(aside)
        self._problems.pop(step, None)

    def _add_manifest(self) -> None:
        """Called by Orbax on the first process when all files are there, before the checkpoint becomes visible."""
        place = self._path / f"{self._saving}{_TEMPORARY}"
        # With a marker in place of the rename there is no temporary folder.
        if not place.exists():
            place = self._path / str(self._saving)
        files = {}
        for name in files_below(place):
            if name not in FINAL_FILES:
                files[name] = checksum(place / name)
        _write_manifest(place, files, self._saving)

    def _add_final_files(self) -> None:
        """Adds to the manifest what Orbax wrote after it."""
        place = self._path / str(self._saving)
        files = dict(read_manifest(place))
        if FINAL_FILES[0] in files:
            return
        for name in FINAL_FILES:
            if (place / name).exists():
                files[name] = checksum(place / name)
        _write_manifest(place, files, self._saving)
        # Sealed is not readable: what cannot be read back does not count as saved.
        try:
            read_back(place / ITEM)
        except Exception as error:
            self._put_aside(self._saving)
            raise OSError(f"it cannot be read back: {one_line(error, 200)}") from error

    def _finish_save(self, manager: ocp.CheckpointManager) -> None:
        """Waits for the save under way."""

        def finish() -> None:
            manager.wait_until_finished()
            if distributed.is_first() and self._saving in manager.all_steps():
                self._add_final_files()

        self._attempt(manager, finish)

    def _attempt(self, manager: ocp.CheckpointManager, call: Callable[[], object]) -> None:
        """Makes a call about the save under way. One that failed is said; the next save is due at its own step."""
        try:
            call()
        except Exception as error:  # whatever the file system raises
            if not distributed.is_single_process():
                # The other processes wait for this one, which ends and takes them along.
                raise
            self._failure = one_line(error, 200)
            self._say(f"checkpoint of step {self._saving} could not be written: {self._failure}")
            # Its half-written files take the room that the next one needs.
            (self._path / f"{self._saving}{_TEMPORARY}").rmtree(missing_ok=True)
            manager.reload()


def _processes() -> ocp.options.MultiprocessingOptions:
    """All processes, by name: Orbax then lets them meet over the network, and otherwise by a program on the devices."""
    if distributed.is_single_process():
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(active_processes=set(range(distributed.count())))


def _handlers() -> ocp.DefaultCheckpointHandlerRegistry:
    """How a tree of arrays is written: what several devices hold comes from one of them, in a copy.

    By default each of them writes a part, which a program on the device cuts out first.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    numbers = ocp.type_handlers.ScalarHandler()
    types = ocp.type_handlers.create_type_handler_registry(
        (int, numbers),
        (float, numbers),
        (np.number, numbers),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, arrays),
    )
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=_processes(), type_handler_registry=types
    )
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    handlers.add(ITEM, ocp.args.PyTreeSave, handler)
    return handlers


def _write_manifest(place: epath.Path, files: Mapping[str, Any], step: int) -> None:
    # Without an end of line: cut anywhere, it is no JSON.
    write_whole(place / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
