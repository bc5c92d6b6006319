"""What a folder consists of: every file with its size and SHA-256, in `manifest.json` beside them.

Folders are those of converted models and of checkpoints; the latter may be in a bucket.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import is_remote, read_json, write_whole

MANIFEST = "manifest.json"
_CHUNK = 16_000_000  # bytes

Folder = pathlib.Path | epath.Path


def checksum(path: Folder, progress: Callable[[int], object] = lambda _: None) -> dict[str, Any]:
    """Makes sure a file is on the disk, and gives its size and SHA-256."""
    path, digest, size = epath.Path(path), hashlib.sha256(), 0
    # One buffer for all chunks: new memory costs more than reading the disk's cache does.
    buffer = memoryview(bytearray(min(_CHUNK, max(path.stat().length, 1))))
    with path.open("rb") as handle:
        if not is_remote(path):
            os.fsync(handle.fileno())
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            progress(count)
    return {"bytes": size, "sha256": digest.hexdigest()}


def files_below(root: Folder, inner: str = "") -> Iterator[str]:
    """Names of all files below a folder, relative to it."""
    for path in sorted((root / inner).iterdir()):
        name = f"{inner}{path.name}"
        if path.is_dir():
            yield from files_below(root, f"{name}/")
        else:
            yield name


def write_json(path: Folder, value: Any) -> None:
    """Writes a file whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_manifest(root: Folder) -> Mapping[str, Mapping[str, Any]]:
    """Size and hash by file of a folder.

    Raises:
      InputError: no manifest, or one that is not ours.
    """
    files = read_json(root / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(f, dict) and {"bytes", "sha256"} <= set(f) for f in files.values()
    ):
        raise InputError(
            f"{root / MANIFEST}: expected 'files' with bytes and sha256 of each; received something else"
        )
    return files


def check_sizes(root: Folder) -> None:
    """Raises InputError when a file of the manifest is missing or of another size; quick."""
    for name, record in read_manifest(root).items():
        path = epath.Path(root) / name
        size = path.stat().length if path.exists() and not path.is_dir() else None
        if size != record["bytes"]:
            received = "no such file" if size is None else f"{size} bytes"
            raise InputError(
                f"{path}: expected {record['bytes']} bytes (its manifest); received {received}"
            )


def check_hashes(root: Folder, progress: Callable[[int], object] = lambda _: None) -> int:
    """Reads every file of the manifest; returns how many bytes.

    Raises:
      InputError: a file is missing, or its size or hash is another.
    """
    check_sizes(root)
    files = read_manifest(root)
    for name, record in files.items():
        received = checksum(root / name, progress)["sha256"]
        if received != record["sha256"]:
            raise InputError(
                f"{root / name}: expected SHA-256 {record['sha256'][:16]}... (its manifest); received "
                f"{received[:16]}..."
            )
    return sum(record["bytes"] for record in files.values())
