"""The detector: a folder with tiny random weights in the published layout, and its arithmetic by hand."""

import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.geneval import GenEvalReward
from marble_jax.rewards.models.mask2former import COCO, MEAN, STD, Mask2FormerDetector

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        num_labels=80,
    )
    path = tmp_path_factory.mktemp("mask2former")
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)


def test_a_published_folder_loads_and_scores(folder, images):
    detector = Mask2FormerDetector.load(
        folder, device="cpu", batch_size=2, min_score=0.0, short_edge=64
    )
    found = detector.detect(images)
    assert len(found) == 3 and all(found)
    for detections in found:
        scores = [d.score for d in detections]
        assert scores == sorted(scores, reverse=True) and all(0 < s <= 1 for s in scores)
        for d in detections:
            assert d.label in COCO and d.mask.shape == (48, 64)
            rows, columns = np.nonzero(d.mask)
            assert d.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    alone = detector.detect(images[2:])[0]
    assert [d.label for d in alone[:5]] == [d.label for d in found[2][:5]]
    np.testing.assert_allclose([d.score for d in alone], [d.score for d in found[2]], rtol=1e-3)
    metadata = {"tag": "single_object", "prompt": "", "include": [{"class": "cat", "count": 1}]}
    result = base.score(
        GenEvalReward("geneval", detector), images / np.float32(255), ["a"] * 3, [metadata] * 3
    )
    assert result.valid.all() and ((result.values >= 0) & (result.values <= 1)).all()


class Network:
    """Answers with prepared logits and keeps the pixels."""

    device, dtype, config = torch.device("cpu"), torch.float32, types.SimpleNamespace(num_labels=80)

    def __init__(self, classes, masks):
        self.classes, self.masks = torch.tensor(classes), torch.tensor(masks)

    def __call__(self, pixel_values):
        self.pixels = pixel_values
        n = len(pixel_values)
        return types.SimpleNamespace(
            class_queries_logits=self.classes.expand(n, -1, -1),
            masks_queries_logits=self.masks.expand(n, -1, -1, -1),
        )


def test_arithmetic_by_hand():
    """Two queries on a 32 x 48 image enlarged twice; the logits have its own grid, so nothing is interpolated
    between unlike values inside an object."""
    classes = np.full((2, 81), -20.0, np.float32)
    classes[0, [COCO.index("cat"), COCO.index("dog")]] = np.log([0.6, 0.35])
    classes[0, 80] = np.log(0.05)
    classes[1, [COCO.index("tv remote"), 80]] = np.log([0.25, 0.75])
    masks = np.full((2, 64, 96), -8.0, np.float32)
    masks[0, 8:24, 20:40] = 2.0  # in the image: rows 4 to 12, columns 10 to 20
    masks[1] = 5.0
    network = Network(classes, masks)
    (found,) = Mask2FormerDetector(network, short_edge=64).detect(
        np.full((1, 32, 48, 3), 200, np.uint8)
    )
    assert [d.label for d in found] == ["cat", "dog"]  # the third is not sure enough
    inside = 1 / (1 + np.exp(-2.0))
    assert found[0].score == pytest.approx(0.6 * inside, rel=1e-4)
    assert found[1].score == pytest.approx(0.35 * inside, rel=1e-4)
    assert found[0].box == (10, 4, 20, 12) and found[0].mask.sum() == 80
    np.testing.assert_allclose(network.pixels[0, :, 5, 5], (200 - np.array(MEAN)) / STD, rtol=1e-5)
    assert network.pixels.shape == (1, 3, 64, 96)


def test_sizes_and_padding():
    detector = Mask2FormerDetector(
        Network(np.zeros((1, 81), np.float32), np.zeros((1, 8, 8), np.float32))
    )
    for shape, size, padded in (
        ((512, 512), (800, 800), (800, 800)),
        ((300, 600), (667, 1333), (672, 1344)),
        ((480, 640), (800, 1067), (800, 1088)),
    ):
        pixels, resized = detector._pixels(torch.zeros((1, *shape, 3), dtype=torch.uint8))
        assert resized == size and pixels.shape[2:] == padded
        assert not pixels[0, :, size[0] :].any() and not pixels[0, :, :, size[1] :].any()


def test_damaged_folders(folder, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match="expected a Mask2Former directory with config.json; received none"
    ):
        Mask2FormerDetector.load(tmp_path)
    network = Network(np.zeros((1, 81), np.float32), np.zeros((1, 8, 8), np.float32))
    network.config = types.SimpleNamespace(num_labels=133)
    with pytest.raises(InputError, match="expected the 80 classes of COCO instances; received 133"):
        Mask2FormerDetector(network)
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="expected a Mask2Former network; received OSError"):
        Mask2FormerDetector.load(tmp_path)
    lost = "class_predictor.bias"
    save_file(
        {k: v for k, v in tensors.items() if k != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        InputError, match=f"expected exactly the network's tensors; missing: {lost}"
    ):
        Mask2FormerDetector.load(tmp_path)
    save_file(
        tensors | {"extra.weight": tensors[lost]}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        InputError, match="expected exactly the network's tensors; left over: extra.weight"
    ):
        Mask2FormerDetector.load(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(
        InputError, match="expected the package torch for the Mask2Former detector; received none"
    ):
        Mask2FormerDetector.load(folder)
