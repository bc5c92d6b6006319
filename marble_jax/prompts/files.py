"""Prompt files in the formats users have: one prompt a line, or GenEval's metadata, one JSON object a line.

A prompt directory holds a folder per source with a file per split: `general/train.txt`, `ocr/test.txt`,
`geneval/test_metadata.jsonl`. The sources' names are free; their order is alphabetical.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marble_jax.errors import InputError, nearest
from marble_jax.prompts.geneval_metadata import check_geneval, short


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
      InputError: no such file, not UTF-8, or no prompt in it.
    """
    prompts = [Prompt(line, source) for _, line in _lines(path)]
    _require_prompts(path, prompts)
    return prompts


def read_geneval(path: Path | str, source: str) -> list[Prompt]:
    """Prompts of a GenEval `*_metadata.jsonl` file, with the whole object as metadata.

    Args:
      path: the file, UTF-8.
      source: name of the set.

    Raises:
      InputError: no such file, not UTF-8, no prompt in it, or a line that is not such an object.
    """
    prompts = []
    for number, line in _lines(path):
        try:
            data = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: expected a JSON object; received {short(line)} ({error})"
            ) from error
        try:
            check_geneval(data)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        prompts.append(Prompt(data["prompt"].strip(), source, data))
    _require_prompts(path, prompts)
    return prompts


def read_file(path: Path | str, source: str = "") -> list[Prompt]:
    """Prompts of one file: GenEval metadata if its name ends in `.jsonl`, else one prompt a line.

    Args:
      path: the file.
      source: name of the set; by default the folder's name for `train` and `test` files, else the file's own.

    Raises:
      InputError: as `read_text` and `read_geneval`.
    """
    path = Path(path)
    if not source:
        source = path.stem.removesuffix("_metadata")
        # Named for its split, the file lies in a prompt directory, where the folder is named for
        # the source.
        if source in ("train", "test"):
            source = path.resolve().parent.name
    if path.suffix == ".jsonl":
        return read_geneval(path, source)
    return read_text(path, source)


def read_directory(
    directory: Path | str, split: str, names: Sequence[str] | None = None
) -> dict[str, list[Prompt]]:
    """The prompts of one split, by source in alphabetical order.

    Args:
      directory: with a folder per source, each holding `{split}.txt` or `{split}_metadata.jsonl`; folders without
        the split are passed over.
      split: "train" or "test".
      names: sources to read; None reads all that have the split.

    Raises:
      InputError: no such directory, no source with the split, a source asked for that is not there, a source with
        both files, or a malformed file.
    """
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
    text = folder / f"{split}.txt"
    geneval = folder / f"{split}_metadata.jsonl"
    if not geneval.exists():
        return text if text.exists() else None
    if text.exists():
        raise InputError(f"{folder}: expected {text.name} or {geneval.name}; received both")
    return geneval


def _splits(directory: Path) -> list[str]:
    """Names of the splits that a prompt directory has, in alphabetical order."""
    splits = set()
    for file in directory.glob("*/*"):
        if file.is_file():
            splits.add(file.name.removesuffix(".txt").removesuffix("_metadata.jsonl"))
    return sorted(splits)


def _lines(path: Path | str) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and stripped lines, blank ones left out."""
    # Not `splitlines`, which also ends lines at characters that may stand within a prompt, such as
    # U+2028.
    lines = _content(path).split("\n")
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if stripped:
            yield number, stripped


def _content(path: Path | str) -> str:
    try:
        # Files from Windows may begin with a byte order mark, which would become part of the first
        # prompt.
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: expected a prompt file; received {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text; received byte {error.object[error.start]:#04x} "
            f"at offset {error.start}"
        ) from error


def _require_prompts(path: Path | str, prompts: list[Prompt]) -> None:
    if not prompts:
        raise InputError(f"{path}: expected at least one prompt; received an empty file")
