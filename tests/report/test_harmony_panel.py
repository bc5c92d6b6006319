"""The panel of conflict by mini-batch size, from made-up measurements, whole and damaged."""

import json

import pytest
from make_workdir import make_workdir
from test_page import load

PERCENT = "\N{NO-BREAK SPACE}%"


def interval(mean, width=0.02):
    return {"mean": mean, "low": mean - width, "high": mean + width}


def unit(share, cosine):
    return {"opposing": interval(share), "worst_cosine": interval(cosine), "units": 96}


def window(share, cosine):
    return {
        "opposing": interval(share),
        "worst_cosine": interval(cosine),
        "worst_cosine_gain": interval(0.011),
        "cosines": {},
    }


def measurement(policy="base", step=0, title="sum of raw scores"):
    return {
        "policy": policy,
        "step": step,
        "anchors": False,
        "rewards": ["a", "b"],
        "num_steps": 48,
        "batch_sizes": [
            {"title": title, "units": {"9": unit(0.56, -0.1), "432": unit(0.0, 0.22)}},
            {"title": "MARBLE", "units": {"9": unit(0.0, 0.43), "432": unit(0.0, 0.35)}},
        ],
        "out_of_sample": [
            {"title": "MARBLE", "windows": {"1": window(0.17, 0.046), "8": window(0.0, 0.136)}}
        ],
    }


def write(root, *measurements):
    (root / "harmony.json").write_text(json.dumps({"version": 1, "measurements": measurements}))


@pytest.fixture
def root(tmp_path):
    return make_workdir(tmp_path / "run", done=3, images=False, compare=False)


def test_the_panel_says_what_is_noise_and_what_was_measured_out_of_sample(root):
    assert "batch-sizes" not in load(root).sections
    write(root, measurement(), measurement("current", 60))
    page = load(root)
    assert page.sections.index("batch-sizes") == page.sections.index("norms") - 1
    words = page.text["batch-sizes"]
    assert (
        f"opposes a reward in 56{PERCENT} of the mini-batches of 9 samples and in 0{PERCENT} of "
        "the whole steps of 432" in words
    )
    assert "mostly noise" in words and "averaging over more samples removes that" in words
    assert "The base model, held fixed for 48 steps (a, b)" in words
    assert "The trained policy after step 60" in words
    rows = [row for row in page.rows if row[0] == "batch-sizes"]
    texts = ["|".join(row[1]) for row in rows]
    assert texts[:3] == [
        "Update|9|432 (whole step)",
        f"sum of raw scores|56{PERCENT}|\N{MINUS SIGN}0.10|0{PERCENT}|+0.22",
        f"MARBLE|0{PERCENT}|+0.43|0{PERCENT}|+0.35",
    ]
    assert "one step: opposes one|worst cosine|gain|mean of 8 steps: opposes one" in texts[3]
    assert f"17{PERCENT}|15{PERCENT} to 19{PERCENT}|+0.046|+0.026| to |+0.066|+0.011" in texts[4]
    assert len(texts) == 10


def test_hostile_titles_stay_text(root):
    evil = '"><script>x</script>'
    write(root, measurement(title=evil))
    page = load(root)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert evil in page.text["batch-sizes"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"measurements": 3}',
        '{"measurements": [3, {}]}',
        '{"measurements": [{"batch_sizes": [1, {"units": [2]}, {}], "out_of_sample": {}}]}',
    ],
)
def test_a_damaged_file_costs_the_panel_alone(root, content):
    (root / "harmony.json").write_text(content)
    page = load(root)
    assert "batch-sizes" not in page.sections and "conflict" in page.sections


def test_figures_that_are_not_on_record_are_dashes(root):
    partial = measurement()
    del partial["batch_sizes"][1]["units"]["432"]
    partial["batch_sizes"][0]["units"]["9"] = {"opposing": None}
    partial["rewards"] = None
    write(root, partial)
    page = load(root)
    texts = ["|".join(row[1]) for row in page.rows if row[0] == "batch-sizes"]
    assert texts[1].startswith("sum of raw scores|\N{EN DASH}|0")
    assert texts[2].endswith("+0.43|\N{EN DASH}") and "Here the" not in page.text["batch-sizes"]
