"""The shape detector on clean, blurred and shapeless images."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from marble_jax.rewards import geneval_rules
from marble_jax.rewards.toy_world import shape_detector
from marble_jax.rewards.toy_world.shape_detector import ShapeDetector, template


def named(detections):
    return sorted((d.label, d.colour) for d in detections)


@pytest.fixture(scope="module")
def scenes(world):
    rng = random.Random(5)
    out = []
    for i in range(120):
        _, metadata, make = (world.composition if i % 2 else world.general)(rng)
        scene = make(rng)
        out.append((metadata, scene, world.render(scene)))
    return out


def test_clean_images_exactly(scenes):
    for metadata, scene, image in scenes:
        found = ShapeDetector().detect_one(image)
        assert named(found) == sorted((t.shape, t.ink) for t in scene.things)
        assert min(d.score for d in found) > 0.9
        if metadata:
            assert geneval_rules.evaluate_image(
                image, found, metadata
            ) == geneval_rules.GenEvalResult(1.0, True, True)


def test_boxes_and_masks(world):
    scene = world.Scene("white", (world.Thing("square", "red", 20, 40, 10),))
    (found,) = ShapeDetector().detect_one(world.render(scene))
    np.testing.assert_allclose(found.box, (20 - 8.6, 40 - 8.6, 20 + 8.6, 40 + 8.6), atol=1)
    assert found.mask.shape == (64, 64) and found.mask.sum() == pytest.approx(
        17.2**2, rel=0.1
    )  # Pillow fills its rim
    assert found.mask[40, 20] and not found.mask[5, 5]


def test_confidence_falls_with_blur(scenes):
    def scores(sigma):
        images = [
            np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(sigma)))
            for _, _, i in scenes[:40]
        ]
        return np.array(
            [d.score for found in ShapeDetector().detect(np.stack(images)) for d in found]
        )

    assert (scores(0.5) > 0.9).all()
    assert 0.3 < np.median(scores(2)) < 0.9
    assert np.median(scores(4)) < 0.3


def test_shapeless_and_multicoloured_blobs_score_low():
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.polygon(
        [(8, 10), (30, 14), (52, 6), (40, 30), (55, 52), (26, 40), (10, 58), (18, 30)],
        fill=(220, 40, 40),
    )
    assert all(d.score < 0.3 for d in ShapeDetector().detect_one(np.asarray(image)))
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.rectangle((16, 16, 31, 47), fill=(220, 40, 40))
    draw.rectangle((32, 16, 47, 47), fill=(40, 80, 210))
    assert all(d.score < 0.3 for d in ShapeDetector().detect_one(np.asarray(image)))


def test_plain_specks_and_noise():
    plain = np.full((64, 64, 3), 185, np.uint8)
    assert ShapeDetector().detect(np.stack([plain, plain])) == [[], []]
    plain[30:33, 30:33] = 0
    assert ShapeDetector().detect_one(plain) == []
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert all(d.score < 0.3 for d in ShapeDetector().detect_one(noise))


def test_other_image_sizes():
    image = Image.new("RGB", (200, 128), (175, 235, 240))
    ImageDraw.Draw(image).polygon([(100, 20), (140, 92), (60, 92)], fill=(240, 200, 30))
    (found,) = ShapeDetector().detect_one(np.asarray(image))
    assert (found.label, found.colour) == ("triangle", "yellow") and found.score > 0.9


@pytest.mark.parametrize(
    "shape,area,centre",
    [
        ("square", 1.72**2, (0, 0)),
        ("triangle", 1.8, (0, 0.2)),
        ("cross", 4 * 0.34 * (2 - 0.34), (0, 0)),
        ("circle", np.pi, (0, 0)),
        ("star", 5 * 1.12 * 0.48 * np.sin(np.pi / 5), (0, 0)),
    ],
)
def test_templates_by_hand(shape, area, centre):
    found = template(shape)
    assert found.area == pytest.approx(area, rel=2e-3)
    np.testing.assert_allclose(found.centroid, centre, atol=1e-9)
    drawn = found.draw(np.array([31.0, 33.0]), 500.0, 64, 64)
    assert drawn.sum() == pytest.approx(500, rel=0.04)  # steep edges along the pixel grid round


def test_outlines_are_those_of_the_world(world):
    for shape in shape_detector.ShapeDetector.SHAPES[1:]:
        ours, theirs = (
            shape_detector.outline(shape),
            world._outline(world.Thing(shape, "red", 0, 0, 1)),
        )
        assert {(round(x, 6) + 0.0, round(y, 6) + 0.0) for x, y in ours} == {
            (round(x, 6) + 0.0, round(y, 6) + 0.0) for x, y in theirs
        }
    assert set(world.INKS.items()) <= set(shape_detector.INKS.items())
