"""Models in buckets: the folders of one that a run reads, copied to this machine once."""

from __future__ import annotations

import hashlib
import os
import pathlib
import secrets
from collections.abc import Iterator, Sequence

from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import location

INDEX = "model_index.json"
BLOCK = 1 << 24
"""Bytes copied at once."""


def local_copy(url: str, folders: Sequence[str], cache: pathlib.Path | None = None) -> pathlib.Path:
    """Copies a model's index and some of its folders; a file that is here with the size it has there is not copied.

    Args:
      url: of a directory in diffusers' layout, `gs://...` or `s3://...`.
      folders: components to copy.
      cache: where copies are kept, a folder for every URL; `~/.cache/marble_jax/models` by default.

    Returns:
      The local directory.

    Raises:
      InputError: a bucket that cannot be reached, a directory without an index, or a copy that fails.
    """
    source = location("model.path", url)
    if not (source / INDEX).exists():
        raise InputError(
            f"model.path: expected a directory with {INDEX}, in diffusers' layout; received {url}"
        )
    if cache is None:
        cache = pathlib.Path.home() / ".cache" / "marble_jax" / "models"
    target = cache / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:24]
    try:
        _copy(source / INDEX, target / INDEX)
        for folder in folders:
            if not (source / folder).is_dir():
                continue
            for file in _files_below(source / folder):
                _copy(file, target / folder / os.fspath(file.relative_to(source / folder)))
    except OSError as error:
        raise InputError(
            f"model.path: expected room and access to copy {url} to {target}; received "
            f"{error.strerror or error}"
        ) from error
    return target


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for place in sorted(folder.iterdir()):
        if place.is_dir():
            yield from _files_below(place)
        else:
            yield place


def _copy(source: epath.Path, target: pathlib.Path) -> None:
    """Copies a file whole or not at all, also when several processes of a host do."""
    if target.is_file() and target.stat().st_size == source.stat().length:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(8)}.partial"
    try:
        with source.open("rb") as reader, partial.open("wb") as writer:
            while block := reader.read(BLOCK):
                writer.write(block)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
