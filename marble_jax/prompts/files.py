"""Prompt files in the formats users have: one prompt a line, lists, tables, or GenEval's metadata.

A prompt directory holds a folder per source with a file per split: `general/train.txt`, `ocr/test.txt`,
`geneval/test_metadata.jsonl`. The sources' names are free; their order is alphabetical.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marble_jax.errors import InputError, nearest
from marble_jax.prompts.hub_sets import is_on_hub, local_copy
from marble_jax.prompts.parquet_files import parquet_records
from marble_jax.prompts.prompt_text import check_prompt
from marble_jax.prompts.structured import PARQUET, TABLES, Record, format_of, records_of
from marble_jax.storage.file_kinds import SHOWN_BYTES, kind_of_content
from marble_jax.storage.files import local_path

SPLIT_SUFFIXES = (
    ".txt",
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".yaml",
    ".yml",
)
"""Endings of the files of a prompt directory; YAML is refused when it is read."""
MOST_BYTES = 1 << 28
"""Of a prompt file; a million prompts have less."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      text: what the model is asked for.
      source: name of the set it is from; decides how often it is drawn.
      metadata: GenEval's description of what must be seen; empty for plain prompts.
    """

    text: str
    source: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_text(path: Path | str, source: str) -> list[Prompt]:
    """Prompts of a text file: one a line, stripped, blank lines dropped.

    Args:
      path: the file, UTF-8.
      source: name of the set.

    Raises:
      InputError: no such file, not UTF-8, a line that is no prompt, or no prompt at all.
    """
    return _prompts(path, source, _text_records(_content(path)))


def read_file(path: Path | str, source: str = "") -> list[Prompt]:
    """Prompts of one file in any of `structured.FORMATS`, told by its name and its content.

    Args:
      path: the file, or its `hf://` path. `FILE#COLUMN` names the column of a table.
      source: name of the set; by default the folder's name for `train` and `test` files, else the file's own.

    Raises:
      InputError: no such file, not UTF-8, another format, a line that is no prompt, or no prompt at all.
    """
    path, column = _file_and_column(path)
    if not source:
        source = path.stem.removesuffix("_metadata")
        # Named for its split, the file lies in a prompt directory, where the folder is named for
        # the source.
        if source in ("train", "test"):
            # Links are not followed: the files of a download cache have other names.
            source = Path(os.path.abspath(path)).parent.name
    if path.suffix.lower() == PARQUET:
        return _read_parquet(path, source, column)
    content = _content(path)
    try:
        kind = format_of(path.suffix, content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if column and kind not in TABLES:
        raise InputError(
            f"{path}: expected a column ({column!r}) with a table alone, of CSV, TSV or Parquet; received "
            f"a file of {kind}"
        )
    if kind == "text":
        return _prompts(path, source, _text_records(content))
    return _structured(path, source, kind, content, column)


def is_prompt_file(place: str) -> bool:
    """Returns whether a place is a file as `read_file` takes it, and not a directory or nothing."""
    return _file_and_column(place)[0].is_file()


def _file_and_column(place: Path | str) -> tuple[Path, str]:
    """The local file of `FILE[#COLUMN]`, downloaded if it is on the Hub, and the column."""
    if isinstance(place, str) and is_on_hub(place):
        path = local_copy(place)
    else:
        path = local_path(place)
    name, mark, column = path.name.rpartition("#")
    # A file may well have the sign in its name.
    if not mark or not name or path.exists():
        return path, ""
    return path.with_name(name), column


def _read_parquet(path: Path, source: str, column: str) -> list[Prompt]:
    _check_size(path)
    try:
        records = list(parquet_records(path, column))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return _prompts(path, source, records)


def _structured(
    path: Path | str, source: str, kind: str, content: str, column: str = ""
) -> list[Prompt]:
    try:
        records = list(records_of(kind, content, column))
    except InputError as error:
        # What begins with the number of a line goes on as `FILE:LINE`.
        separator = ":" if str(error)[:1].isdigit() else ": "
        raise InputError(f"{path}{separator}{error}") from None
    return _prompts(path, source, records)


def _text_records(content: str) -> Iterator[Record]:
    # Not `splitlines`, which also ends lines at characters that may stand within a prompt, such as
    # U+2028.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line, {}


def _prompts(path: Path | str, source: str, records: Iterable[Record]) -> list[Prompt]:
    """Checked prompts of a file's records."""
    prompts = []
    for number, text, metadata in records:
        try:
            prompts.append(Prompt(check_prompt(text), source, metadata))
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise InputError(f"{path}: expected at least one prompt; received an empty file")
    return prompts


def read_directory(
    directory: Path | str, split: str, names: Sequence[str] | None = None
) -> dict[str, list[Prompt]]:
    """The prompts of one split, by source in alphabetical order.

    Args:
      directory: with a folder per source, each holding `{split}.txt`, `{split}_metadata.jsonl` or the split in
        another of the formats; folders without it are passed over.
      split: "train" or "test".
      names: sources to read; None reads all that have the split.

    Raises:
      InputError: no such directory, no source with the split, a source asked for that is not there, a source with
        two files, or a malformed file.
    """
    if isinstance(directory, str) and is_on_hub(directory):
        directory = local_copy(directory)
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"prompt directory {directory}: expected a folder per source; received no such directory"
        )
    sources = {}
    for name, folder in _folders(directory).items():
        # What is not asked for is not looked at either: it may be malformed.
        if names is not None and name not in names:
            continue
        file = _split_file(folder, split)
        if file is not None:
            sources[name] = read_file(file, name)
    _require_sources(directory, split, sources, names or ())
    return sources


def _require_sources(
    directory: Path, split: str, present: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Checks that there is a source with the split, and that all in `names` have it."""
    for name in names:
        if name not in present:
            hint = nearest(name, _folders(directory))
            raise InputError(
                f"prompt directory {directory}: expected {name}/{split}.txt or "
                f"{name}/{split}_metadata.jsonl; received neither{hint}"
            )
    if not present:
        hint = nearest(split, _splits(directory))
        raise InputError(
            f"prompt directory {directory}: expected SOURCE/{split}.txt or SOURCE/{split}_metadata.jsonl; "
            f"received neither{hint}"
        )


def _folders(directory: Path) -> dict[str, Path]:
    """Folders of a prompt directory by name, in alphabetical order."""
    folders = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            folders[path.name] = path
    return folders


def _split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a source's folder; None without one.

    Raises:
      InputError: there are two.
    """
    files = [file for file in sorted(folder.iterdir()) if split_of(file) == split]
    if not files:
        return None
    if len(files) > 1:
        raise InputError(
            f"{folder}: expected one file of {split}; received {files[0].name} and {files[1].name}"
        )
    return files[0]


def split_of(file: Path) -> str:
    """Returns the split that a file of a prompt directory is for, by its name; empty for other files."""
    # Also what is not read, such as YAML: reading it says so, where passing over it would lose a source.
    if file.suffix.lower() not in SPLIT_SUFFIXES or file.name.startswith(".") or not file.is_file():
        return ""
    return file.stem.removesuffix("_metadata")


def _splits(directory: Path) -> list[str]:
    """Names of the splits that a prompt directory has, in alphabetical order."""
    return sorted({split_of(file) for file in directory.glob("*/*")} - {""})


def _content(path: Path | str) -> str:
    file = Path(path)
    _check_size(file)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a prompt file; received {error.strerror}") from error
    other = kind_of_content(raw[:SHOWN_BYTES])
    if other and raw:
        raise InputError(f"{path}: expected a prompt file; received {other}")
    try:
        # Files from Windows may begin with a byte order mark, which would become part of the first
        # prompt.
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: expected UTF-8 text; received byte {raw[error.start]:#04x} "
            f"at offset {error.start}"
        ) from error
    # Ends of lines of Windows and of old Macs.
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _check_size(file: Path) -> None:
    """Raises InputError where there is no file, or one that is too large."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: expected a prompt file; received {error.strerror}") from error
    if size > MOST_BYTES:
        raise InputError(
            f"{file}: expected a prompt file of at most {MOST_BYTES} bytes; received {size}"
        )
