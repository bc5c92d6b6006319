"""Whether a checkpoint is as it was written: listing and checksums, or a reading of everything without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from marble_jax.errors import InputError, one_line
from marble_jax.storage.files import is_remote, plain_path, read_json
from marble_jax.storage.leaves import quiet
from marble_jax.storage.manifest import MANIFEST, check_hashes, files_below, read_manifest
from marble_jax.validation import short

ITEM = "default"
FINAL_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes last of all, after the manifest: dates and a marker, nothing of the state."""
HAS_MANIFEST = "has_manifest"
"""In Orbax's metadata: tells a checkpoint that lost its manifest from one that never had any."""


def problem_in(place: epath.Path) -> str:
    """Returns what is wrong with the checkpoint in a folder; empty for one that is intact."""
    try:
        _check_intact(place)
    except InputError as error:
        return str(error)
    except Exception as error:  # Orbax and file systems raise many kinds for damage
        return f"{place}: expected a checkpoint that can be read; received {one_line(error, 200)}"
    return ""


def _check_intact(place: epath.Path) -> None:
    if (place / MANIFEST).exists():
        _check_listing(place)
        check_hashes(place)
        # A kill between the manifest and its second writing leaves this file without a checksum.
        read_json(place / FINAL_FILES[0])
        return
    if is_remote(place) and not (place / FINAL_FILES[1]).exists():
        raise InputError(
            f"{place}: expected a complete checkpoint; received one without {FINAL_FILES[1]}"
        )
    if HAS_MANIFEST in (place / FINAL_FILES[0]).read_text():
        raise InputError(f"{place / MANIFEST}: expected the checkpoint's manifest; received none")
    _read_everything(place / ITEM)


def _check_listing(place: epath.Path) -> None:
    """Raises InputError unless a manifest is of this step and lists every file of the checkpoint."""
    step = read_json(place / MANIFEST).get("step", place.name)
    if str(step) != place.name:
        raise InputError(
            f"{place / MANIFEST}: expected the state of step {place.name}; received that of step {short(step)}"
        )
    listed = set(read_manifest(place))
    for name in files_below(place):
        # The last files are listed when the manifest is written again, which a kill can come before.
        if name not in listed and name not in (MANIFEST, *FINAL_FILES):
            raise InputError(
                f"{place / name}: expected a file of its manifest; received another one"
            )


def read_back(place: epath.Path) -> None:
    """Reads the smallest array of a checkpoint, in this process alone.

    That is cheap, and finds a checkpoint whose parts were not put together: then no array can be read.

    Raises:
      Exception: of many kinds, where it cannot be read.
    """
    place = plain_path(place)
    with _reader("read_back") as reader:
        metadata = reader.metadata(place).item_metadata
        if metadata is None:
            raise OSError("no metadata that can be read")
        leaves, structure = jax.tree.flatten(metadata.tree)
        sizes = [int(np.prod(leaf.shape)) for leaf in leaves]
        smallest = int(np.argmin(sizes))
        target = jax.tree.unflatten(
            structure, [0 if index == smallest else ocp.PLACEHOLDER for index in range(len(leaves))]
        )
        arguments = ocp.RestoreArgs(restore_type=np.ndarray)
        restore_args = jax.tree.unflatten(structure, [arguments] * len(leaves))
        reader.restore(place, args=ocp.args.PyTreeRestore(target, restore_args=restore_args))


@contextlib.contextmanager
def _reader(key: str) -> Iterator[ocp.Checkpointer]:
    """What one process reads by itself with: Orbax would otherwise wait for the others, which do not read."""
    options = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=key,
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with quiet(), ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        yield checkpointer


def _read_everything(place: epath.Path) -> None:
    """Reads all arrays of a checkpoint without a manifest, in this process alone.

    That finds missing and most shortened files, not bytes that changed: arrays have no checksums.
    """
    place = plain_path(place)
    with _reader("trial") as reader:
        metadata = reader.metadata(place).item_metadata
        if metadata is None:
            raise InputError(
                f"{place}: expected the metadata of a checkpoint; received none that can be read"
            )
        # As host arrays, whatever devices the checkpoint was saved from.
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
        )
        reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=restore_args))
