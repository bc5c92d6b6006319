"""Prompt files and prompt directories of data sets on the Hugging Face Hub, by `hf://` path."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from marble_jax.errors import InputError
from marble_jax.weights.hub import SCHEME, download, hub_path

ENDINGS = ("txt", "json", "jsonl", "ndjson", "csv", "tsv", "parquet")
"""Of the files that a prompt directory may have."""


def is_on_hub(place: object) -> bool:
    """Returns whether a place is an `hf://` path."""
    return isinstance(place, str) and place.startswith(SCHEME)


def local_copy(place: str) -> Path:
    """The local copy of a prompt file or prompt directory of the Hub, downloaded unless it is in the cache.

    Args:
      place: `hf://datasets/OWNER/NAME[@REVISION][/PATH]`; PATH may end with `#COLUMN`, which stays.

    Raises:
      InputError: another text, no such data set, or nothing in it at PATH.
    """
    path = hub_path(place)
    inside, mark, column = path.inside.partition("#")
    if PurePosixPath(inside).suffix[1:].lower() in ENDINGS:
        patterns = [inside]
    else:
        prefix = f"{inside}/" if inside else ""
        patterns = [f"{prefix}*.{ending}" for ending in ENDINGS]
    root = download(path.name, patterns, kind=path.kind)
    local = root / inside
    if not local.exists():
        raise InputError(
            f"{place}: expected a prompt file ({', '.join(ENDINGS)}) or a folder of them; received a repository "
            f"without {inside or 'any'}"
        )
    return local.with_name(f"{local.name}{mark}{column}") if mark else local
