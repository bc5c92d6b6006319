"""What a converted model consists of: every file with its size and SHA-256, in `manifest.json` beside them."""
from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.models.weights import read_json

MANIFEST = "manifest.json"
_CHUNK = 16_000_000  # bytes


def seal(path: pathlib.Path, progress: Callable[[int], object] = lambda _: None) -> dict[str, Any]:
    """Makes sure a file is on the disk, and gives its size and SHA-256."""
    digest, size = hashlib.sha256(), path.stat().st_size
    # One buffer for all chunks: new memory costs more than reading the disk's cache does.
    buffer = memoryview(bytearray(min(_CHUNK, max(size, 1))))
    with path.open("rb", buffering=0) as handle:
        os.fsync(handle.fileno())
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
        return {"bytes": handle.tell(), "sha256": digest.hexdigest()}


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(json.dumps(value, indent=2) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def recorded(root: pathlib.Path) -> Mapping[str, Mapping[str, Any]]:
    """Size and hash by file of a converted model.

    Raises:
      InputError: no manifest, or one that is not ours.
    """
    files = read_json(root / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(isinstance(f, dict) and {"bytes", "sha256"} <= set(f)
                                              for f in files.values()):
        raise InputError(f"{root / MANIFEST}: expected 'files' with bytes and sha256 of each; received something else")
    return files


def check_sizes(root: pathlib.Path) -> None:
    """Raises InputError when a file of the manifest is missing or of another size; quick."""
    for name, record in recorded(root).items():
        path = root / name
        size = path.stat().st_size if path.is_file() else None
        if size != record["bytes"]:
            received = "no such file" if size is None else f"{size} bytes"
            raise InputError(f"{path}: expected {record['bytes']} bytes (its manifest); received {received}")


def check_hashes(root: pathlib.Path, progress: Callable[[int], object] = lambda _: None) -> int:
    """Reads every file of the manifest; returns how many bytes.

    Raises:
      InputError: a file is missing, or its size or hash is another.
    """
    check_sizes(root)
    for name, record in recorded(root).items():
        received = seal(root / name, progress)["sha256"]
        if received != record["sha256"]:
            raise InputError(f"{root / name}: expected SHA-256 {record['sha256'][:16]}... (its manifest); received "
                             f"{received[:16]}...")
    return sum(record["bytes"] for record in recorded(root).values())
