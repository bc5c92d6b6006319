"""Prompt files that are JSON, JSON lines, CSV or TSV, whatever they are called: which format, and the prompts in it.

What a file is shows in its content as well as in its name: a list saved as `prompts.txt` is a list all the same, and
none of its brackets is a prompt.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.prompts.geneval_metadata import check_geneval, short
from marble_jax.validation import parse_json

FORMATS = (
    "one prompt a line, a JSON list or JSON lines of texts or of objects with 'prompt', GenEval metadata, "
    "CSV, TSV or Parquet with a column 'prompt' (or FILE#COLUMN)"
)
"""The formats that are read, for messages."""
TABLES = ("csv", "tsv")
PARQUET = ".parquet"
KEYS = ("prompt", "text", "caption")
"""Keys and columns of a prompt, in the order in which they are looked for."""
Record = tuple[int, Any, Mapping[str, Any]]
"""Line number from 1, prompt and what comes with it."""

_YAML = re.compile(r"\A(---\s*$|%YAML|[A-Za-z_][\w -]*:\s*(\||>)?[-+]?\s*$)", re.MULTILINE)
_HEADER_CELL = re.compile(r"[\w #./()-]{1,40}")
_LIST_MARKS = {
    "a list with stars": re.compile(r"\s*\* "),
    "a numbered list": re.compile(r"\s*[0-9]{1,6}[.)] "),
}
"""Marks that are no part of a prompt, where every line has them."""
_ITEM = re.compile(r"""\s*(["']).*\1\s*,\s*$""")
"""A line of a list of JSON or Python."""
_BEGINNINGS = {
    "what begins like JSON and is none": ("[\n", "{\n", '["', '[{"', '{"'),
    "what begins like a list of Python": ("['", "{'", "[{'"),
    "rich text": ("{\\rtf",),
}
"""Beginnings of files that are no prompts and yet are text."""


def format_of(suffix: str, content: str) -> str:
    """Returns what a prompt file is: "text", "json", "jsonl", "csv" or "tsv".

    Args:
      suffix: ending of its name, with the dot.
      content: its text.

    Raises:
      InputError: a format that is not read; the message does not name the file.
    """
    suffix = suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix in (".json", ".csv", ".tsv"):
        return suffix[1:]
    lines = [line for line in content.split("\n") if line.strip()]
    if suffix in (".yaml", ".yml") or _is_yaml(content.strip(), lines):
        raise InputError(f"expected {FORMATS}; received YAML")
    if suffix in (".xml", ".html", ".htm", ".toml", ".ini", ".xlsx", ".py", ".csv.gz"):
        raise InputError(f"expected {FORMATS}; received a {suffix} file")
    return _format_by_content(content.strip(), lines)


def _is_yaml(content: str, lines: list[str]) -> bool:
    if _YAML.match(content):
        return True
    # A list of YAML, or of Markdown, whose dashes are no part of the prompts.
    return len(lines) > 1 and all(line.lstrip().startswith("- ") for line in lines)


def _format_by_content(content: str, lines: list[str]) -> str:
    if _is_json(content):
        return "json"
    if lines and all(line.lstrip().startswith(("{", "[")) for line in lines):
        if all(map(_is_json, lines)):
            return "jsonl"
    if lines:
        for name, separator in (("tsv", "\t"), ("csv", ","), ("csv", ";")):
            if _is_header(lines[0].split(separator)):
                return name
    other = _other_text(content, lines)
    if other:
        raise InputError(f"expected {FORMATS}; received {other}")
    return "text"


def _other_text(content: str, lines: list[str]) -> str:
    """What a text is whose lines are no prompts as they stand; empty where they are."""
    # Half of a list is no list, and yet its lines are no prompts.
    for name, beginnings in _BEGINNINGS.items():
        if content.startswith(beginnings):
            return name
    # One line of that look may well be a prompt.
    if len(lines) < 2:
        return ""
    first = lines[0].strip()
    if first.strip('"').lower() in KEYS or _is_header(first.split("|")):
        return f"a table's header {short(first)} in a file that is not called .csv or .tsv"
    for name, mark in _LIST_MARKS.items():
        if all(mark.match(line) for line in lines):
            return name
    # The last one may do without the comma.
    if all(_ITEM.match(line) for line in lines[:-1]):
        return "the inside of a list, in quotation marks with commas"
    return ""


def _is_json(text: str) -> bool:
    if not text.startswith(("[", "{")):
        return False
    try:
        parse_json(text, "")
    except InputError as error:
        # JSON that is not let through is JSON: reading it says what is wrong.
        return "valid JSON" not in str(error)
    return True


def _is_header(cells: list[str]) -> bool:
    names = [cell.strip().strip('"').lower() for cell in cells]
    if len(names) < 2 or not set(names) & set(KEYS):
        return False
    return all(_HEADER_CELL.fullmatch(name) for name in names)


def records_of(kind: str, content: str, column: str = "") -> Iterator[Record]:
    """Yields the prompts of a structured file.

    Args:
      kind: from `format_of`.
      content: its text.
      column: of the prompts in a table; one of KEYS when empty.

    Raises:
      InputError: the file is malformed; the message begins with the number of the line, where it is known.
    """
    if kind == "json":
        yield from _json_records(content)
    elif kind == "jsonl":
        yield from _json_line_records(content)
    else:
        yield from _table_records(content, kind, column)


def _json_records(content: str) -> Iterator[Record]:
    try:
        value = parse_json(content, "file")
    except InputError as error:
        raise InputError(str(error).removeprefix("file: ")) from None
    if isinstance(value, dict):
        # A list under a name, alone or beside what describes it.
        for name in ("prompts", *KEYS, "data"):
            if isinstance(value.get(name), list):
                value = value[name]
                break
    if not isinstance(value, list):
        raise InputError(f"expected {FORMATS}; received a JSON {type(value).__name__}")
    for number, entry in enumerate(value, 1):
        try:
            prompt, metadata = _of_entry(entry)
        except InputError as error:
            raise InputError(f"entry {number}: {error}") from None
        yield number, prompt, metadata


def _json_line_records(content: str) -> Iterator[Record]:
    for number, line in enumerate(content.split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        try:
            entry = parse_json(line, "")
        except InputError as error:
            reason = str(error).removeprefix(": ")
            raise InputError(
                f"{number}: expected a JSON object; received {short(line)} ({reason})"
            ) from None
        try:
            prompt, metadata = _of_entry(entry)
        except InputError as error:
            raise InputError(f"{number}: {error}") from None
        yield number, prompt, metadata


def _of_entry(entry: Any) -> tuple[Any, Mapping[str, Any]]:
    """(prompt, metadata) of a JSON value: a text, an object with a prompt, or GenEval's object."""
    if isinstance(entry, str):
        return entry, {}
    # GenEval's objects have keys that no other kind has; one of them is enough to hold it to all rules.
    if not isinstance(entry, dict) or {"tag", "include", "exclude"} & set(entry):
        check_geneval(entry)
        return entry["prompt"], entry
    for name in KEYS:
        if name in entry:
            if not isinstance(entry[name], str):
                raise InputError(f"{name}: expected a text; received {short(entry[name])}")
            return entry[name], {key: value for key, value in entry.items() if key != name}
    received = ", ".join(map(repr, entry)) or "no keys"
    raise InputError(
        f"expected the key 'prompt', or GenEval's 'tag', 'include' and 'prompt'; received {received[:80]}"
    )


def _table_records(content: str, kind: str, column: str) -> Iterator[Record]:
    rows = _rows(content, kind)
    try:
        header = [name.strip().lower() for name in next(rows)[1]]
    except StopIteration:
        return
    names = (column.strip().lower(),) if column else KEYS
    columns = [header.index(name) for name in names if name in header]
    if columns and header.count(header[columns[0]]) > 1:
        raise InputError(
            f"1: expected one column {header[columns[0]]!r}; received "
            f"{header.count(header[columns[0]])} of that name"
        )
    if not columns:
        raise InputError(
            f"1: expected a header with a column {names[0]!r}; received {short(', '.join(header))}"
        )
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise InputError(
                f"{number}: expected {len(header)} columns, as in the header; received {len(row)}"
            )
        yield number, row[columns[0]], {}


def _rows(content: str, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells."""
    separator = "\t"
    if kind == "csv":
        first = content.split("\n", 1)[0]
        separator = max((",", ";", "\t"), key=first.count)
    quoting: dict[str, Any] = {"strict": True}
    if kind == "tsv" and not _is_quoted(content):
        # PartiPrompts: quotation marks in a cell are part of it.
        quoting = {"quoting": csv.QUOTE_NONE}
    # With the ends of lines: one inside of a cell would otherwise be lost, and two words become one.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, **quoting)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{reader.line_num}: expected {kind.upper()}; received {error}"
            ) from None
        yield reader.line_num, row


def _is_quoted(content: str) -> bool:
    """Whether cells of a TSV are quoted as in CSV, with quotation marks inside of them doubled."""
    try:
        list(csv.reader(content.split("\n"), delimiter="\t", strict=True))
    except csv.Error:
        return False
    return re.search(r'(^|\t)"[^"\t]*("|"")[^\t]*"(\t|$)', content, re.MULTILINE) is not None
