"""Files on this machine or in a bucket (`gs://`, `s3://`): reached before anything is done, written whole."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath
from etils.epath import backend

from marble_jax.errors import InputError, one_of
from marble_jax.storage.file_kinds import SHOWN_BYTES, kind_of_content
from marble_jax.validation import parse_json_object, short

_PATTERN = re.compile(r"[\[*?]")
BACKENDS = {"gs": "gcsfs", "s3": "s3fs"}
"""Package that opens a scheme; TensorFlow, where it is installed, opens both."""
MOST_JSON_BYTES = 1 << 26
"""Of a JSON file; the largest index of published weights has a thousandth of it."""
MOST_CHARACTERS = 200
"""Of an error of another package, in ours."""


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in os.fspath(path)


def location(what: str, path: epath.PathLike) -> epath.Path:
    """Returns a path to read from or write to, which need not exist; a bucket is asked for at once.

    Args:
      what: names the place in errors, such as "workdir".
      path: local, or `gs://...` or `s3://...`.

    Raises:
      InputError: an unknown scheme, a package that is not installed, or a bucket that cannot be reached.
    """
    text = os.fspath(path)
    # Bytes that are no UTF-8 come as halves of surrogate pairs, which neither records nor Orbax can hold.
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{what}: expected a path in UTF-8 without NUL; received {short(text)}")
    if not is_remote(text):
        # No shell expands a tilde behind an equals sign.
        return epath.Path(os.path.expanduser(text))
    scheme = text.partition("://")[0]
    one_of(f"{what}: scheme of {text}", scheme, BACKENDS)
    try:
        place = epath.Path(text)
        place.exists()
    except ImportError:
        raise InputError(
            f"{what}: expected a package that opens {scheme}://; received none for {text} (pip install "
            f"{BACKENDS[scheme]})"
        ) from None
    except Exception as error:
        # Each package has errors of its own for no such bucket, no permission and no network.
        reason = " ".join(str(error).split())[:MOST_CHARACTERS]
        raise InputError(
            f"{what}: expected a bucket that can be reached; received {text} ({type(error).__name__}: "
            f"{reason})"
        ) from error
    return place


def local_path(path: os.PathLike[str] | str) -> pathlib.Path:
    """Returns a path of this machine with this user's home in place of a `~`; that of no user's stays as it is.

    `pathlib` has its own way, which fails for a user that there is not.
    """
    return pathlib.Path(os.path.expanduser(os.fspath(path)))


def check_no_pattern(what: str, path: epath.PathLike) -> None:
    """Refuses a place in a bucket whose path is a pattern: Orbax looks for its own files with one, and finds others.

    A checkpoint below such a folder would be written, and could never be read again. On this machine `plain_path` finds
    a way around.

    Args:
      what: names the place in errors.
      path: where a checkpoint is to be written.

    Raises:
      InputError: a `[`, `*` or `?` in the path.
    """
    text = os.fspath(path)
    if is_remote(text) and _PATTERN.search(text):
        raise InputError(
            f"{what}: expected a path without '[', '*' and '?', as checkpoints below it could not be read "
            f"again; received {text}"
        )


def plain_path(path: epath.PathLike) -> epath.Path:
    """Returns the same place by an absolute path that is no pattern, for Orbax, which takes every path for one.

    Where a folder's name holds `[`, `*` or `?`, that is a link among this user's temporary files.

    Args:
      path: whose parent folder exists.

    Raises:
      InputError: the folder for such links belongs to another user.
    """
    text = os.fspath(path)
    if is_remote(text):
        return epath.Path(text)
    absolute = os.path.abspath(text)
    if not _PATTERN.search(absolute):
        return epath.Path(absolute)
    parent, name = os.path.split(absolute)
    digest = hashlib.sha256(os.path.realpath(parent).encode()).hexdigest()
    # The same on every host, as Orbax has its processes agree on paths; only this user may have made it.
    links = os.path.join(tempfile.gettempdir(), f"marble_jax-{os.getuid()}")
    os.makedirs(links, mode=0o700, exist_ok=True)
    if os.stat(links).st_uid != os.getuid():
        raise InputError(f"{links}: expected a folder of this user; received another's")
    link = os.path.join(links, digest[:24])
    try:
        os.symlink(os.path.realpath(parent), link)
    except FileExistsError:
        # Of this very folder: the name is its hash.
        pass
    return epath.Path(link) / name


def append(path: epath.Path, text: str) -> None:
    """Adds text to a file."""
    if is_remote(path):
        # Nothing can be appended to in a bucket: the file is written anew.
        content = text.encode()
        if path.exists():
            content = path.read_bytes() + content
        write_whole(path, content)
        return
    with path.open("a") as handle:
        handle.write(text)


def forget_listings(path: epath.PathLike) -> None:
    """Has the next look at a bucket be a new one; does nothing on this machine.

    fsspec remembers what it has listed, with the sizes of files, for as long as the process runs: what another process
    writes there in the meantime is not seen, or read with the length of what it replaced.

    Args:
      path: in the bucket.
    """
    if not is_remote(path):
        return
    try:
        backend.fsspec_backend.fs(path).invalidate_cache()
    except Exception:
        # TensorFlow opens this bucket, or the look itself will say what is wrong.
        pass


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file whole or not at all, and on the disk when this returns; makes its folder.

    Args:
      path: of the file.
      content: text is written as UTF-8.
    """
    file = epath.Path(path)
    if isinstance(content, str):
        content = content.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(file):
        # An object appears in a bucket when it is complete.
        file.write_bytes(content)
        return
    # A rename is whole or not at all, and the name beginning with a dot hides what a kill leaves behind.
    partial = file.parent / f".{file.name}.partial"
    with partial.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)


class JsonFile(dict[str, Any]):
    """The JSON object in a file, which knows its file for messages.

    Attributes:
      file: path of the file.
    """

    def __init__(self, content: Mapping[str, Any], file: object):
        super().__init__(content)
        self.file = file


def place_of(values: Mapping[str, Any]) -> str:
    """`FILE: ` for what was read from a file, to begin a message with; an empty text for other mappings."""
    if isinstance(values, JsonFile):
        return f"{values.file}: "
    return ""


def part_of(values: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns an object that stands inside of `values`, or is made of it, with the file of that."""
    return JsonFile(part, values.file) if isinstance(values, JsonFile) else part


def read_json_or_empty(path: epath.PathLike) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one where it is missing or damaged, as it only saves time."""
    try:
        return read_json(path)
    except InputError:
        return {}


def read_json(path: epath.PathLike, lenient: bool = False) -> JsonFile:
    """Returns the JSON object in a file.

    Args:
      path: of the file.
      lenient: as in `validation.parse_json`.

    Raises:
      InputError: the file is unreadable, too large, no JSON that `validation.parse_json` lets through, or holds
        something else than an object.
    """
    file = epath.Path(path)
    try:
        # Asked for first: whatever calls itself JSON is not read into memory by the gigabyte.
        size = file.stat().length
        content = b"" if size > MOST_JSON_BYTES else file.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable JSON file; received {type(error).__name__}"
        ) from error
    if size > MOST_JSON_BYTES:
        raise InputError(
            f"{path}: expected a JSON file of at most {MOST_JSON_BYTES} bytes; received {size}"
        )
    other = kind_of_content(content[:SHOWN_BYTES])
    if other:
        raise InputError(f"{path}: expected valid JSON; received {other}")
    return JsonFile(parse_json_object(content, path, lenient=lenient), path)
