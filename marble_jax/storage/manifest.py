"""Manifest of a folder: every file of it with its size and SHA-256, in `manifest.json` beside them.

Folders are those of converted models and of checkpoints; the latter may be in a bucket.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import is_remote, read_json, write_whole
from marble_jax.validation import Natural, short, validated

MANIFEST = "manifest.json"
SHOWN_DIGITS = 16
"""Digits of a hash in errors."""
_CHUNK = 16_000_000  # bytes


def _ignore(num_bytes: int) -> None:
    """Progress that nobody watches."""


def checksum(path: epath.PathLike, progress: Callable[[int], object] = _ignore) -> dict[str, Any]:
    """Makes sure a file is on the disk, and returns its `bytes` and `sha256`.

    Args:
      path: of the file.
      progress: called with the number of bytes that were read, again and again.
    """
    file = epath.Path(path)
    digest = hashlib.sha256()
    size = 0
    # One buffer for all chunks: new memory costs more than reading the disk's cache does.
    buffer = memoryview(bytearray(min(_CHUNK, max(file.stat().length, 1))))
    with file.open("rb") as handle:
        # A bucket keeps what it has confirmed, and has no descriptor to synchronise.
        if not is_remote(file):
            os.fsync(handle.fileno())
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            progress(count)
    return {"bytes": size, "sha256": digest.hexdigest()}


def files_below(root: epath.PathLike, inner: str = "") -> Iterator[str]:
    """Yields the names of all files below a folder, relative to it, in order.

    Args:
      root: the folder.
      inner: folder below it to begin at, with a `/` at its end.
    """
    for path in sorted((epath.Path(root) / inner).iterdir()):
        name = f"{inner}{path.name}"
        if path.is_dir():
            yield from files_below(root, f"{name}/")
        else:
            yield name


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a file whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_manifest(root: epath.PathLike) -> Mapping[str, Mapping[str, Any]]:
    """Returns `bytes` and `sha256` by file of a folder.

    Raises:
      InputError: no manifest, or one that is not ours.
    """
    path = epath.Path(root) / MANIFEST
    files = validated(dict[str, dict[str, Any]], read_json(path).get("files"), f"{path}: files")
    for name, record in files.items():
        where = f"{path}: files[{name!r}]"
        parts = name.split("/")
        # Compared with files of the folder alone, wherever a name would lead.
        if "" in parts or ".." in parts or "." in parts:
            raise InputError(f"{where}: expected a name below the folder; received {short(name)}")
        validated(Natural, record.get("bytes"), f"{where}: bytes")
        validated(str, record.get("sha256"), f"{where}: sha256")
    return files


def check_sizes(root: epath.PathLike) -> None:
    """Compares sizes with a folder's manifest, which is quick.

    Raises:
      InputError: a file of the manifest is missing or of another size.
    """
    for name, record in read_manifest(root).items():
        path = epath.Path(root) / name
        size = _size_of(path)
        if size != record["bytes"]:
            received = "no such file" if size is None else f"{size} bytes"
            raise InputError(
                f"{path}: expected {record['bytes']} bytes (its manifest); received {received}"
            )


def _size_of(path: epath.Path) -> int | None:
    # A folder in a file's place has a length as well.
    if path.is_dir() or not path.exists():
        return None
    return path.stat().length


def check_hashes(root: epath.PathLike, progress: Callable[[int], object] = _ignore) -> int:
    """Reads every file of a folder's manifest, and returns the number of bytes.

    Args:
      root: the folder.
      progress: as in `checksum`.

    Raises:
      InputError: a file is missing, or its size or hash is another.
    """
    check_sizes(root)
    total = 0
    for name, record in read_manifest(root).items():
        path = epath.Path(root) / name
        received = checksum(path, progress)["sha256"]
        if received != record["sha256"]:
            raise InputError(
                f"{path}: expected SHA-256 {record['sha256'][:SHOWN_DIGITS]}... (its manifest); received "
                f"{received[:SHOWN_DIGITS]}..."
            )
        total += record["bytes"]
    return total
