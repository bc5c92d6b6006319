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

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


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

    Raises:
      InputError: no such file, not UTF-8, or no prompt in it.
    """
    return _some(path, [Prompt(line, source) for _, line in _lines(path)])


def read_geneval(path: Path | str, source: str) -> list[Prompt]:
    """Prompts of a GenEval `*_metadata.jsonl` file, with the whole object as metadata.

    Raises:
      InputError: no such file, not UTF-8, no prompt in it, or a line that is not such an object.
    """
    prompts = []
    for number, line in _lines(path):
        try:
            data = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: expected a JSON object; received {_short(line)} ({error})"
            ) from error
        problem = _geneval_problem(data)
        if problem:
            raise InputError(f"{path}:{number}: {problem}")
        prompts.append(Prompt(data["prompt"].strip(), source, data))
    return _some(path, prompts)


def read_file(path: Path | str, source: str = "") -> list[Prompt]:
    """Prompts of one file: GenEval metadata if its name ends in `.jsonl`, else one prompt a line.

    Args:
      path: the file.
      source: name of the set; by default the folder's name for `train` and `test` files, else the file's own.

    Raises:
      InputError: as `read_text` and `read_geneval`.
    """
    path = Path(path)
    stem = path.stem.removesuffix("_metadata")
    source = source or (path.resolve().parent.name if stem in ("train", "test") else stem)
    return read_geneval(path, source) if path.suffix == ".jsonl" else read_text(path, source)


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
    for folder in sorted(p for p in directory.iterdir() if p.is_dir()):
        text, geneval = folder / f"{split}.txt", folder / f"{split}_metadata.jsonl"
        if names is not None and folder.name not in names:
            continue
        if text.exists() and geneval.exists():
            raise InputError(f"{folder}: expected {text.name} or {geneval.name}; received both")
        if text.exists():
            sources[folder.name] = read_text(text, folder.name)
        elif geneval.exists():
            sources[folder.name] = read_geneval(geneval, folder.name)
    absent = [name for name in names or () if name not in sources]
    if absent:
        present = sorted(p.name for p in directory.iterdir() if p.is_dir())
        raise InputError(
            f"prompt directory {directory}: expected {absent[0]}/{split}.txt or "
            f"{absent[0]}/{split}_metadata.jsonl; received neither{nearest(absent[0], present)}"
        )
    if not sources:
        files = [f.name for f in directory.glob("*/*") if f.is_file()]
        splits = {name.removesuffix(".txt").removesuffix("_metadata.jsonl") for name in files}
        raise InputError(
            f"prompt directory {directory}: expected SOURCE/{split}.txt or SOURCE/{split}_metadata.jsonl; "
            f"received neither{nearest(split, sorted(splits))}"
        )
    return sources


def _lines(path: Path | str) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and stripped lines, blank ones left out."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: expected a prompt file; received {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text; received byte {error.object[error.start]:#04x} "
            f"at offset {error.start}"
        ) from error
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _some(path: Path | str, prompts: list[Prompt]) -> list[Prompt]:
    if not prompts:
        raise InputError(f"{path}: expected at least one prompt; received an empty file")
    return prompts


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _keys(data: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, data)) or "no keys"


def _geneval_problem(data: Any) -> str:
    """What is wrong with a line of GenEval metadata, or an empty string."""
    if not isinstance(data, dict):
        return f"expected a JSON object; received {_short(data)}"
    for key in ("tag", "include", "prompt"):
        if key not in data:
            return f"expected the key {key!r}; received {_keys(data)}{nearest(key, data)}"
    if data["tag"] not in TAGS:
        return f"tag: expected one of {', '.join(TAGS)}; received {_short(data['tag'])}{nearest(data['tag'], TAGS)}"
    if not isinstance(data["prompt"], str) or not data["prompt"].strip():
        return f"prompt: expected a text; received {_short(data['prompt'])}"
    if not isinstance(data["include"], list) or not data["include"]:
        return (
            f"include: expected a list of at least one clause; received {_short(data['include'])}"
        )
    if not isinstance(data.get("exclude", []), list):
        return f"exclude: expected a list of clauses; received {_short(data['exclude'])}"
    for part in ("include", "exclude"):
        for index, clause in enumerate(data.get(part, [])):
            problem = _clause_problem(clause, index)
            if problem:
                return f"{part}[{index}]: {problem}"
    return ""


def _clause_problem(clause: Any, index: int) -> str:
    """What is wrong with a clause, the `index`-th of its list, or an empty string."""
    if not isinstance(clause, dict):
        return f"expected an object; received {_short(clause)}"
    for key in ("class", "count"):
        if key not in clause:
            return f"expected the key {key!r}; received {_keys(clause)}{nearest(key, clause)}"
    if type(clause["count"]) is not int or clause["count"] < 1:
        return f"count: expected a positive integer; received {_short(clause['count'])}"
    if "position" in clause:
        place = clause["position"]
        if not isinstance(place, list) or len(place) != 2 or place[1] not in range(index):
            return f"position: expected [relation, index of an earlier clause]; received {_short(place)}"
        if place[0] not in RELATIONS:
            return (
                f"position: expected one of {', '.join(RELATIONS)}; received {_short(place[0])}"
                f"{nearest(place[0], RELATIONS)}"
            )
    return ""
