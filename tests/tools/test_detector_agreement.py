"""Agreement of two results files by hand, and a results file made from images."""

import json

import numpy as np
import pytest
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.rewards.geneval_rules import detector_colours
from marble_jax.rewards.toy_world.shape_detector import ShapeDetector
from tools import detector_agreement as tool


def write(path, *results):
    path.write_text("".join(json.dumps(result) + "\n" for result in results))
    return path


def line(number, correct, tag="colors", root="/a", **more):
    return {
        "filename": f"{root}/{number:05}/samples/0000.png",
        "tag": tag,
        "correct": correct,
        **more,
    }


def test_agreement_by_hand(tmp_path):
    verdicts = [(1, 1), (1, 1), (1, 0), (0, 0)]
    ours, theirs = (
        tool.read(
            write(
                tmp_path / name,
                *(
                    line(i, bool(v[side]), "counting" if i == 3 else "colors", root=f"/{name}")
                    for i, v in enumerate(verdicts)
                ),
            )
        )
        for side, name in enumerate(("ours", "theirs"))
    )
    colours, counting, everything = tool.agreement(ours, theirs)
    assert (colours["tag"], counting["tag"], everything["tag"]) == ("colors", "counting", "all")
    assert (
        colours["same"] == pytest.approx(2 / 3)
        and counting["same"] == 1
        and everything["same"] == 0.75
    )
    # Both say yes 3/4 and 2/4 of the time: by chance they agree in 3/8 + 1/8.
    assert everything["kappa"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert counting["kappa"] == 1  # never varies, always agrees
    assert (everything["first_only"], everything["second_only"]) == (1, 0)
    assert (
        everything["first"] == 0.75
        and everything["second"] == 0.5
        and everything["objects"] is None
    )
    assert 0 < everything["low"] <= 0.75 <= everything["high"] <= 1


def test_objects():
    def thing(label, box, score=0.9):
        return {"label": label, "score": score, "box": box}

    assert tool.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert tool.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    a = [
        thing("cat", (0, 0, 10, 10)),
        thing("cat", (1, 0, 10, 10), 0.5),
        thing("dog", (0, 0, 10, 10)),
    ]
    assert tool.matched(a, [thing("cat", (0, 0, 10, 9))]) == (1, 3)  # one cat cannot stand for two
    assert tool.matched(a, []) == (0, 3)


def test_judges_a_geneval_folder(world, tmp_path, capsys):
    rng = __import__("random").Random(3)
    for i in range(2):
        folder = tmp_path / "images" / f"{i:05}"
        (folder / "samples").mkdir(parents=True)
        prompt, metadata, scene = next(
            d for d in iter(lambda: world.draw(rng), None) if "include" in (d[1] or {})
        )
        (folder / "metadata.jsonl").write_text(json.dumps({**metadata, "prompt": prompt}) + "\n")
        Image.fromarray(world.render(scene(rng))).save(folder / "samples" / "0000.png")
    out = tmp_path / "ours.jsonl"
    assert tool.judge_images(tmp_path / "images", ShapeDetector(), detector_colours, out) == 2
    results = tool.read(out)
    assert sorted(results) == ["00000/samples/0000.png", "00001/samples/0000.png"]
    assert all(np.isfinite(r["partial"]) and r["detections"] for r in results.values())
    assert tool.main(["compare", str(out), str(out)]) == 0
    assert "1.000 [1.000, 1.000]" in capsys.readouterr().out
    with pytest.raises(
        InputError, match="--images: expected folders with metadata.jsonl and samples"
    ):
        tool.judge_images(
            tmp_path / "nowhere", ShapeDetector(), detector_colours, tmp_path / "none.jsonl"
        )
    assert not list(tmp_path.glob("none*"))


def test_bad_files(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", line(0, True))
    with pytest.raises(
        InputError,
        match="line 2: expected every image once; received 00000/samples/0000.png again",
    ):
        tool.read(write(tmp_path / "twice.jsonl", line(0, True), line(0, False)))
    with pytest.raises(
        InputError,
        match="line 1: expected an object with filename, tag and correct; received KeyErr",
    ):
        tool.read(write(tmp_path / "bad.jsonl", {"tag": "colors"}))
    with pytest.raises(
        InputError,
        match="expected the same images in both files; received 00000/samples/0000.png",
    ):
        tool.agreement(tool.read(good), {})
    with pytest.raises(InputError, match="expected at least one image; received none"):
        tool.agreement({}, {})
    assert tool.main(["compare", str(good), str(tmp_path / "absent.jsonl")]) == 2
    assert (
        "absent.jsonl: expected a results file; received FileNotFoundError"
        in capsys.readouterr().err
    )
