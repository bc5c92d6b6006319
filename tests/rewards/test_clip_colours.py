"""The colour classifier against PyTorch and Pillow on a tiny CLIP with random weights."""

import numpy as np
import pytest
from PIL import Image

from marble_jax.prompts.composition import COLOURS
from marble_jax.rewards.geneval_rules import Detection, evaluate_image
from marble_jax.rewards.models.clip_colours import TEMPLATES, ClipColours, cut_out
from marble_jax.rewards.models.encoder import ClipEncoder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch_twins as twins  # noqa: E402  (needs torch)

NAME = "cat"


@pytest.fixture(scope="module")
def scene():
    """An image and two detections, one of which has a mask with a hole."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[10:40, 15:52] = True
    mask[20:25, 20:30] = False
    return image, [
        Detection(NAME, 0.9, (15.0, 10.0, 52.0, 40.0), mask),
        Detection(NAME, 0.8, (3.4, 30.0, 70.6, 59.0)),
    ]


def test_cut_out_equals_pillows(scene):
    image, detections = scene
    blank = Image.new("RGB", (80, 60), "#999")
    for detection in detections:
        whole = Image.fromarray(image)
        if detection.mask is not None:
            whole = Image.composite(whole, blank, Image.fromarray(detection.mask))
        np.testing.assert_array_equal(
            cut_out(image, detection), np.asarray(whole.crop(detection.box))
        )


def test_colours_equal_pytorchs(scene, tmp_path, monkeypatch):
    model = twins.write_clip(tmp_path / "clip")
    # The tiny vocabulary has few letters; colours and templates get names that it can spell.
    names = ["a", "b", "c", "d", "t", "ab", "ad", "at", "ba", "bd"]
    monkeypatch.setattr("marble_jax.rewards.models.clip_colours.COLOURS", tuple(names))
    templates = ("a {colour} {name}", "b {colour} {name}", "a {colour}")
    monkeypatch.setattr("marble_jax.rewards.models.clip_colours.TEMPLATES", templates)
    image, detections = scene
    encoder = ClipEncoder.load(tmp_path / "clip")
    got = ClipColours(encoder)(image, detections)
    pixels = []
    for i, detection in enumerate(detections):
        Image.fromarray(cut_out(image, detection)).save(tmp_path / f"{i}.png")
        pixels.append(twins.by_pillow(tmp_path / f"{i}.png", "round"))
    texts = [t.format(colour=colour, name=NAME) for colour in names for t in templates]
    with torch.no_grad():
        out = model(input_ids=twins.clip_ids(texts), pixel_values=torch.stack(pixels))
    heads = torch.nn.functional.normalize(out.text_embeds.reshape(10, 3, -1).mean(1), dim=-1)
    cosines = out.image_embeds @ heads.T
    assert got == [names[i] for i in cosines.argmax(-1)]
    features = encoder.pixel_features(torch.stack(pixels).permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(
        features @ ClipColours(encoder)._head(NAME).T, cosines, rtol=1e-4, atol=1e-6
    )
    assert ClipColours(encoder)(image, []) == []


def test_it_serves_the_judge(scene):
    image, detections = scene
    metadata = {
        "tag": "colors",
        "prompt": "",
        "include": [{"class": NAME, "count": 1, "color": "red"}],
    }
    assert evaluate_image(
        image, detections[:1], metadata, lambda image, found: ["red"] * len(found)
    ).strict
    assert (
        len(COLOURS) == 10
        and TEMPLATES[1].format(colour="red", name="cat") == "a photo of a red-colored cat"
    )
