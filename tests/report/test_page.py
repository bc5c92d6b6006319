"""The page as a reader's browser sees it: parsed, not matched as text."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from make_workdir import HELDOUT, HOSTILE, PROMPTS, REWARDS, make_workdir
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.report import read_records, write_report
from marble_jax.report.formatting import three_digits
from marble_jax.storage.images import save_sample

VOID = {"meta", "link", "img", "br", "input"}
SECTIONS = [
    "verdict",
    "before-after",
    "images",
    "curves",
    "compare",
    "alpha",
    "conflict",
    "fresh",
    "norms",
    "health",
    "time",
    "setup",
]


class Page(html.parser.HTMLParser):
    """Collects tags, attributes, text by section and tables; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sections, self.text, self.rows, self.cell = (
            [],
            [],
            [],
            {},
            [],
            None,
        )
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "section":
            self.sections.append(attrs["id"])
        if tag == "tr":
            self.rows.append((self.sections[-1], [], []))
        if tag == "data":
            self.rows[-1][2].append(
                (float(attrs["value"]), "")
            ) if self.rows and "tr" in self.open else None
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-4:])
        self.open.pop()

    def handle_data(self, data):
        where = self.sections[-1] if self.sections else "head"
        self.text[where] = self.text.get(where, "") + data
        if "tr" in self.open:
            self.rows[-1][1].append(data)
            if self.open[-1] == "data":
                self.rows[-1][2][-1] = (self.rows[-1][2][-1][0], data)


def load(root):
    return Page(write_report(root).read_text())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = make_workdir(tmp_path_factory.mktemp("full") / "run")
    return root, load(root)


def test_sections_in_order_and_reachable(full):
    _, page = full
    assert page.sections == SECTIONS
    targets = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert set(targets) <= ids and set(SECTIONS) <= set(targets)


def test_numbers_of_the_table_are_those_of_the_records(full):
    root, page = full
    records = read_records(root)
    rows = [row for row in page.rows if row[0] == "before-after"][1:]
    assert len(rows) == len(REWARDS + HELDOUT)
    for name, (_, words, numbers) in zip(REWARDS + HELDOUT, rows):
        assert name in words and ("never trained" in words) == (name in HELDOUT)
        wanted = [
            entry[name][field]
            for entry in (
                records.base["scores"],
                records.trained[-1]["scores"],
                records.trained[-1]["gain"],
            )
            for field in ("mean", "low", "high")
        ]
        assert [value for value, _ in numbers] == wanted + [records.base["scores"][name]["count"]]
        for value, shown in numbers:
            text = shown.replace("\N{MINUS SIGN}", "-")
            decimals = len(text.split(".")[1]) if "." in text else 0
            assert float(text) == pytest.approx(value, abs=0.51 * 10.0**-decimals)


def test_shares_of_images_that_gained_on_all_rewards(full, tmp_path):
    _, page = full
    assert "All rewards at once" not in page.text["before-after"]
    root = make_workdir(tmp_path / "run", images=False)
    file = root / "evaluation.jsonl"
    *before, last = [json.loads(line) for line in file.read_text().splitlines()]
    shares = {
        "domination": {"mean": 0.236, "low": 0.2, "high": 0.28},
        "collapse": {"mean": 0.051, "low": 0.04, "high": 0.07},
        "difference": {"mean": 0.185, "low": 0.14, "high": 0.23},
    }
    last["joint"] = {"trained": {"rewards": ["geneval", HOSTILE], "count": 1840} | shares}
    file.write_text("".join(json.dumps(e) + "\n" for e in [*before, last]))
    page = load(root)
    words = next(row[1] for row in page.rows if "1,840" in row[1])
    text = " ".join(words).replace("\xa0", " ")
    assert "the rewards that were trained on: geneval, <script>" in text
    assert "23.6 % 20.0 to 28.0 5.1 % 4.0 to 7.0 +18.5 % +14.0 to +23.0 1,840" in text
    assert "24 % / 5 %" in page.text["compare"].replace("\xa0", " ")


def test_nothing_outside_the_file_is_asked_for(full):
    root, page = full
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert not attrs.get(name) or attrs[name].startswith(("data:", "#")), (tag, attrs)
    text = (root / "report.html").read_text()
    assert not re.search(
        r"url\(|@import|https?:", re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    )
    assert "//" not in re.sub(
        r"^\s*//.*$", "", re.search(r"<script>(.*?)</script>", text, re.S).group(1), flags=re.M
    )


def test_hostile_text_stays_text(full):
    _, page = full
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert HOSTILE in page.text["images"]
    assert "<img src=x onerror=alert(1)>" in page.text["setup"]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert any(HOSTILE in attrs["alt"] for tag, attrs in page.tags if tag == "img")


def test_hostile_names_stay_text(tmp_path):
    root = make_workdir(tmp_path / "run", done=21, images=False, compare=False)
    evil = '"><script>x</script>'
    for file in ("run.json", "metrics.jsonl", "evaluation.jsonl"):
        (root / file).write_text(
            (root / file)
            .read_text()
            .replace("clip", evil.replace('"', '\\"'))
            .replace("signs-and-shapes", evil.replace('"', '\\"'))
        )
    page = load(root)
    assert [tag for tag, _ in page.tags].count("script") == 1 and evil in page.text["before-after"]


def test_images_are_inside_with_words(full):
    _, page = full
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(PROMPTS) * (2 + 4)
    assert all(
        i["src"].startswith("data:image/png;base64,") and i["alt"] and i["width"] == "64"
        for i in images
    )


def test_large_images_are_scaled_down(tmp_path):
    root = make_workdir(tmp_path / "run", done=20, compare=False, size=512)
    images = [attrs for tag, attrs in load(root).tags if tag == "img"]
    assert images and all(
        i["src"].startswith("data:image/jpeg;base64,") and i["width"] == "320" for i in images
    )


@pytest.mark.parametrize("side, kind", [(24, "png"), (400, "webp")])
def test_clips_move_and_stand_as_strips_in_print(tmp_path, side, kind):
    """Small ones are the files themselves; large ones are made small, moving and still."""
    root = make_workdir(tmp_path / "run", done=20, compare=False)
    clip = np.zeros((5, side, side, 3), np.uint8)
    for number, frame in enumerate(clip):
        frame[:, : 2 + number] = 200
    for file in (root / "samples").glob("step_*/00.png"):
        save_sample(file, clip, {}, 16)
    page = load(root)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    moving = [attrs for attrs in images if attrs.get("class") == "moving"]
    assert moving and all(i["alt"] and i["width"] == str(min(side, 320)) for i in moving)
    for image in moving:
        assert image["src"].startswith(f"data:image/{kind};base64,")
        raw = base64.b64decode(image["src"].partition(",")[2])
        with Image.open(io.BytesIO(raw)) as shown:
            assert shown.n_frames == 5 and shown.size == (min(side, 320),) * 2
    strips = [attrs for tag, attrs in page.tags if tag == "span" and attrs.get("class") == "frames"]
    still = [attrs for attrs in images if attrs.get("alt") == ""]
    assert len(strips) == len(moving) and len(still) == 4 * len(moving)


def test_charts_have_words_and_tables_have_heads(full):
    _, page = full
    assert all(
        attrs.get("aria-label") or attrs.get("aria-hidden")
        for tag, attrs in page.tags
        if tag == "svg"
    )
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("thead") > 10
    assert dict(page.tags[0:1])["html"] == {"lang": "en"} and tags.count("h1") == 1


@pytest.mark.parametrize(
    "kept",
    [
        (),
        ("run.json",),
        ("metrics.jsonl",),
        ("evaluation.jsonl",),
        ("run.json", "metrics.jsonl"),
        ("samples",),
    ],
)
def test_any_record_may_be_missing(tmp_path, kept):
    root = make_workdir(tmp_path / "run", done=21, compare=False)
    for path in list(root.iterdir()):
        if path.name not in kept:
            path.rename(tmp_path / path.name)
    page = load(root)
    assert page.sections == [s for s in SECTIONS if s != "compare"]
    assert "nan" not in " ".join(page.text.values()).lower().split()


def test_an_empty_workdir_says_what_is_not_there(tmp_path):
    page = load(tmp_path)
    assert "no records yet" in page.text["verdict"] and "just begun" in page.text["head"]
    assert (
        "No evaluation yet" in page.text["before-after"] and "No metrics yet" in page.text["health"]
    )


def test_half_way(tmp_path):
    page = load(make_workdir(tmp_path / "run", done=47))
    assert "not finished" in page.text["head"] and "47 of 120 steps" in page.text["head"]
    assert "So far, at step 40" in page.text["verdict"] and "73 steps are left" in page.text["time"]


def test_one_step(tmp_path):
    assert load(make_workdir(tmp_path / "run", done=1)).sections == SECTIONS


def test_damaged_image_and_cut_line_are_told(tmp_path):
    root = make_workdir(tmp_path / "run", done=21)
    image = root / "samples" / "step_000020" / "01.png"
    image.write_bytes(image.read_bytes()[:60])
    metrics = root / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-30])
    text = load(root).text["setup"]
    assert (
        "step_000020/01.png could not be read" in text
        and "last line of metrics.jsonl is incomplete" in text
    )


def test_alarms_are_words(full):
    _, page = full
    assert (
        "Diversity has halved" in page.text["health"]
        and "sharpness fell without being trained" in page.text["verdict"]
    )


def test_failures_and_the_share_of_waiting_are_on_the_page(full):
    """Eight of the 120 steps (0, 17, ..., 119) lose 23 scores each; 5.1 of a step's 40.4 seconds are waiting."""
    root, page = full
    assert "Failed, in all" in page.text["health"]
    assert '<data value="184.0">184</data>' in (root / "report.html").read_text()
    assert "13\N{NO-BREAK SPACE}% of a step is spent waiting for rewards" in page.text["time"]


@pytest.mark.parametrize("objective", ["nft", "policy_gradient"])
def test_the_unit_of_the_divergence_is_that_of_the_objective(tmp_path, objective):
    rows = [{"step": step, "objective/kl": 1e-3 * step} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text(json.dumps({"config": {"objective.name": objective}}))
    load(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert ("mean squared velocity difference" in page) == (objective == "nft")
    assert ("squared difference of step means / (2 diffusion" in page) == (objective != "nft")


def test_figures_below_rounding_are_named(tmp_path):
    """Three steps: the first has no distance in any dtype, the last one reads two figures that rounding makes."""
    rows = []
    for step in range(3):
        marked = {"rounding/kl": float(step == 0), "rounding/velocity_gap": 1.0}
        distances = {"objective/kl": 1e-3 * step, "objective/velocity_gap": 1e-6}
        marks = {"rounding/floor": 2.5e-5, "rounding/loss": 1.0}
        rows.append({"step": step} | distances | marked | marks)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = load(tmp_path).text["health"]
    assert "Distance from the rollout policy" in text
    assert "the distance from the rollout policy in 3 of 3 step(s), the last of them 2" in text
    assert "what the losses say of the policy" in text and "2.5e" in text
    # Of the base model there is nothing to say: only the step before the first update is marked.
    assert "the distance from the base model in" not in text


def test_other_runs_stand_beside_this_one(full):
    _, page = full
    assert "weighted_sum" in page.text["compare"] and "this run" in page.text["compare"]


def test_text_that_utf8_cannot_hold_does_not_stop_the_page(tmp_path):
    (tmp_path / "samples" / "step_000000").mkdir(parents=True)
    (tmp_path / "samples" / "prompts.json").write_text(
        '[{"prompt": "lone \\ud800 half", "seed": 1}]'
    )
    (tmp_path / "samples" / "step_000000" / "00.png").write_bytes(b"")
    page = Page(write_report(tmp_path).read_bytes().decode("utf-8"))
    assert "lone ? half" in page.text["images"] and "unreadable" in page.text["images"]


def test_configuration_falls_back_to_the_resolved_one(tmp_path):
    (tmp_path / "config.json").write_text('{"training.learning_rate": 0.0003}')
    assert "training.learning_rate" in load(tmp_path).text["setup"]


def test_many_rewards_share_colours_but_not_looks(tmp_path):
    names = [f"reward{i}" for i in range(11)]
    (tmp_path / "run.json").write_text(json.dumps({"rewards": names, "num_steps": 3}))
    rows = [{"step": s} | {f"harmonize/alpha/{n}": 1 / 11 for n in names} for s in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert all(name in load(tmp_path).text["alpha"] for name in names)


def test_written_in_one_move_and_again(tmp_path):
    root = make_workdir(tmp_path / "run", done=3, images=False, compare=False)
    first = write_report(root)
    assert first == epath.Path(root) / "report.html"
    before = first.read_text()
    assert write_report(str(root)).read_text() == before
    assert not [p.name for p in root.iterdir() if "partial" in p.name]


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    from marble_jax.report import page as module

    root = make_workdir(tmp_path / "run", done=3, images=False, compare=False)
    before = write_report(root).read_text()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(epath.Path(root)), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        module.write_report(root)
    assert (root / "report.html").read_text() == before
    assert not [p.name for p in root.iterdir() if "partial" in p.name]


def test_missing_workdir():
    with pytest.raises(
        InputError, match="report workdir: expected the directory of a training run"
    ):
        write_report("/no/such/run")


def test_a_long_run_stays_small(tmp_path):
    root = make_workdir(
        tmp_path / "run",
        num_steps=900,
        evaluate_every=300,
        refresh_every=1,
        images=False,
        compare=False,
    )
    page = load(root)
    paths = [
        attrs["d"]
        for tag, attrs in page.tags
        if tag == "path" and "curve" in attrs.get("class", "")
    ]
    assert max(d.count("L") for d in paths) < 300 and "means of 4 records" in page.text["conflict"]


def test_neither_jax_nor_matplotlib_is_imported():
    heavy = ("jax", "jaxlib.xla_client", "flax", "torch", "matplotlib")
    code = f"import sys, marble_jax.report; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("started", "told"),
    [
        (1.7e9 - 600, "23 min"),
        ("2023-11-14T22:03:20+00:00", "23 min"),
        # In no zone, after the last record, and not told: from the first record on.
        ("2023-11-14T22:03:20", "13 min"),
        (1.8e9, "13 min"),
        (None, "13 min"),
    ],
)
def test_the_duration_counts_from_the_start_where_it_is_known(tmp_path, started, told):
    """19 steps of 41 s behind the first record, which is ten minutes after the start."""
    root = make_workdir(tmp_path / "run", num_steps=20, evaluate_every=5, images=False)
    run = json.loads((root / "run.json").read_text())
    (root / "run.json").write_text(json.dumps(run | {"started": started}))
    rows = (root / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(row)["time"] for row in rows]
    assert (times[0], times[-1]) == (1.7e9, 1.7e9 + 19 * 41)
    page = write_report(root).read_text()
    assert re.search(rf"Duration</dt>\s*<dd>{told}<", page)


def test_scores_below_an_image_have_digits_alike():
    texts = [three_digits(value) for value in (0.2, 0.201, 7.5, 21.25, 120.0, 1234.0, -0.0301)]
    assert texts == ["0.200", "0.201", "7.50", "21.2", "120", "1.23e+03", "\u22120.0301"]
