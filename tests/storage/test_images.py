"""Images as files and folders of them: whole files, one making, what a kill leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pictures import read_image
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.storage.images import ImageFolder, save_png, to_uint8

SETTINGS = {"seed": 0, "steps": 4, "size": (8, 12)}
PROMPTS = ["a cat", 'a sign "A"', "fog"]


def sample_image(i: int) -> np.ndarray:
    return np.full((8, 12, 3), 40 * i, np.uint8)


@pytest.fixture
def album(tmp_path):
    made = ImageFolder(tmp_path / "images")
    made.claim(SETTINGS, PROMPTS)
    return made


def test_images_come_back_with_their_texts(album):
    album.save(1, sample_image(1), {"prompt": PROMPTS[1], "seed": "0:1"})
    np.testing.assert_array_equal(album.read(1), sample_image(1))
    with Image.open(album.file(1)) as image:
        assert image.text == {"prompt": 'a sign "A"', "seed": "0:1"}
    assert (
        album.missing(3) == [0, 2]
        and [p.name for p in album.path.iterdir() if "partial" in p.name] == []
    )


def test_the_same_making_goes_on(album):
    (album.path / ".00002.png.partial").write_bytes(b"half")
    again = ImageFolder(album.path)
    before = (album.path / "settings.json").read_bytes()
    again.claim(dict(SETTINGS, size=[8, 12]), PROMPTS)
    assert (album.path / "settings.json").read_bytes() == before and again.missing(3) == [0, 1, 2]
    again.claim(SETTINGS, [*PROMPTS, "more"])
    again.claim(SETTINGS, PROMPTS[:1])
    assert again.record()["prompts"] == [*PROMPTS, "more"]


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        (
            {**SETTINGS, "steps": 5},
            PROMPTS,
            "other settings: steps: expected 4 .its own.; received 5; choose another",
        ),
        (
            {**SETTINGS, "t5": False},
            PROMPTS,
            "other settings: t5: expected None .its own.; received False",
        ),
        (
            {"seed": 0, "steps": 4},
            PROMPTS,
            r"other settings: size: expected \[8, 12\] .its own.; received None",
        ),
        (
            SETTINGS,
            ["a cat", "b"],
            "other prompts: image 1: expected 'a sign \"A\"' .its own.; received 'b'",
        ),
    ],
)
def test_another_making_is_refused(album, settings, prompts, message):
    before = {p.name: p.read_bytes() for p in album.path.iterdir()}
    with pytest.raises(InputError, match=message):
        album.claim(settings, prompts)
    album.check({"seed": 0}, PROMPTS, partial=True)
    with pytest.raises(InputError, match="seed: expected 0"):
        album.check({"seed": 1}, PROMPTS, partial=True)
    assert {p.name: p.read_bytes() for p in album.path.iterdir()} == before


def test_places_that_are_no_album(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "holiday.png")
    with pytest.raises(
        InputError, match="--out: expected a new folder or one made by this command; received"
    ):
        ImageFolder(tmp_path).claim(SETTINGS, PROMPTS)
    with pytest.raises(
        InputError, match="--out: expected a folder; received the file .*holiday.png"
    ):
        ImageFolder(tmp_path / "holiday.png" / "below").claim(SETTINGS, PROMPTS)
    for content in ("{", "[]", '{"settings": 3, "prompts": []}'):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(InputError, match="settings.json: .*expected .*; received"):
            ImageFolder(tmp_path).claim(SETTINGS, PROMPTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["holiday.png", "settings.json"]


def test_a_full_disk_is_one_line(album, monkeypatch):
    from marble_jax.storage import images

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "save_png", full)
    with pytest.raises(
        InputError,
        match="--out: expected a place to write to; received .* .No space left on device.",
    ):
        album.save(0, sample_image(0), {})


def test_damaged_and_missing_images(album):
    with pytest.raises(InputError, match="00000.png: expected an image; received no such file"):
        album.read(0)
    album.save(0, np.random.default_rng(0).integers(255, size=(64, 64, 3), dtype=np.uint8), {})
    album.file(0).write_bytes(album.file(0).read_bytes()[:2000])
    with pytest.raises(InputError, match="00000.png: expected a whole PNG image; received "):
        read_image(album.file(0))


def test_grids_of_at_most_64_small_images(album):
    big = np.zeros((512, 1024, 3), np.uint8)
    for i in range(70):
        album.save(i, big + i, {})
    files = album.save_grids(70)
    assert [f.name for f in files] == ["grid.png", "grid_001.png"]
    first, second = (read_image(f) for f in files)
    assert first.shape == (8 * 128, 8 * 256, 3) and second.shape == (128, 6 * 256, 3)
    assert first[128, 256, 0] == 9 and second[0, 256, 0] == 65
    assert json.loads((album.path / "settings.json").read_text())["prompts"] == PROMPTS


def test_to_uint8_rounds_and_clips():
    np.testing.assert_array_equal(
        to_uint8(np.array([-0.1, 0.0, 0.498, 1.0, 1.2])), [0, 0, 127, 255, 255]
    )
    eight = np.array([3], np.uint8)
    assert to_uint8(eight) is eight


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_of_no_numbers_is_not_written(tmp_path, value):
    image = np.zeros((2, 2, 3), np.float32)
    image[1, 0, 2] = value
    with pytest.raises(
        InputError, match="x.png: expected an image of finite numbers; received NaN"
    ):
        save_png(tmp_path / "x.png", image)
    assert not list(tmp_path.iterdir())
