"""One hash over the contents of files: tells whether something computed from a model still belongs to it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""Samples of a file, evenly spread, and the bytes of each."""


def content_hash(
    root: pathlib.Path, folders: Iterable[str], known: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Hash of names and contents of every file in some folders of a directory.

    Args:
      root: the directory; where it lies does not count.
      folders: below it; one that does not exist counts as empty.
      known: file hashes of an earlier call, which spare reading files that have the same stamp (see `_stamp`).

    Returns:
      The hash, in hexadecimal, and the file hashes for a later call: `{path: [stamp, hash]}`.
    """
    earlier = known or {}
    hashes: dict[str, Any] = {}
    parts = []
    for folder in folders:
        # Sorted, as the order in which a file system lists files says nothing about the model.
        for file in sorted((root / folder).rglob("*")):
            if not file.is_file():
                continue
            # Resolved, so that two links to one file of a download cache are hashed once.
            path = str(file.resolve())
            hashes[path] = _file_record(file, earlier.get(path))
            parts.append([str(file.relative_to(root)), hashes[path][1]])
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest(), hashes


def _file_record(file: pathlib.Path, earlier: Any) -> list[Any]:
    """[stamp, hash] of a file; the earlier record where the stamp is the same."""
    stamp = _stamp(file)
    # The record comes from a file that anyone may have edited.
    if isinstance(earlier, list) and len(earlier) == 2 and earlier[0] == stamp:
        return earlier
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
    return [stamp, digest.hexdigest()]


def _stamp(file: pathlib.Path) -> list[Any]:
    """What changes with a file: size, both times, its number in the file system, and a hash of samples of its bytes.

    Copies that keep the time, archives and images of containers set the time of the last write to whatever they like,
    but not that of the last change; where a file system has no such thing, the samples tell another model's weights.
    """
    status = file.stat()
    samples = hashlib.sha256()
    with file.open("rb") as handle:
        for number in range(_SAMPLES):
            handle.seek(status.st_size * number // _SAMPLES)
            samples.update(handle.read(_SAMPLE_BYTES))
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [status.st_size, *times, status.st_ino, samples.hexdigest()[:16]]
