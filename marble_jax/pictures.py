"""Pictures as files: PNG with its prompt inside, and grids."""
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath


def save_png(path: epath.PathLike, picture: np.ndarray, texts: Mapping[str, str] | None = None) -> None:
    """Writes one picture, whole or not at all.

    Args:
      path: target; its folder is made.
      picture: uint8 [H, W, 3], or float in [0, 1].
      texts: PNG text chunks, such as prompt and seed.
    """
    from PIL import Image, PngImagePlugin

    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in (texts or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(as_uint8(picture)).save(buffer, "PNG", pnginfo=info)
    partial = path.parent / f".{path.name}.partial"
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def as_uint8(picture: np.ndarray) -> np.ndarray:
    """[0, 1] to 8 bit, rounded; 8-bit pictures pass."""
    picture = np.asarray(picture)
    return picture if picture.dtype == np.uint8 else np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures [H, W, 3] of one size as one, row by row, the last row filled up with white."""
    pictures = [as_uint8(p) for p in pictures]
    columns = max(1, min(columns, len(pictures)))
    blank = np.full_like(pictures[0], 255)
    pictures += [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(pictures[i:i + columns], axis=1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows)
