"""Places on this machine or in a bucket (`gs://`, `s3://`): found out before anything is done, written to whole."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from marble_jax.errors import InputError, one_of

BACKENDS = {"gs": "gcsfs", "s3": "s3fs"}
"""Package that opens a scheme; TensorFlow, where it is installed, opens both."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def location(what: str, path: epath.PathLike) -> epath.Path:
    """A place to read from or write to, which need not exist; one in a bucket is asked for at once.

    Args:
      what: names the place in errors, such as "workdir".
      path: local, or `gs://...` or `s3://...`.

    Raises:
      InputError: an unknown scheme, a package that is not installed, or a bucket that cannot be reached.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(text)
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
    except (
        Exception
    ) as error:  # each package has its own for no such bucket, no permission and no network
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{what}: expected a bucket that can be reached; received {text} ({type(error).__name__}: "
            f"{reason})"
        ) from error
    return place


def append(path: epath.Path, text: str) -> None:
    """Adds text to a file; in a bucket, where nothing can be appended to, by writing the file anew."""
    if is_remote(path):
        write_whole(path, (path.read_bytes() if path.exists() else b"") + text.encode())
        return
    with path.open("a") as handle:
        handle.write(text)


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file whole or not at all, and on the disk when this returns; makes its folder.

    In a bucket an object appears when it is complete. Elsewhere a file beside the place is renamed onto it.
    """
    path, content = epath.Path(path), content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(content)
        return
    partial = path.parent / f".{path.name}.partial"
    with partial.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError when it is unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable JSON file; received {type(error).__name__}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: expected valid JSON; received an error at {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object; received a {type(content).__name__}")
    return content
