"""What malformed input is answered with: a line, or acceptance; anything else is a failure of the case."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marble_jax.cli.main import main
from marble_jax.errors import InputError, printable

ACCEPTED = ""
"""In place of words of a line, for what has a meaning all the same."""


def line_of(call: Callable[[], Any]) -> str:
    """The line that a call is refused with; `ACCEPTED` where it returns. Other exceptions are the test's failure."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ACCEPTED


def check(line: str, words: str) -> None:
    """A refusal names the thing in one line that says what was expected and received; words stand in it."""
    if words == ACCEPTED:
        assert line == ACCEPTED, line
        return
    assert line != ACCEPTED, "accepted without a word"
    assert "\n" not in line and len(line) < 2000, line
    assert "expected" in line and "received" in line, line
    for word in words.split(" & "):
        assert word in line, line


def run(*argv: str) -> tuple[int, str, str]:
    """Status, output and errors of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(argv))
    return status, out.getvalue(), err.getvalue()


def refusal(*argv: str) -> str:
    """The line with which the command line ends with status 2, without the verb."""
    status, out, err = run(*argv)
    assert status == 2, (status, out, err)
    assert out == "" and err.count("\n") == 1, (out, err)
    line = err.rstrip("\n")
    assert line == printable(line)
    start = f"marble-jax {printable(argv[0])}: "
    assert line.startswith(start), line
    return line.removeprefix(start)


@contextlib.contextmanager
def changed(file: Path, change: Any):
    """A file that for the time being is missing (None), other bytes or text, or an object with other fields."""
    before = file.read_bytes() if file.is_file() else None
    try:
        if file.is_file():
            file.unlink()
        if isinstance(change, dict):
            content = json.loads(before) | change
            file.write_text(json.dumps(content))
        elif isinstance(change, bytes):
            file.write_bytes(change)
        elif change == "folder":
            file.mkdir()
        elif change == "loop":
            file.symlink_to(file)
        elif change is not None:
            file.write_text(change)
        yield
    finally:
        if file.is_symlink() or file.is_file():
            file.unlink()
        elif file.is_dir():
            shutil.rmtree(file)
        if before is not None:
            file.write_bytes(before)


DEEP = "[" * 100_000
"""JSON that a recursive reader falls over."""
DAMAGED = {
    "empty": ("", "JSON"),
    "half": ('{"a": ', "JSON"),
    "list": ("[1]", "object"),
    "number": ("5", "object"),
    "null": ("null", "object"),
    "deep": (DEEP, "deep"),
    "deep objects": ('{"a":' * 200 + "1" + "}" * 200, "deep"),
    "not a number": ('{"a": NaN}', "finite"),
    "no UTF-8": (b"\xff\xfe{}", "JSON"),
    "half a character": ('{"a": "\\ud800"}', "surrogate"),
    "twice": ('{"a": 1, "a": 2}', "once"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "JSON"),
    "web page": ("<!doctype html><html>", "HTML"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "LFS"),
    "folder": ("folder", "received"),
    "loop": ("loop", "received"),
    "missing": (None, "received"),
}
"""Contents that no JSON file of any kind may have, with a word of the answer."""
