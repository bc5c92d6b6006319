"""The page that compares models: what is in it, what is escaped, and what a half-finished evaluation shows."""

from __future__ import annotations

import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.evaluation.comparison import compare
from marble_jax.prompts.files import Prompt
from marble_jax.report.evaluation_record import read_comparison
from marble_jax.report.side_by_side import chosen, render, write_comparison
from marble_jax.storage.images import save_png
from marble_jax.storage.workdir import Workdir
from marble_jax.types import Scores

NAMES = ("ocr", "geneval", "geneval_accuracy", "judge<b>")
MODELS = ("base", "lora-a", "lora-b")


@pytest.fixture
def folder(evaluation, tmp_path):
    """A copy of the evaluation, to change."""
    shutil.copytree(evaluation, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """An evaluation of three models on eight prompts, made by the code that makes real ones."""
    tmp_path = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            f"two cats {i // 2}" if i < 6 else 'a <script> "sign"',
            "geneval" if i < 6 else "ocr",
            {"tag": "counting" if i % 2 else "colors"} if i < 6 else {},
        )
        for i in range(8)
    ]
    scores = {}
    for k, model in enumerate(MODELS):
        values = np.stack(
            [rng.normal(k, 0.1, 8), rng.random(8), np.arange(8) % 2 * (k > 0), rng.normal(size=8)]
        )
        valid = np.array(
            [
                [i >= 6 for i in range(8)],
                [i < 6 for i in range(8)],
                [i < 6 for i in range(8)],
                [True] * 8,
            ]
        )
        scores[model] = Scores(NAMES, values.T.astype(np.float32), valid.T, np.zeros((8, 4), bool))
        for i in range(8):
            save_png(tmp_path / model / f"{i:05d}.png", np.full((6, 6, 3), 30 * i, np.uint8))
    place = Workdir(str(tmp_path))
    place.write_json("summary.json", compare(scores, prompts))
    place.write_json(
        "evaluation.json",
        {
            "models": {
                m: {
                    "source": {"model": "x"},
                    "origin": f"{m} & co",
                    "trained": ["ocr"] if m != "base" else [],
                }
                for m in MODELS
            },
            "prompts": "mine.txt",
            "num_images": 8,
            "command": "marble-jax evaluate",
            "settings": {"seed": 7, "num_steps": 4, "solver": "dpm2", "guidance": 1.0},
            "rewards": {"ocr": {"kind": "ocr", "path": "embedded"}},
        },
    )
    place.write_text(
        "prompts.jsonl",
        "".join(
            json.dumps({"prompt": p.text, "source": p.source, "metadata": p.metadata}) + "\n"
            for p in prompts
        ),
    )
    return tmp_path


def rewritten(file, *path, to):
    """Replaces one value of a JSON file."""
    content = json.loads(file.read_text())
    node = content
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = to
    file.write_text(json.dumps(content))


OTHER = (5, "x", [], [1], {}, {"a": 1}, None, 1e300, True)
"""Values that a field of another kind may have in a record that something else wrote."""


@pytest.mark.parametrize("value", OTHER)
@pytest.mark.parametrize(
    "path",
    [
        *[("evaluation.json", name) for name in ("rewards", "settings", "num_images", "prompts")],
        *[("evaluation.json", name) for name in ("settings_from", "native_sizes", "command")],
        *[("evaluation.json", "models", "base", name) for name in ("source", "origin", "trained")],
        ("evaluation.json", "models", "base"),
        ("evaluation.json", "settings", "size"),
        ("evaluation.json", "rewards", "ocr"),
        *[("summary.json", name) for name in ("scores", "gains", "joint", "sources", "geneval")],
        *[("summary.json", name) for name in ("composite", "composite_of", "paper")],
        ("summary.json", "scores", "base"),
        ("summary.json", "scores", "lora-a", "ocr"),
        ("summary.json", "scores", "lora-a", "ocr", "count"),
        ("summary.json", "gains", "lora-a"),
        ("summary.json", "joint", "all"),
        ("summary.json", "joint", "all", "lora-a"),
        ("summary.json", "sources", "ocr"),
        ("summary.json", "sources", "ocr", "base"),
        ("summary.json", "geneval", "geneval_accuracy"),
        ("summary.json", "geneval", "geneval_accuracy", "base"),
        ("summary.json", "paper", "metrics"),
        ("summary.json", "paper", "rows"),
        ("summary.json", "paper", "composite"),
    ],
)
def test_fields_of_other_kinds_cost_themselves(folder, path, value):
    name, *fields = path
    content = json.loads((folder / name).read_text())
    for field in fields[:-1]:
        content = content[field]
    assert fields[-1] in content or fields[-1] in ("size", "settings_from", "native_sizes")
    rewritten(folder / name, *fields, to=value)
    page = render(read_comparison(folder), 3)
    assert balanced(page) and '<section id="images"' in page


def test_a_summary_of_other_models_is_not_shown(folder):
    """A model was added and not scored yet: the images of all are shown, and the numbers of none."""
    record = json.loads((folder / "evaluation.json").read_text())
    record["models"]["another"] = {"source": {"model": "y"}}
    (folder / "evaluation.json").write_text(json.dumps(record))
    page = render(read_comparison(folder), 3)
    assert "summary.json is not of these models" in page and "another" in page
    assert "Not scored yet" in page and balanced(page)


def test_prompts_of_other_kinds_are_shown_as_they_are(folder):
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"prompt": ["a", "b"], "source": {"a": 1}, "metadata": 5})
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    assert balanced(render(read_comparison(folder), 3))


def balanced(page: str) -> bool:
    """Whether every element that is opened is closed, in order."""
    void, stack = {"meta", "link", "img", "br", "path", "rect", "circle", "polygon"}, []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in void:
                assert stack.pop() == tag, tag

    Parser().feed(page)
    return not stack


def test_the_page_has_everything(folder):
    page = write_comparison(str(folder), 4).read_text()
    assert balanced(page) and "http" not in page.replace("http-equiv", "")
    for anchor in ("scores", "gains", "joint", "geneval", "sources", "paper", "images", "setup"):
        assert f'<section id="{anchor}"' in page and f'href="#{anchor}"' in page
    summary = json.loads((folder / "summary.json").read_text())
    for model in MODELS:
        assert f'<data value="{summary["scores"][model]["ocr"]["mean"]!r}">' in page
        assert f'<data value="{summary["composite"][model]!r}">' in page
    for model in MODELS[1:]:
        assert f'<data value="{summary["gains"][model]["ocr"]["low"]!r}">' in page
    assert "lora-b against base: up in ocr" in page and "Gains over base" in page
    rates = summary["joint"]["all"]["lora-b"]
    assert f'<data value="{rates["domination"]["mean"]!r}">' in page
    assert (
        "Above on all (joint domination)" in page
        and "On all rewards that were evaluated: ocr" in page
    )
    assert "colours" in page and "counting" in page and "overall (mean of the kinds)" in page
    assert "4 steps of dpm2, guidance 1, seed 7" in page and "marble-jax evaluate" in page


def test_the_papers_rows_are_said_to_be_the_papers(folder):
    section = re.search(
        r'<section id="paper".*?</section>', render(read_comparison(folder)), re.DOTALL
    ).group()
    assert "Not measured here." in section and "arXiv 2605.06507, Table 1" in section
    for text in ("+ MARBLE", "22.83", "0.355", "weighted sum", "UniReward"):
        assert text in section
    assert "base &" not in section and "lora" not in section


def test_images_stand_side_by_side(folder):
    comparison = read_comparison(folder)
    page = render(comparison, 3)
    assert (
        page.count("data:image/png;base64,") == 3 * len(MODELS)
        and page.count('style="--models:3"') == 3
    )
    assert (
        chosen(comparison, 50) == [0, 2, 4, 6] and chosen(comparison, 0) == []
    )  # a prompt's first image
    assert "seed 7:6" in page
    (folder / "lora-a" / "00000.png").unlink()
    (folder / "lora-b" / "00000.png").write_bytes(b"half")
    page = render(read_comparison(folder), 3)
    assert page.count("not drawn") == 1 and "lora-b/00000.png could not be read" in page


def test_what_users_wrote_is_escaped(folder):
    page = render(read_comparison(folder), 8)
    assert "judge&lt;b&gt;" in page and "judge<b>" not in page
    assert "a &lt;script&gt;" in page and page.count("<script>") == 1
    assert "lora-a &amp; co" in page


def test_only_rewards_no_run_was_trained_on_are_marked(folder):
    page = render(read_comparison(folder))
    assert page.count('judge&lt;b&gt; <span class="tag">never trained') >= 2
    assert 'ocr <span class="tag">' not in page and 'accuracy <span class="tag">' not in page
    record = json.loads((folder / "evaluation.json").read_text())
    for entry in record["models"].values():
        entry["trained"] = []
    (folder / "evaluation.json").write_text(json.dumps(record))
    assert "never trained" not in render(read_comparison(folder))


def test_before_scoring_there_are_images_only(folder):
    (folder / "summary.json").unlink()
    page = render(read_comparison(folder), 2)
    assert (
        "Not scored yet" in page and page.count("data:image/png") == 6 and 'id="gains"' not in page
    )
    (folder / "summary.json").write_text("{")
    assert "summary.json could not be read" in render(read_comparison(folder))


def test_one_model_alone(folder):
    record = json.loads((folder / "evaluation.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    record["models"] = {"base": record["models"]["base"]}
    summary["scores"] = {"base": summary["scores"]["base"]}
    for name, content in (("evaluation", record), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    page = render(read_comparison(folder))
    assert 'id="gains"' not in page and "<b>composite</b>" not in page and 'id="scores"' in page


def test_a_folder_without_an_evaluation(tmp_path):
    with pytest.raises(
        InputError, match="evaluation: expected a folder with evaluation.json; received "
    ):
        write_comparison(str(tmp_path))
