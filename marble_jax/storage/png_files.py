"""PNG files of unknown content, opened within bounds: a few bytes may claim more pixels than memory has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.file_kinds import kind_of_file

MOST_PIXELS = 1 << 26
"""Of an image, or of all frames of a clip: an image of 8192 x 8192."""


@contextlib.contextmanager
def opened_png(path: epath.PathLike) -> Iterator[Any]:
    """A context with the Pillow image of a PNG file, no pixel of which is unpacked yet.

    Args:
      path: the file.

    Raises:
      InputError: the file is missing, damaged (also where the body finds out), another format under the name of a PNG,
        larger than `MOST_PIXELS`, or not of 8 bits in grey or colour.
    """
    from PIL import Image

    try:
        with epath.Path(path).open("rb") as handle:
            with Image.open(handle, formats=("PNG",)) as image:
                _check(path, image)
                yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: expected an image; received no such file") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{path}: expected at most {MOST_PIXELS} pixels; received a PNG of more"
        ) from None
    # Pillow raises many kinds for a damaged file.
    except Exception as error:
        received = kind_of_file(path)
        if not received or received == "a PNG image":
            received = f"a damaged file ({type(error).__name__})"
        raise InputError(f"{path}: expected a whole PNG image; received {received}") from error


def _check(path: epath.PathLike, image: Any) -> None:
    """Raises InputError for a size or kind of pixels that no image of ours has."""
    width, height = image.size
    frames = getattr(image, "n_frames", 1)
    if frames * width * height > MOST_PIXELS:
        raise InputError(
            f"{path}: expected at most {MOST_PIXELS} pixels; received {frames} x {height} x {width}"
        )
    # Transparency means nothing here, and 16 bits would be cut to 8 without a word.
    if image.mode not in ("L", "RGB"):
        raise InputError(
            f"{path}: expected 8-bit grey or colour; received Pillow's mode {image.mode}"
        )
