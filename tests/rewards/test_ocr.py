"""Quoting rule, spelling score and the RapidOCR reader."""

import os
import random
import sys
import types
import unicodedata

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.programs.locations import resolve_path
from marble_jax.prompts.quotations import quoted_text
from marble_jax.rewards import base
from marble_jax.rewards.ocr import (
    OCRReward,
    RapidReader,
    edit_distance,
    spelling_score,
)
from marble_jax.rewards.registry import check_rewards
from marble_jax.rewards.workers.ocr_engines import PaddleEngine


class Lines:
    """A reader that returns prepared texts and counts images."""

    def __init__(self, *texts):
        self.texts, self.seen = list(texts), []

    def read(self, images):
        assert images.dtype == np.uint8
        self.seen += list(images[:, 0, 0, 0])
        return self.texts


@pytest.mark.parametrize(
    "prompt,target",
    [
        ('a sign "Hello World" here', "Hello World"),
        ('two "a" and "b"', "a"),
        ('only "one mark', None),
        ('a 24" monitor', None),
        ('a 5" by 7" photo', None),
        ('a 5 " x 7 " photo', None),
        ('a 24" screen that says "HI"', "HI"),
        ('unmatched "mark and \u201cOPEN\u201d', "OPEN"),
        ("a sign \u201cOPEN\u201d", "OPEN"),
        ("ein Schild \u201eOFFEN\u201c", "OFFEN"),
        ("en skylt \u201d\u00d6PPET\u201d", "\u00d6PPET"),
        ("un panneau \u00ab OUVERT \u00bb", " OUVERT "),
        ("\u5199\u7740\u300c\u4f60\u597d\u300d", "\u4f60\u597d"),
        ('\u5199\u7740"\u4f60\u597d"\u7684\u724c\u5b50', "\u4f60\u597d"),
        ("a sign \u2018DON\u2019T\u2019 here", "DON\u2019T"),
        ("the dog\u2019s and the cats\u2019 toys", None),
        ('a "24" on a door', "24"),
        ('Route 66 "DINER"', "DINER"),
        ('empty "" then "x"', None),
        ('spaces "   "', None),
        ('ends "', None),
        ("no marks 'x'", None),
        ("", None),
        ('keeps " spaces "', " spaces "),
    ],
)
def test_quoted_text(prompt, target):
    assert quoted_text(prompt) == target


@pytest.mark.parametrize(
    "prompt,target",
    [
        ('only "one mark', "one mark"),
        ('a 5" by 7" photo', " by 7"),
        ("\u201cOPEN\u201d", None),
        ('empty "" then "x"', None),
        ('a sign "Hello World" here', "Hello World"),
    ],
)
def test_quoted_text_of_upstream(prompt, target):
    assert quoted_text(prompt, upstream=True) == target


@pytest.mark.parametrize(
    "a,b,distance",
    [
        ("", "", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
        ("abc", "abc", 0),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    "recognised,target,score",
    [
        ("hello world", "Hello World", 1.0),
        ("xxHELLOxx", "hello", 1.0),  # contained: anything around it is free
        ("helo", "hello", 1 - 1 / 5),
        ("", "hello", 0.0),
        ("completely different", "abc", 0.0),  # the distance is capped at the target's length
        ("h e l l o", "hel lo", 1.0),
    ],
)
def test_spelling_score(recognised, target, score):
    assert spelling_score(recognised, target) == pytest.approx(score)
    assert spelling_score(recognised, target, upstream=True) == pytest.approx(score)


def decomposed(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    "recognised,target,upstream",
    [
        ("CAF\u00c9 M\u00dcNCHEN", decomposed("CAF\u00c9 M\u00dcNCHEN"), 9 / 13),
        (decomposed("caf\u00e9"), "CAF\u00c9", 0.5),
        ("HELLO\uff01", "HELLO!", 5 / 6),
        ("KA", "\uff2b\uff21", 0.0),
        ("AB", "A\u00a0B", 2 / 3),
        ("HELLOWORLD", "HELLO\u3000WORLD", 10 / 11),
        ("A\tB\nC", "ABC", 1 / 3),
        ("AB", "A\u200bB\ufeff", 0.5),
        ("don't", "don\u2019t", 0.8),
        ("A-B", "A \u2013 B", 2 / 3),
        ("\ufb01n", "fin", 1 / 3),
        ("STRASSE", "stra\u00dfe", 4 / 6),
        ("100 km", "100 \u339e", 0.6),
    ],
)
def test_texts_that_look_the_same_spell_the_same(recognised, target, upstream):
    assert spelling_score(recognised, target) == 1.0
    assert spelling_score(recognised, target, upstream=True) == pytest.approx(upstream, abs=0.3)
    assert spelling_score(recognised, target, upstream=True) < 1


def test_another_letter_is_another_text():
    assert spelling_score("CAFE", "CAF\u00c9") == 0.75
    assert spelling_score("\u200b", "AB") == 0


def test_reward_reads_only_quoted_and_masks_failures():
    images = np.linspace(0, 1, 5, dtype=np.float32)[:, None, None, None] * np.ones(
        (1, 2, 2, 3), np.float32
    )
    prompts = ['"AB"', "plain", '"AB"', '" "', '"AB"']
    reader = Lines("ab", None, "ax")
    result = base.score(OCRReward("ocr", reader), images, prompts, [{}] * 5)
    assert reader.seen == [0, 128, 255]
    np.testing.assert_allclose(result.values, [1, 0, 0, 0, 0.5])
    np.testing.assert_array_equal(result.valid, [True, False, False, False, True])
    np.testing.assert_array_equal(result.failed, [False, False, True, False, False])
    upstream = base.score(
        OCRReward("ocr", Lines("ab", None, "ax"), upstream=True), images, prompts, [{}] * 5
    )
    np.testing.assert_array_equal(upstream.valid, [True, False, True, False, True])
    assert upstream.values[2] == 0
    values, valid = OCRReward("ocr", Lines()).score(None, images[:1], ["plain"], [{}])
    assert not valid.any() and not values.any()


def test_a_broken_image_has_no_score_of_any_host_reward():
    images = np.zeros((4, 2, 2, 3), np.float32)
    images[0], images[1, 0, 0, 0], images[2, 1, 1, 2] = np.nan, np.inf, -np.inf
    result = base.score(OCRReward("ocr", Lines(*["ab"] * 4)), images, ['"AB"'] * 4, [{}] * 4)
    np.testing.assert_array_equal(result.valid, [False, False, False, True])
    np.testing.assert_array_equal(result.failed, [True, True, True, False])
    np.testing.assert_array_equal(result.values, [0, 0, 0, 1])


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    directory = resolve_path("embedded", "rewards")
    with pytest.raises(
        InputError,
        match=r"reward ocr: expected the packages rapidocr and onnxruntime.*'marble-jax\[rewards\]'",
    ):
        RapidReader()
    with pytest.raises(InputError, match=r"rapidocr and onnxruntime; received neither or one"):
        check_rewards(directory, ["geneval", "ocr"])
    check_rewards(directory, ["geneval", "alignment", "judge"])


def test_paddleocr_is_asked_as_its_interface_wants(monkeypatch):
    """PaddleOCR 3's signatures, checked in its source; the package itself is too large for the tests."""
    asked = []

    class PaddleOCR:
        def __init__(
            self,
            *,
            lang,
            ocr_version,
            device,
            cpu_threads,
            text_rec_score_thresh,
            use_doc_orientation_classify,
            use_doc_unwarping,
            use_textline_orientation,
        ):
            asked.append((lang, ocr_version, device, use_textline_orientation))

        def predict(self, input):
            asked.append(input)
            return [{"rec_texts": ["AB", "cd", "x"], "rec_scores": [0.9, 0.4, 0.0]}]

    monkeypatch.setitem(sys.modules, "paddleocr", types.SimpleNamespace(PaddleOCR=PaddleOCR))
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 0] = 200
    assert PaddleEngine(scale=2)(image) == "ABcd"
    assert asked[0] == ("en", "PP-OCRv4", "cpu", False)
    assert asked[1].shape == (8, 12, 3) and asked[1][0, 0].tolist() == [
        0,
        0,
        200,
    ]  # blue, green, red
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(
        InputError,
        match=r"expected the packages paddleocr \(3.x\) and paddlepaddle; received neither",
    ):
        PaddleEngine()


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    reader = RapidReader(detect=False, scale=3, workers=2)
    yield reader
    reader.close()


def test_rapidocr_reads_clean_signs(world, reader, capfd):
    rng = random.Random(11)
    words = [rng.choice(world.sign_words("train")) for _ in range(16)]
    images = np.stack([world.render(world.sign_scene(rng, w)) for w in words])
    result = base.score(
        OCRReward("ocr", reader),
        images.astype(np.float32) / 255,
        [f'"{w}"' for w in words],
        [{}] * 16,
    )
    assert result.valid.all() and (result.values == 1).mean() >= 15 / 16
    wrong = base.score(
        OCRReward("ocr", reader), images[:4].astype(np.float32) / 255, ['"QQ"'] * 4, [{}] * 4
    )
    assert not wrong.values.any()
    assert capfd.readouterr() == ("", "")  # neither RapidOCR nor onnxruntime says anything


def test_rapidocr_failure_is_none_and_blank_is_empty(reader):
    blank = np.full((64, 64, 3), 200, np.uint8)
    assert reader.read(blank[None]) == [""]

    class Broken:
        def __call__(self, image):
            raise RuntimeError("no")

    kept = [reader._engines.get() for _ in range(2)]
    reader._engines.put(Broken())
    assert reader.read(np.stack([blank, blank])) == [None, None]
    reader._engines.get()
    for engine in kept:
        reader._engines.put(engine)


@pytest.mark.parametrize("processes", [False, True])
def test_rapidocr_finds_lines_in_a_larger_image(world, processes):
    pytest.importorskip("rapidocr")
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (320, 192), (240, 240, 240))
    draw = ImageDraw.Draw(image)
    for y, text in ((30, "Spring"), (110, "2024")):
        draw.text((40, y), text, font=world._font(world.FONTS[0], 40), fill=(20, 20, 160))
    reader = RapidReader(detect=True, workers=1, processes=processes)
    (text,) = reader.read(np.asarray(image)[None])
    reader.close()
    assert spelling_score(text, "Spring 2024") == 1


@pytest.mark.skipif(
    "MARBLE_JAX_TEST_PROMPTS" not in os.environ,
    reason="MARBLE_JAX_TEST_PROMPTS names no prompt sets",
)
def test_real_prompts_all_have_a_target():
    from marble_jax.prompts.files import read_directory

    found = read_directory(os.environ["MARBLE_JAX_TEST_PROMPTS"], "test")
    targets = [quoted_text(p.text) for p in found["ocr"]]
    assert all(targets) and max(len(t.replace(" ", "")) for t in targets) <= 29
    assert not any(quoted_text(p.text) for p in found["geneval"] + found.get("drawbench", []))
