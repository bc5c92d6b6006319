"""Images and clips as files: PNG with its prompt inside, grids, and folders of numbered samples of one making."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.clips import animated_png, frames_of, spread_frames
from marble_jax.storage.files import location, read_json, write_whole
from marble_jax.storage.mp4 import mp4
from marble_jax.storage.png_files import opened_png
from marble_jax.storage.workdir import Workdir, check_is_folder, jsonable
from marble_jax.validation import validated

GRID_COLUMNS, GRID_ROWS, GRID_CELL = 8, 8, 256
"""Most images in a grid, and the longest side of each, in pixels."""
GRID_FRAMES = 4
"""Frames of a clip that a grid shows, side by side."""
SHOWN_CHARACTERS = 60
"""Of a prompt in errors."""


@contextlib.contextmanager
def writable(path: epath.PathLike) -> Iterator[None]:
    """A context in which an error of the file system is bad input: the folder cannot be written to, or is full.

    Args:
      path: names the folder in the error.

    Raises:
      InputError: in place of an `OSError` of the body.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--out: expected a place to write to; received {path} ({error.strerror or error})"
        ) from error


class ImageFolder:
    """A folder of images or clips `00000.png`, `00001.png` and so on, all made the same way.

    `settings.json` beside the images says how, so that a job can go on where a kill stopped it and images of another
    making never come between.

    Args:
      path: of the folder, which need not exist.

    Raises:
      InputError: a bucket that cannot be reached.
    """

    def __init__(self, path: epath.PathLike):
        self.path = location("--out", path)
        self._record = self.path / "settings.json"
        self._shape: tuple[int, ...] | None = None

    def record(self) -> dict[str, Any] | None:
        """Returns the settings and prompts that `claim` wrote, or None for a folder without.

        Raises:
          InputError: the record is damaged.
        """
        if not self._record.exists():
            return None
        content = read_json(self._record)
        for field, kind in (("settings", dict[str, Any]), ("prompts", list[str])):
            validated(kind, content.get(field), f"{self._record}: {field}")
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
        check_is_folder("--out", self.path, "folder")
        record = self.record()
        if record is None:
            self._check_no_images()
            return
        wanted = jsonable(dict(settings))
        keys = set(wanted) if partial else set(wanted) | set(record["settings"])
        for key in sorted(keys):
            recorded, received = record["settings"].get(key), wanted.get(key)
            if recorded != received:
                raise InputError(
                    f"{self.path} holds images of other settings: {key}: expected {recorded!r} (its own); "
                    f"received {received!r}; choose another folder"
                )
        self._check_prompts(record["prompts"], prompts)

    def _check_prompts(self, recorded: Sequence[str], prompts: Sequence[str]) -> None:
        # Up to the end of the shorter list: images may be added, and a shorter job may come back.
        for i, (expected, received) in enumerate(zip(recorded, prompts)):
            if expected != received:
                raise InputError(
                    f"{self.path} holds images of other prompts: image {i}: expected {_short(expected)} "
                    f"(its own); received {_short(received)}; choose another folder"
                )

    def _check_no_images(self) -> None:
        if not self.path.exists():
            return
        if any(file.name.endswith(".png") for file in self.path.iterdir()):
            raise InputError(
                f"--out: expected a new folder or one made by this command; received {self.path} with "
                "images of unknown making"
            )

    def claim(self, settings: Mapping[str, Any], prompts: Sequence[str]) -> None:
        """Records settings and prompts, after `check`."""
        self.check(settings, prompts)
        record = self.record()
        texts = list(prompts)
        if record is not None:
            # A shorter list of prompts leaves those of the images behind it on record.
            texts += record["prompts"][len(prompts) :]
        content = {"settings": dict(settings), "prompts": texts}
        if jsonable(content) != record:
            with writable(self.path):
                Workdir(self.path).write_json(self._record.name, content)

    def file(self, index: int) -> epath.Path:
        """Returns the path of image `index`."""
        return self.path / f"{index:05d}.png"

    def missing(self, count: int) -> list[int]:
        """Returns the numbers of those of the first `count` images that are not in the folder."""
        if not self.path.exists():
            return list(range(count))
        # One listing: asking for each image takes a request each in a bucket.
        names = {file.name for file in self.path.iterdir()}
        return [index for index in range(count) if self.file(index).name not in names]

    def save(
        self,
        index: int,
        sample: np.ndarray,
        texts: Mapping[str, str],
        frames_per_second: int | None = None,
    ) -> None:
        """Writes image or clip `index`, whole or not at all; arguments as for `save_sample`."""
        with writable(self.path):
            save_sample(self.file(index), sample, texts, frames_per_second)

    def read(self, index: int) -> np.ndarray:
        """Returns image `index` as uint8 [H, W, 3], or clip `index` as uint8 [F, H, W, 3].

        Raises:
          InputError: the sample is missing, damaged or of another size than the first one that was read.
        """
        frames = read_frames(self.file(index))
        sample = frames[0] if len(frames) == 1 else frames
        if self._shape is None:
            self._shape = sample.shape
        if sample.shape != self._shape:
            raise InputError(
                f"{self.file(index)}: expected the size of the others in its folder, {self._shape[:-1]}; "
                f"received {sample.shape[:-1]}"
            )
        return sample

    def save_grids(self, count: int) -> list[epath.Path]:
        """Writes the first `count` samples as grids of 8 x 8 small images each, and returns their paths.

        The files are `grid.png`, `grid_001.png` and so on. Of a clip some frames stand side by side.
        """
        if count == 0:
            return []
        files = []
        num_frames = len(self._small(0))
        columns = GRID_COLUMNS // num_frames * num_frames
        size = columns * GRID_ROWS // num_frames
        for page, start in enumerate(range(0, count, size)):
            cells = []
            for index in range(start, min(start + size, count)):
                cells += self._small(index)
            file = self.path / (f"grid_{page:03d}.png" if page else "grid.png")
            with writable(self.path):
                save_png(file, grid(cells, columns))
            files.append(file)
        return files

    def save_mp4s(self, count: int, frames_per_second: int) -> None:
        """Writes the first `count` clips as `00000.mp4` and so on; those that are there stay."""
        for index in range(count):
            file = self.file(index).with_suffix(".mp4")
            if file.exists():
                continue
            with writable(self.path):
                write_whole(file, mp4(read_frames(self.file(index)), frames_per_second))

    def _small(self, index: int) -> list[np.ndarray]:
        """The image of a sample, or some frames of it, as small images."""
        from PIL import Image

        frames = read_frames(self.file(index))
        images = []
        for number in spread_frames(len(frames), GRID_FRAMES):
            image = Image.fromarray(frames[number])
            image.thumbnail((GRID_CELL, GRID_CELL))
            images.append(np.asarray(image))
        return images


def read_frames(path: epath.PathLike) -> np.ndarray:
    """Returns a file as frames uint8 [F, H, W, 3], of which an image has one.

    Raises:
      InputError: the file is missing, not a whole image or clip, or one that `opened_png` refuses.
    """
    with opened_png(path) as image:
        return frames_of(image)


def save_sample(
    path: epath.PathLike,
    sample: np.ndarray,
    texts: Mapping[str, str] | None = None,
    frames_per_second: int | None = None,
) -> None:
    """Writes an image as PNG, or a clip as animated PNG, whole or not at all.

    Args:
      path: target; its folder is made.
      sample: image [H, W, 3] or clip [F, H, W, 3], uint8 or float in [0, 1].
      texts: PNG text chunks, such as prompt and seed.
      frames_per_second: of clips; images need none.

    Raises:
      InputError: a sample with NaN or infinity, or a clip without frames per second.
    """
    if np.ndim(sample) == 3:
        save_png(path, sample, texts)
        return
    _check_finite(path, sample)
    if frames_per_second is None:
        raise InputError(
            f"{path}: expected an image; received a clip of no known frames per second"
        )
    write_whole(path, animated_png(to_uint8(sample), frames_per_second, texts))


def _check_finite(path: epath.PathLike, sample: np.ndarray) -> None:
    """Raises InputError for a sample with NaN or infinity, which would be written as black or white."""
    if not np.isfinite(sample).all():
        raise InputError(
            f"{path}: expected an image of finite numbers; received NaN or infinity (weights or a LoRA that "
            "overflow: float32 and a smaller strength tell which)"
        )


def _short(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return repr(text)
    return repr(text[: SHOWN_CHARACTERS - 3] + "...")


def save_png(
    path: epath.PathLike, image: np.ndarray, texts: Mapping[str, str] | None = None
) -> None:
    """Writes one image, whole or not at all.

    Args:
      path: target; its folder is made.
      image: uint8 [H, W, 3], or float in [0, 1].
      texts: PNG text chunks, such as prompt and seed.

    Raises:
      InputError: an image with NaN or infinity.
    """
    from PIL import Image, PngImagePlugin

    _check_finite(path, image)
    info = PngImagePlugin.PngInfo()
    for key, value in (texts or {}).items():
        # International text, as prompts are in any script.
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "PNG", pnginfo=info)
    write_whole(path, buffer.getvalue())


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as 8 bit, clipped and rounded to nearest; 8-bit images pass through."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    # NaN has no grey: whoever shows or scores an image asks for finite numbers first.
    finite = np.nan_to_num(images, nan=0.0, posinf=1.0, neginf=0.0)
    return np.round(np.clip(finite, 0, 1) * 255).astype(np.uint8)


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images [H, W, 3] of one size as one, row by row, the last row filled up with white."""
    images = [to_uint8(p) for p in images]
    columns = max(1, min(columns, len(images)))
    blank = np.full_like(images[0], 255)
    images += [blank] * (-len(images) % columns)
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    return np.concatenate(rows)
