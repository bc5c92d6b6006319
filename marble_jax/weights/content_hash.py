"""One hash over the contents of files: tells whether something computed from a model still belongs to it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


def content_hash(
    root: pathlib.Path, folders: Iterable[str], known: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Hash of names and contents of every file in some folders of a directory.

    Args:
      root: the directory; where it lies does not count.
      folders: below it; one that does not exist counts as empty.
      known: file hashes of an earlier call, which spare reading files whose size and time of change are the same.

    Returns:
      The hash, in hexadecimal, and the file hashes for a later call: `{path: [bytes, nanoseconds, hash]}`.
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
            parts.append([str(file.relative_to(root)), hashes[path][2]])
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest(), hashes


def _file_record(file: pathlib.Path, earlier: Any) -> list[Any]:
    """[bytes, nanoseconds, hash] of a file; the earlier record where size and time are the same."""
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    # The record comes from a file that anyone may have edited: what is not a list is no record.
    if isinstance(earlier, list) and earlier[:2] == stamp:
        return earlier
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
    return [*stamp, digest.hexdigest()]
