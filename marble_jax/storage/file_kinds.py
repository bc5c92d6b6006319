"""What a file is that is not what its name says: a pointer in place of a download, a web page, an archive."""

from __future__ import annotations

import re

from etils import epath

SHOWN_BYTES = 512
"""Bytes from a file's beginning that tell its kind."""
_PAGE = re.compile(rb"<(!doctype html|html|head|body|\?xml|error)", re.IGNORECASE)
_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file (run `git lfs pull` in the clone)",
    ),
    (b"/annex/objects/", "a git-annex pointer in place of the file (run `git annex get`)"),
    (
        b"PK\x03\x04",
        "a ZIP archive, as torch.save writes (re-save the weights as safetensors)",
    ),
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"BZh", "a bzip2 archive (unpack it first)"),
    (b"\xfd7zXZ\x00", "an xz archive (unpack it first)"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive (unpack it first)"),
    (b"\x89HDF\r\n", "an HDF5 file (re-save the weights as safetensors)"),
    (b"GGUF", "a GGUF file of quantised weights (take the original safetensors)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
)
# Protocols 2 to 5 of pickle; torch.save wrote it bare before its version 1.6.
_PICKLE = re.compile(rb"\x80[\x02-\x05]")


def kind_of_content(beginning: bytes) -> str:
    """Returns what a file is by its first `SHOWN_BYTES`, with what to do about it; empty where that is not known.

    Known are things that stand in for a download or are another format of the same content. An empty file is known.
    """
    if not beginning.strip(b"\x00"):
        return "an empty file (was its download interrupted?)" if not beginning else ""
    for start, kind in _BEGINNINGS:
        if beginning.startswith(start):
            return kind
    # A byte order mark or blank lines may stand in front of a page.
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _PAGE.match(text):
        return (
            "an HTML page in place of the file (log in or accept the licence where it comes from, and "
            "download it again)"
        )
    if _PICKLE.match(beginning):
        return "a Python pickle, as torch.save writes (re-save the weights as safetensors)"
    return ""


def kind_of_file(path: epath.PathLike) -> str:
    """Returns what a file is, see `kind_of_content`; empty for one that cannot be read."""
    try:
        with epath.Path(path).open("rb") as handle:
            return kind_of_content(handle.read(SHOWN_BYTES))
    except OSError:
        return ""
