"""Images as files: PNG with its prompt inside, grids, and folders of numbered images of one making."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import location, write_whole
from marble_jax.storage.workdir import Workdir, jsonable

GRID_COLUMNS, GRID_ROWS, GRID_CELL = 8, 8, 256
"""Most images in a grid, and the longest side of each, in pixels."""


class ImageFolder:
    """A folder of images `00000.png`, `00001.png` and so on, all made the same way.

    `settings.json` beside them says how, so that a job can go on where a kill stopped it and images of another making
    never come between.
    """

    def __init__(self, path: epath.PathLike):
        self.path = location("--out", path)
        self._record = self.path / "settings.json"

    def record(self) -> dict[str, Any] | None:
        """What `claim` wrote, or None for a place without.

        Raises:
          InputError: the record is damaged.
        """
        try:
            content = json.loads(self._record.read_text()) if self._record.exists() else None
        except ValueError:
            content = ()
        if content is not None and not (
            isinstance(content, dict)
            and isinstance(content.get("settings"), dict)
            and isinstance(content.get("prompts"), list)
        ):
            raise InputError(
                f"{self._record}: expected settings and prompts in JSON; received something else"
            )
        return content

    def check(
        self, settings: Mapping[str, Any], prompts: Sequence[str], partial: bool = False
    ) -> None:
        """Makes sure that images of these settings may be added; writes nothing.

        Args:
          settings: all that decides what image i of a prompt looks like.
          prompts: the text of image i; the folder may hold more or fewer, but no other.
          partial: `settings` are only some of them.

        Raises:
          InputError: the folder holds images of other settings or prompts, or of unknown ones, or is no folder.
        """
        for place in (self.path, *self.path.parents):
            if place.exists():
                if not place.is_dir():
                    raise InputError(f"--out: expected a folder; received the file {place}")
                break
        there, settings = self.record(), jsonable(dict(settings))
        if there is None:
            if self.path.exists() and any(p.name.endswith(".png") for p in self.path.iterdir()):
                raise InputError(
                    f"--out: expected a new folder or one made by this command; received {self.path} with "
                    "images of unknown making"
                )
            return
        for key in sorted(set(settings) if partial else set(settings) | set(there["settings"])):
            own, given = there["settings"].get(key), settings.get(key)
            if own != given:
                raise InputError(
                    f"{self.path} holds images of other settings: {key}: expected {own!r} (its own); "
                    f"received {given!r}; choose another folder"
                )
        for i, (own, given) in enumerate(zip(there["prompts"], prompts)):
            if own != given:
                raise InputError(
                    f"{self.path} holds images of other prompts: image {i}: expected {_short(own)} "
                    f"(its own); received {_short(given)}; choose another folder"
                )

    def claim(self, settings: Mapping[str, Any], prompts: Sequence[str]) -> None:
        """Records settings and prompts, after `check`."""
        self.check(settings, prompts)
        there = (self.record() or {}).get("prompts", [])
        content = {"settings": dict(settings), "prompts": [*prompts, *there[len(prompts) :]]}
        if jsonable(content) != self.record():
            with writable(self.path):
                Workdir(self.path).write_json(self._record.name, content)

    def file(self, index: int) -> epath.Path:
        """Where image `index` is."""
        return self.path / f"{index:05d}.png"

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` images are not there."""
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        return [i for i in range(count) if self.file(i).name not in names]

    def save(self, index: int, image: np.ndarray, texts: Mapping[str, str]) -> None:
        """Writes image `index`, whole or not at all."""
        with writable(self.path):
            save_png(self.file(index), image, texts)

    def read(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [H, W, 3].

        Raises:
          InputError: it is not there or damaged.
        """
        return read_image(self.file(index))

    def save_grids(self, count: int) -> list[epath.Path]:
        """Writes the first `count` images as `grid.png`, `grid_001.png` and so on, 8 x 8 small ones each."""
        from PIL import Image

        files = []
        size = GRID_COLUMNS * GRID_ROWS
        for page, start in enumerate(range(0, count, size)):
            cells = []
            for i in range(start, min(start + size, count)):
                image = Image.fromarray(self.read(i))
                image.thumbnail((GRID_CELL, GRID_CELL))
                cells.append(np.asarray(image))
            files.append(self.path / (f"grid_{page:03d}.png" if page else "grid.png"))
            with writable(self.path):
                save_png(files[-1], grid(cells, GRID_COLUMNS))
        return files


class writable:
    """A context in which an error of the file system is bad input: the folder cannot be written to, or is full."""

    def __init__(self, path: epath.PathLike):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            raise InputError(
                f"--out: expected a place to write to; received {self._path} "
                f"({error.strerror or error})"
            ) from error


def read_image(path: epath.PathLike) -> np.ndarray:
    """An image file as uint8 [H, W, 3].

    Raises:
      InputError: it is not there, or not a whole image.
    """
    from PIL import Image

    try:
        with epath.Path(path).open("rb") as handle, Image.open(handle) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"{path}: expected a whole image; received {type(error).__name__}"
        ) from error


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57] + "...")


def save_png(
    path: epath.PathLike, image: np.ndarray, texts: Mapping[str, str] | None = None
) -> None:
    """Writes one image, whole or not at all.

    Args:
      path: target; its folder is made.
      image: uint8 [H, W, 3], or float in [0, 1].
      texts: PNG text chunks, such as prompt and seed.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in (texts or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "PNG", pnginfo=info)
    write_whole(path, buffer.getvalue())


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as 8 bit, clipped and rounded to nearest; 8-bit images pass through."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images [H, W, 3] of one size as one, row by row, the last row filled up with white."""
    images = [to_uint8(p) for p in images]
    columns = max(1, min(columns, len(images)))
    blank = np.full_like(images[0], 255)
    images += [blank] * (-len(images) % columns)
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    return np.concatenate(rows)
