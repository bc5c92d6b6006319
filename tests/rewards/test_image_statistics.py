"""Formulas against Pillow, NumPy in float64 and hand numbers."""

import io

import numpy as np
import pytest
from PIL import Image

from marble_jax.rewards import base
from marble_jax.rewards.formula import FormulaReward
from marble_jax.rewards.image_statistics import JpegReward, brightness, colourfulness


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return np.stack([np.full((32, 40, 3), 90), rng.integers(0, 256, (32, 40, 3))]).astype(np.uint8)


def scores(reward, images):
    result = base.score(
        reward, images.astype(np.float32) / 255, ["a"] * len(images), [{}] * len(images)
    )
    assert result.valid.all()
    return result.values


def test_jpeg_sizes(images):
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    np.testing.assert_allclose(
        scores(JpegReward("j", compressible=False), images), sizes, rtol=1e-6
    )
    np.testing.assert_allclose(scores(JpegReward("j"), images), -np.array(sizes) / 500, rtol=1e-6)
    assert sizes[1] > 2 * sizes[0]


def test_brightness(images):
    want = (images / 255 @ [0.299, 0.587, 0.114]).mean((1, 2))
    np.testing.assert_allclose(scores(FormulaReward("b", brightness), images), want, rtol=1e-5)
    assert want[0] == pytest.approx(90 / 255)


def test_colourfulness(images):
    x = images[1] / 255
    rg, yb = x[..., 0] - x[..., 1], (x[..., 0] + x[..., 1]) / 2 - x[..., 2]
    want = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    np.testing.assert_allclose(
        scores(FormulaReward("c", colourfulness), images), [0, want], rtol=1e-5, atol=1e-6
    )
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255  # one colour: no spread, rg = 1, yb = 1/2
    assert scores(FormulaReward("c", colourfulness), red)[0] == pytest.approx(
        0.3 * 1.25**0.5, rel=1e-5
    )
