"""Picture files that are none, or not what their name says, where images of an evaluation are read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from attempts import ACCEPTED, DAMAGED, check, line_of
from pictures import read_image
from PIL import Image

from marble_jax.storage.images import ImageFolder

SIDE = 8


def encoded(kind="PNG", mode="RGB", side=SIDE, **options):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def bomb(width, height):
    """A PNG whose head claims a size; a real one of it is a few hundred kilobytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


WHOLE = encoded()
PICTURES = {
    "whole": (WHOLE, ACCEPTED),
    # Grey is a colour.
    "grey": (encoded(mode="L"), ACCEPTED),
    "empty": (b"", "empty"),
    "half": (WHOLE[: len(WHOLE) // 2], "PNG"),
    "without an end": (WHOLE[:40], "PNG"),
    "changed": (WHOLE[:50] + b"\x00\x00" + WHOLE[52:], "PNG"),
    "JPEG": (encoded("JPEG"), "JPEG"),
    "GIF": (encoded("GIF", "P"), "PNG"),
    "WebP": (encoded("WEBP"), "PNG"),
    "TIFF": (encoded("TIFF"), "PNG"),
    "transparent": (encoded(mode="RGBA"), "RGBA"),
    "palette": (encoded(mode="P"), "mode P"),
    "16 bits": (encoded(mode="I;16"), "I;16"),
    "1 bit": (encoded(mode="1"), "mode 1"),
    "bomb": (bomb(60_000, 60_000), "67108864"),
    "smaller bomb": (bomb(9_000, 9_000), "67108864"),
    "no size": (bomb(0, 0), "PNG"),
    "negative size": (bomb(2**31 - 1, 2**31 - 1), "PNG"),
    "text": (b"a red circle", "PNG"),
    "web page": (DAMAGED["web page"][0].encode(), "HTML"),
    "pointer": (DAMAGED["pointer"][0].encode(), "LFS"),
    "archive": (b"PK\x03\x04" + bytes(100), "ZIP"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path, name):
    content, words = PICTURES[name]
    file = tmp_path / "00000.png"
    file.write_bytes(content)
    line = line_of(lambda: read_image(file))
    check(line, words if words == ACCEPTED else f"{words} & {file}")


def test_missing_and_folder(tmp_path):
    check(line_of(lambda: read_image(tmp_path / "a.png")), "a.png & no such file")
    (tmp_path / "b.png").mkdir()
    check(line_of(lambda: read_image(tmp_path / "b.png")), "b.png")


def test_another_size_among_the_images_of_a_folder(tmp_path):
    for number, side in enumerate((8, 8, 16)):
        (tmp_path / f"{number:05d}.png").write_bytes(encoded(side=side))
    folder = ImageFolder(tmp_path)
    assert np.shape(folder.read(0)) == np.shape(folder.read(1)) == (8, 8, 3)
    check(line_of(lambda: folder.read(2)), "00002.png & (8, 8) & (16, 16)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *[DAMAGED[kind] for kind in DAMAGED if kind not in ("missing", "loop")],
        ('{"settings": {}}', "prompts"),
        ('{"settings": [], "prompts": []}', "settings"),
        ('{"settings": {}, "prompts": "a"}', "prompts"),
        ('{"settings": {}, "prompts": [1]}', "prompts"),
        ('{"settings": {}, "prompts": []}', ACCEPTED),
    ],
)
def test_settings_of_a_folder(tmp_path, content, words):
    file = tmp_path / "settings.json"
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content)
    line = line_of(lambda: ImageFolder(tmp_path).check({}, []))
    check(line, words)
