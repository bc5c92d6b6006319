"""What files hold, as one hash: tells whether something computed from a model still belongs to it."""

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
      folders: below it; one that is not there counts as empty.
      known: file hashes of an earlier call, which spare reading files whose size and time of change are the same.

    Returns:
      The hash, in hexadecimal, and the file hashes for a later call: `{path: [bytes, nanoseconds, hash]}`.
    """
    hashes: dict[str, Any] = {}
    parts = []
    for name in folders:
        for file in sorted(p for p in (root / name).rglob("*") if p.is_file()):
            status, path = file.stat(), str(file.resolve())
            stamp = [status.st_size, status.st_mtime_ns]
            entry = (known or {}).get(path)
            if not isinstance(entry, list) or entry[:2] != stamp:
                with file.open("rb") as handle:
                    entry = [*stamp, hashlib.file_digest(handle, "sha256").hexdigest()]
            hashes[path] = entry
            parts.append([str(file.relative_to(root)), entry[2]])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest(), hashes
