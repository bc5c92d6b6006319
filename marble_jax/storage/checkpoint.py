"""Checkpoints of a run's state with Orbax: asynchronous, sealed, and never loaded when damaged.

Orbax copies the state to the host, writes in the background beside the place and renames the folder when it is complete
(in a bucket: adds a marker). Before that, every file is read back from the disk and goes into the folder's manifest. A
run that is killed at any moment, or whose disk loses bytes, therefore goes on from the newest checkpoint whose files
are all as they were written; one that is not is named, skipped and put aside when its step is to be saved again.

    checkpoints/30/default/...      arrays
    checkpoints/30/manifest.json    size and SHA-256 of every file of them
    checkpoints/damaged_40          was skipped

Restoring goes onto the caller's own arrays: their shapes, dtypes and shardings, not those of the machines that saved.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from marble_jax import distributed
from marble_jax.errors import InputError
from marble_jax.storage.files import is_remote, read_json, write_whole
from marble_jax.storage.leaves import first_line, quiet
from marble_jax.storage.manifest import MANIFEST, check_hashes, checksum, files_below, read_manifest

ITEM = "default"
NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes last of all, after the manifest: dates and a marker, nothing of the state."""
SEALED = "has_manifest"
"""In Orbax's metadata: tells a checkpoint that lost its manifest from one that never had any."""
_TEMPORARY = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run. In a run on several hosts every process makes the same calls.

    Args:
      path: directory; made when the first checkpoint is saved.
      keep: number of newest checkpoints kept, >= 1.
      keep_every: checkpoints of every so many steps are kept for good; 0 for none.
      say: called with one line about a checkpoint that is skipped or could not be written.
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
        self._path = epath.Path(path) if is_remote(path) else epath.Path(path).resolve()
        self._keep, self._keep_every, self._say = keep, keep_every, say
        self._saving, self._failure = -1, ""
        self._problems: dict[int, str] = {}
        self._said: set[int] = set()
        self._manager: ocp.CheckpointManager | None = None
        self._silence = contextlib.ExitStack()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, intact or not."""
        self.wait()
        names = [p.name for p in self._path.iterdir()] if self._path.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> int | None:
        """The newest intact step, or None without any checkpoint; says which ones are passed over.

        Raises:
          InputError: there are checkpoints and none is intact.
        """
        return distributed.broadcast_from_first(
            "checkpoints", self._choose
        )  # one reads the files for all

    def _choose(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            if not self._problem(step):
                for skipped in (s for s in steps if s > step and s not in self._said):
                    self._said.add(skipped)
                    self._say(
                        f"checkpoint of step {skipped} is damaged, going on from step {step}: "
                        f"{self._problems[skipped]}"
                    )
                return step
        if steps:
            raise InputError(
                f"{self._path}: expected an intact checkpoint; received {len(steps)} damaged (of step "
                f"{steps[-1]}: {self._problems[steps[-1]]}); nothing was changed: bring the folder back "
                "from a copy, or choose another --workdir"
            )
        return None

    def _problem(self, step: int) -> str:
        """What is wrong with a checkpoint; empty for one that is intact. Looked at once."""
        if step not in self._problems:
            self._problems[step] = _problem_in(self._path / str(step))
        return self._problems[step]

    def save(self, step: int, state: Any) -> None:
        """Saves in the background; a step that is there already is left alone.

        A checkpoint that cannot be written (no room) is said at the next call, and the run goes on.
        """
        manager = self._open()
        self._settle()
        if step in manager.all_steps():
            return
        self._saving, self._failure = step, ""
        self._problems.pop(step, None)
        # Forced, as Orbax otherwise refuses a step below the newest one, silently.
        self._attempt(
            lambda: manager.save(
                step, args=ocp.args.StandardSave(state), force=True, custom_metadata={SEALED: True}
            )
        )

    def restore(self, state: Any, step: int | None = None) -> tuple[int, Any]:
        """The state saved at `step` (the newest intact one if None), placed like `state`.

        Args:
          state: arrays or `jax.ShapeDtypeStruct`s.
          step: of the checkpoint.

        Raises:
          InputError: there is no such checkpoint, it is damaged, or its tree or shapes are not those of `state`.
        """
        if step is None:
            step = self.latest()
        distributed.broadcast_from_first("checkpoint", lambda: self._check(step))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            with quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                return step, checkpointer.restore(
                    self._path / str(step) / ITEM, args=ocp.args.StandardRestore(target)
                )
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()
            raise InputError(
                f"checkpoint {self._path}/{step}: expected the state of this configuration; received "
                f"another one ({reason[0] if reason else type(error).__name__})"
            ) from error

    def _check(self, step: int | None) -> None:
        steps = self.steps()
        if step not in steps:
            raise InputError(
                f"checkpoint: expected one of {steps or 'none saved yet'} in {self._path}; "
                f"received {step}"
            )
        if problem := self._problem(step):
            raise InputError(
                f"checkpoint of step {step}: expected an intact one; received {problem}"
            )

    def wait(self) -> None:
        """Blocks until everything saved so far is complete."""
        if self._manager is not None:
            self._settle()

    def close(self) -> None:
        """Waits and lets go.

        Raises:
          InputError: the last checkpoint could not be written.
        """
        if self._manager is not None:
            self._settle()
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
            for step in [s for s, problem in self._problems.items() if problem]:
                self._put_aside(
                    step
                )  # or its step could not be saved again, and it would count as the newest
            kept: list[Any] = [ocp.checkpoint_managers.LatestN(self._keep)]
            if self._keep_every:
                kept.append(ocp.checkpoint_managers.EveryNSteps(self._keep_every))
            options: dict[str, Any] = {}
            if is_remote(
                self._path
            ):  # renaming a folder in a bucket copies it; Orbax knows that of gs:// only
                options["atomicity_options"] = ocp.options.AtomicityOptions(
                    ocp.options.AtomicityMode.COMMIT_FILE
                )
            self._manager = ocp.CheckpointManager(
                self._path,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                    **options,
                ),
            )
        return self._manager

    def _put_aside(self, step: int) -> None:
        aside = self._path / f"damaged_{step}"
        if distributed.is_first():
            if aside.exists():
                aside.rmtree()
            (self._path / str(step)).rename(aside)
        self._problems.pop(step)

    def _seal(self) -> None:
        """Called by Orbax on the first process when all files are there, before the checkpoint becomes visible."""
        place = self._path / f"{self._saving}{_TEMPORARY}"
        place = place if place.exists() else self._path / str(self._saving)
        files = {name: checksum(place / name) for name in files_below(place) if name not in NOTES}
        _write_manifest(place, files)

    def _seal_notes(self) -> None:
        """Adds what came after the manifest to it."""
        place = self._path / str(self._saving)
        files = read_manifest(place)
        if NOTES[0] not in files:
            _write_manifest(
                place,
                {
                    **files,
                    **{name: checksum(place / name) for name in NOTES if (place / name).exists()},
                },
            )

    def _settle(self) -> None:
        """Waits for the save under way."""

        def finish() -> None:
            self._manager.wait_until_finished()
            if self._saving in self._manager.all_steps() and distributed.is_first():
                self._seal_notes()

        self._attempt(finish)

    def _attempt(self, call: Callable[[], object]) -> None:
        """Makes a call about the save under way. One that failed is said; the next save is due at its own step."""
        try:
            call()
        except Exception as error:  # whatever the file system raises
            if not distributed.is_single_process():
                raise  # the other processes wait for this one
            self._failure = first_line(error)
            self._say(f"checkpoint of step {self._saving} could not be written: {self._failure}")
            (self._path / f"{self._saving}{_TEMPORARY}").rmtree(
                missing_ok=True
            )  # room for the next
            self._manager.reload()


def _problem_in(place: epath.Path) -> str:
    """What is wrong with the checkpoint in a folder; empty for one that is intact."""
    try:
        if (place / MANIFEST).exists():
            check_hashes(place)
            read_json(place / NOTES[0])
        elif is_remote(place) and not (place / NOTES[1]).exists():
            return f"{place}: expected a complete checkpoint; received one without {NOTES[1]}"
        elif SEALED in (place / NOTES[0]).read_text():
            return f"{place / MANIFEST}: expected the checkpoint's manifest; received none"
        else:
            _read_everything(place / ITEM)
    except InputError as error:
        return str(error)
    except Exception as error:  # Orbax and file systems raise many kinds for damage
        return f"{place}: expected a checkpoint that can be read; received {first_line(error)}"
    return ""


def _write_manifest(place: epath.Path, files: Mapping[str, Any]) -> None:
    # Without an end of line: cut anywhere, it is no JSON.
    write_whole(place / MANIFEST, json.dumps({"files": files}, indent=1))


def _read_everything(place: epath.Path) -> None:
    """Reads all arrays of a checkpoint without a manifest, in this process alone.

    That finds missing and most shortened files, not bytes that changed: arrays have no checksums.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="trial",
    )
    with (
        quiet(),
        ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
            multiprocessing_options=alone,
        ) as checkpointer,
    ):
        found = checkpointer.metadata(place).item_metadata
        if found is None:
            raise InputError(
                f"{place}: expected the metadata of a checkpoint; received none that can be read"
            )
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
        checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=how))
