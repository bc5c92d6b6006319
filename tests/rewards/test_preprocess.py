"""Resize, crop and normalise against Pillow, torch and hand numbers."""

import jax
import numpy as np
import pytest
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.rewards.models import preprocess
from marble_jax.rewards.models.preprocess import Preprocess, resize, resize_matrix

PIL_METHODS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIZES = [((37, 50), (16, 21)), ((20, 20), (32, 32)), ((33, 48), (30, 12))]


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (2, 48, 50, 3), np.uint8)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size_in,size_out", SIZES)
def test_matches_torch_antialias(image, method, size_in, size_out):
    torch = pytest.importorskip("torch")
    x = image[:, : size_in[0], : size_in[1]].astype(np.float32) / 255
    planes = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    want = torch.nn.functional.interpolate(
        planes, size=size_out, mode=method, antialias=True, align_corners=False
    )
    got = resize(x, *size_out, method)
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 3, 1), atol=2e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size_in,size_out", SIZES)
def test_eight_bit_matches_pillow(image, method, size_in, size_out):
    x = image[:, : size_in[0], : size_in[1]]
    got = np.asarray(resize(x.astype(np.float32) / 255, *size_out, method, eight_bit=True))
    want = np.stack([Image.fromarray(p).resize(size_out[::-1], PIL_METHODS[method]) for p in x])
    np.testing.assert_allclose(got, want / 255, atol=1e-6)  # a level is 4e-3


@pytest.mark.parametrize("size_in", [(512, 512), (501, 300), (225, 1024)])
def test_published_size_matches_pillow_bit_for_bit(size_in):
    x = np.random.default_rng(1).integers(0, 256, (1, *size_in, 3), np.uint8)
    height, width, top, left = Preprocess(size=224).frame(*size_in)
    got = np.asarray(resize(x.astype(np.float32) / 255, height, width, "bicubic", eight_bit=True))
    want = np.asarray(Image.fromarray(x[0]).resize((width, height), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(got[0], want / 255, atol=1e-6)


def test_on_host_equals_on_device(image):
    transform = Preprocess(size=16, crop="round")
    for x in (image[0], image[0, :9, :5]):
        pixels = preprocess.prepare(x[None].astype(np.float32) / 255, transform)
        np.testing.assert_allclose(transform.on_host(x), pixels[0], atol=1e-5)
    with pytest.raises(
        InputError,
        match="preprocessing on the host: expected 8-bit and 'shortest' or 'stretch'; received",
    ):
        Preprocess(size=16, eight_bit=False).on_host(image[0])


def test_odd_margins():
    floor, rounded = Preprocess(size=24), Preprocess(size=24, crop="round")
    assert [floor.frame(24, 24 + odd)[3] for odd in (1, 3, 5, 6)] == [0, 1, 2, 3]
    assert [rounded.frame(24, 24 + odd)[3] for odd in (1, 3, 5, 6)] == [
        0,
        2,
        2,
        3,
    ]  # torchvision: int(round(x / 2))
    assert Preprocess(size=16, fit="longest").frame(24, 48) == (8, 16, 4, 0)


def test_bicubic_overshoots_only_without_rounding():
    edge = np.zeros((1, 1, 8, 3), np.float32)
    edge[:, :, 4:] = 1
    assert float(resize(edge, 1, 16, "bicubic").max()) > 1.01
    assert float(resize(edge, 1, 16, "bicubic", eight_bit=True).max()) == 1


def test_halving_bilinear_by_hand():
    by_hand = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    np.testing.assert_allclose(resize_matrix(4, 2, "bilinear"), by_hand, rtol=1e-6)
    np.testing.assert_array_equal(resize_matrix(5, 5, "bicubic"), np.eye(5))


def test_shortest_edge_matches_torchvision_style_pipeline(image):
    x = image[:, :40, :50]
    got = preprocess.prepare(x.astype(np.float32) / 255, Preprocess(size=24))
    small = [
        Image.fromarray(p).resize((30, 24), Image.Resampling.BICUBIC).crop((3, 0, 27, 24))
        for p in x
    ]
    want = (np.stack(small) / 255 - preprocess.CLIP_MEAN) / preprocess.CLIP_STD
    assert got.shape == (2, 24, 24, 3)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_longest_edge_pads_before_normalising(image):
    x = image[:, :24, :48].astype(np.float32) / 255
    got = np.asarray(Preprocess(size=16, fit="longest", eight_bit=False)(x))
    black = -np.array(preprocess.CLIP_MEAN) / preprocess.CLIP_STD
    np.testing.assert_allclose(got[:, :4], np.broadcast_to(black, (2, 4, 16, 3)), rtol=1e-5)
    np.testing.assert_allclose(got[:, 12:], np.broadcast_to(black, (2, 4, 16, 3)), rtol=1e-5)
    inner = got[:, 4:12] * preprocess.CLIP_STD + preprocess.CLIP_MEAN
    np.testing.assert_allclose(inner, resize(x, 8, 16, "bicubic"), atol=1e-5)


def test_a_height_and_a_width_stretch_as_in_transformers(image):
    """transformers keeps the proportions for a shortest edge alone."""
    transformers = pytest.importorskip("transformers")
    x = image[:1, :40, :50]
    size, crop = {"height": 30, "width": 30}, {"height": 24, "width": 24}
    ours = Preprocess.from_config({"size": size, "crop_size": crop}, 24)
    assert ours.fit == "stretch"
    theirs = transformers.CLIPImageProcessor(size=size, crop_size=crop, do_convert_rgb=False)
    want = theirs(Image.fromarray(x[0]), return_tensors="np").pixel_values[0]
    got = np.asarray(ours(x.astype(np.float32) / 255))[0]
    np.testing.assert_allclose(got, np.moveaxis(want, 0, -1), atol=0.02)
    np.testing.assert_allclose(ours.on_host(x[0]), got, atol=1e-5)


def test_jit_agrees_with_eager(image):
    x = image.astype(np.float32) / 255
    transform = Preprocess(size=24)
    np.testing.assert_allclose(jax.jit(transform)(x), transform(x), atol=1e-5)


def test_stretched_by_pillow(image):
    x = image[:1, :40, :50]
    got = preprocess.prepare(x.astype(np.float32) / 255, Preprocess(size=24, fit="stretch"))
    small = np.asarray(Image.fromarray(x[0]).resize((24, 24), Image.Resampling.BICUBIC))
    want = (small / 255 - preprocess.CLIP_MEAN) / preprocess.CLIP_STD
    np.testing.assert_allclose(got[0], want, atol=1e-6)


def test_from_config_reads_old_and_new_layouts():
    old = Preprocess.from_config({"size": 32, "crop_size": 32, "resample": 2}, 32)
    new = Preprocess.from_config(
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2}, 32
    )
    assert old == new == Preprocess(size=32, resize_to=32, method="bilinear")
    assert Preprocess.from_config({}, 16, eight_bit=False) == Preprocess(
        size=16, resize_to=16, eight_bit=False
    )


def test_rejects_bad_input():
    with pytest.raises(InputError, match="resample: expected 2 .*; received 0"):
        Preprocess.from_config({"resample": 0}, 32)
    with pytest.raises(InputError, match="crop_size: expected the image tower's 32; received 16"):
        Preprocess.from_config({"crop_size": 16}, 32)
    with pytest.raises(InputError, match=r"images: expected \[N, H, W, 3\]"):
        Preprocess(size=8)(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(InputError, match="fit: expected one of"):
        Preprocess(size=8, fit="short")
    with pytest.raises(InputError, match="resize method: expected one of"):
        Preprocess(size=8, method="nearest")
    with pytest.raises(InputError, match="resize_to: expected at least"):
        Preprocess(size=8, resize_to=4)
    with pytest.raises(InputError, match="crop: expected one of"):
        Preprocess(size=8, crop="up")
    with pytest.raises(InputError, match="resize method"):
        resize_matrix(4, 2, "lanczos")
