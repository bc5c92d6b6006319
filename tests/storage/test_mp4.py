"""Clips as MP4, read back by the decoder of the package that encodes."""

import io
import sys

import numpy as np
import pytest

from marble_jax.cli.main import main
from marble_jax.errors import InputError
from marble_jax.storage.mp4 import check_mp4, mp4

av = pytest.importorskip("av")


@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_a_clip_comes_back_nearly_as_it_was(size):
    """A patch that moves over a smooth ground; colours are stored for two by two pixels."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    ground = np.stack([rows * 3, columns * 2, rows + columns], axis=-1)
    frames = np.repeat(ground[None], 5, axis=0).astype(np.uint8)
    for number, frame in enumerate(frames):
        frame[8:20, 4 * number : 4 * number + 12] = 250
    with av.open(io.BytesIO(mp4(frames, 16))) as file:
        read = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
        assert file.streams.video[0].average_rate == 16
    height, width = size
    assert read.shape == (5, height + height % 2, width + width % 2, 3)
    differences = np.abs(read[:, :height, :width].astype(int) - frames)
    assert differences.mean() < 4


def test_without_an_encoder_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"marble-jax\[mp4\]"):
        check_mp4()


def test_mp4_of_a_model_of_images_is_refused(tmp_path, capsys):
    out = tmp_path / "images"
    assert main(["sample", "--model=embedded", "--prompts=a star", f"--out={out}", "--mp4"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--mp4: expected a model of clips; received sd3" in line
    assert not out.exists()
