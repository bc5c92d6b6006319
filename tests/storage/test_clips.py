"""Clips as files: every frame comes back as it was, and other programs read them."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import read_image
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.storage.clips import spread_frames
from marble_jax.storage.images import ImageFolder, read_frames, save_sample


def clip_of(num_frames: int = 5, still: bool = False) -> np.ndarray:
    clip = np.random.default_rng(0).integers(0, 256, (num_frames, 8, 12, 3)).astype(np.uint8)
    if still:
        # Encoders of animations join equal frames.
        clip[1:] = clip[0]
    return clip


@pytest.mark.parametrize("still", [False, True])
def test_frames_come_back_to_the_bit(tmp_path, still):
    file, clip = tmp_path / "clip.png", clip_of(still=still)
    save_sample(file, clip, {"prompt": "a “cat”"}, 16)
    np.testing.assert_array_equal(read_frames(file), clip)
    np.testing.assert_array_equal(read_image(file), clip[0])
    with Image.open(file) as image:
        assert image.n_frames == 5 and image.text == {"prompt": "a “cat”"}
        assert image.info["duration"] == 62.5 and image.info["loop"] == 0


def test_pixels_are_rounded_as_those_of_images(tmp_path):
    clip = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    save_sample(tmp_path / "clip.png", clip, None, 8)
    save_sample(tmp_path / "image.png", clip[1])
    np.testing.assert_array_equal(
        read_frames(tmp_path / "clip.png")[1], read_image(tmp_path / "image.png")
    )


def test_what_is_no_clip_is_not_written(tmp_path):
    file, broken = tmp_path / "clip.png", np.zeros((2, 4, 4, 3), np.float32)
    broken[1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="expected an image of finite numbers; received NaN"):
        save_sample(file, broken, None, 8)
    with pytest.raises(InputError, match="received a clip of no known frames per second"):
        save_sample(file, np.zeros((2, 4, 4, 3), np.uint8))
    assert not file.exists()


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_a_cut_file_is_no_clip(tmp_path, share):
    file = tmp_path / "clip.png"
    save_sample(file, clip_of(), None, 16)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        InputError, match=r"clip.png: expected a whole PNG image; received a damaged"
    ):
        read_frames(file)


def test_a_folder_gives_clips_and_images_back(tmp_path):
    folder = ImageFolder(tmp_path)
    folder.save(0, clip_of(9), {}, 16)
    folder.save(1, clip_of(5), {}, 16)
    np.testing.assert_array_equal(folder.read(0), clip_of(9))
    # Four frames of each side by side; the second row of cells is not begun.
    (file,) = folder.save_grids(2)
    grid = read_image(file)
    assert grid.shape == (8, 8 * 12, 3)
    np.testing.assert_array_equal(grid[:, 3 * 12 : 4 * 12], clip_of(9)[8])
    images = ImageFolder(tmp_path / "images")
    images.save(0, clip_of(1), {}, 16)
    np.testing.assert_array_equal(images.read(0), clip_of(1)[0])


@pytest.mark.parametrize(
    "num_frames, most, numbers",
    [(1, 4, [0]), (3, 4, [0, 1, 2]), (5, 4, [0, 1, 3, 4]), (17, 4, [0, 5, 11, 16]), (9, 1, [0])],
)
def test_frames_are_spread_from_the_first_to_the_last(num_frames, most, numbers):
    assert spread_frames(num_frames, most) == numbers
