"""One self-contained HTML file that compares several models on the same prompts and seeds, made by `evaluate`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from etils import epath

from marble_jax.errors import InputError
from marble_jax.report import blocks, charts, document
from marble_jax.report.records import number

PAGE_NAME = "index.html"
_SECTIONS = (
    ("scores", "Scores"),
    ("gains", "Gains"),
    ("geneval", "GenEval"),
    ("sources", "Sources"),
    ("paper", "The paper's table"),
    ("images", "Images"),
    ("setup", "Set-up"),
)
_TAG_WORDS = {
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
    "overall": "overall (mean of the kinds)",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is on record of an evaluation.

    Attributes:
      path: its folder.
      record: `evaluation.json`.
      summary: `summary.json`; empty before scoring.
      prompts: text, source and metadata of every image.
      flaws: what could not be read, a sentence each.
    """

    path: epath.Path
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    prompts: Sequence[Mapping[str, Any]]
    flaws: list[str]

    @property
    def models(self) -> list[str]:
        """Names, the reference first."""
        return list(self.record["models"])

    @property
    def columns(self) -> list[str]:
        """Names of what was scored."""
        scores = self.summary.get("scores", {})
        return list(next(iter(scores.values()))) if scores else []


def read_comparison(path: epath.PathLike) -> Comparison:
    """Reads the folder that `evaluate` writes.

    Raises:
      InputError: it is not such a folder.
    """
    root, flaws = epath.Path(path), []

    def read(name: str) -> Any:
        file = root / name
        try:
            return json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError) as error:
            flaws.append(f"{name} could not be read ({type(error).__name__}).")
            return {}

    record = read("evaluation.json")
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("models"), dict)
        or not record["models"]
    ):
        raise InputError(f"evaluation: expected a folder with evaluation.json; received {root}")
    listed = root / "prompts.jsonl"
    prompts = (
        [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    )
    return Comparison(root, record, read("summary.json"), prompts, flaws)


def _model(comparison: Comparison, name: str) -> str:
    """A model's swatch and name."""
    swatch = charts.swatch(comparison.models.index(name), solid=True)
    return f'<span class="reward">{swatch}<span class="name">{escape(name)}</span></span>'


def _reward(comparison: Comparison, name: str) -> str:
    """A reward's name, with a tag where a training run is compared and none was trained on it."""
    runs = [set(entry.get("trained") or ()) for entry in comparison.record["models"].values()]
    heldout = any(runs) and not any(name in run for run in runs) and not name.endswith("_accuracy")
    return escape(name) + (' <span class="tag">never trained</span>' if heldout else "")


def _cell(value: Mapping[str, Any], decimals: int, signed: bool = False) -> str:
    mean, low, high = (number(value.get(key)) for key in ("mean", "low", "high"))
    shown = blocks.data(mean, decimals, signed=signed)
    if not math.isfinite(low) or not math.isfinite(high):
        return shown
    low, high = (blocks.data(edge, decimals, signed=signed) for edge in (low, high))
    return f'{shown}<span class="range">{low} to {high}</span>'


def _decimals(values: Sequence[Mapping[str, Any]]) -> int:
    """Digits that show the narrowest interval."""
    widths = [number(v.get("high")) - number(v.get("low")) for v in values]
    return blocks.decimals_for(
        min((w for w in widths if math.isfinite(w) and w > 0), default=math.nan)
    )


def _verdict(gain: Mapping[str, Any]) -> str:
    low, high = number(gain.get("low")), number(gain.get("high"))
    return (
        "up" if low > 0 else "down" if high < 0 else "unclear" if math.isfinite(low) else "unknown"
    )


def scores(comparison: Comparison) -> str:
    """Means with intervals, rewards down and models across, and the composite."""
    title, models, found = "Scores", comparison.models, comparison.summary
    if not comparison.columns:
        return blocks.section(
            "scores", title, blocks.absent("Not scored yet: the images below are all there is.")
        )
    sentences = []
    for model in models[1:]:
        gain = found["gains"].get(model, {})
        parts = []
        for word, kind in (("up in", "up"), ("down in", "down"), ("not clear in", "unclear")):
            names = [escape(n) for n in comparison.columns if _verdict(gain.get(n, {})) == kind]
            if names:
                parts.append(f"{word} {', '.join(names)}")
        sentences.append(
            f'<p class="headline small-headline">{escape(model)} against {escape(models[0])}: '
            f"{'; '.join(parts) or 'nothing to compare'}.</p>"
        )
    rows = []
    for name in comparison.columns:
        values = [found["scores"][m][name] for m in models]
        decimals = _decimals(values)
        counts = sorted({int(v.get("count") or 0) for v in values})
        failed = sum(int(v.get("failed") or 0) for v in values)
        note = f'<span class="range">{failed} failed</span>' if failed else ""
        shown = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        rows.append(
            (_reward(comparison, name), *(_cell(v, decimals) for v in values), shown + note)
        )
    for name, by_model in found.get("geneval", {}).items():
        values = [by_model[m]["overall"] for m in models]
        rows.append(
            (
                f"{escape(name)}, mean of the kinds",
                *(_cell(v, _decimals(values)) for v in values),
                f"{int(values[0].get('count') or 0):,}",
            )
        )
    note = ""
    if len(models) > 1:
        composite = [number(found["composite"].get(m)) for m in models]
        rows.append(
            (
                "<b>composite</b>",
                *(f"<b>{blocks.data(value, 2, signed=True)}</b>" for value in composite),
                "",
            )
        )
        counted = ", ".join(escape(name) for name in found.get("composite_of", ()))
        note = (
            '<p class="small">Composite, as in the paper: the mean of a model\'s z-scores within the columns '
            f"{counted} (GenEval by its accuracy). It ranks these models among themselves; another set of models "
            "gives other numbers.</p>"
        )
    grid = blocks.table(
        ("Reward", *(_model(comparison, m) for m in models), "Images"),
        rows,
        kind="models",
        caption="Mean with its 95&nbsp;% bootstrap interval over prompts, in each reward's own units; higher is better",
    )
    return blocks.section("scores", title, *sentences, grid, note)


def gains(comparison: Comparison) -> str:
    """Paired gains over the first model, one panel a reward."""
    models = comparison.models
    if len(models) < 2 or not comparison.columns:
        return ""
    items = []
    for name in comparison.columns:
        entries = [comparison.summary["gains"][m][name] for m in models[1:]]
        ends = [
            abs(number(e.get(f)))
            for e in entries
            for f in ("low", "high")
            if math.isfinite(number(e.get(f)))
        ]
        if not ends:
            continue
        decimals = _decimals(entries)
        lines = [
            (
                _model(comparison, m),
                charts.interval_bar(
                    *(number(e.get(f)) for f in ("mean", "low", "high")),
                    models.index(m),
                    width=120,
                    reach=max(ends) or 1.0,
                ),
                _cell(e, decimals, True),
            )
            for m, e in zip(models[1:], entries)
        ]
        items.append(
            (
                _reward(comparison, name),
                blocks.table(("Model", "Gain against zero", "Gain"), lines, kind="forest"),
            )
        )
    lead = (
        f"Mean difference to <b>{escape(models[0])}</b> on the same prompt and seed, with its 95&nbsp;% interval. "
        "Upright line: zero. Within one reward all models share a scale."
    )
    return blocks.section(
        "gains",
        f"Gains over {escape(models[0])}",
        f'<div class="gain-panels">{blocks.panels(items)}</div>',
        lead=lead,
    )


def geneval(comparison: Comparison) -> str:
    """GenEval's accuracy by kind of prompt."""
    parts = []
    for name, by_model in comparison.summary.get("geneval", {}).items():
        tags = [t for t in _TAG_WORDS if any(t in by_model[m] for m in comparison.models)]
        rows = [
            (
                f"<b>{_TAG_WORDS[t]}</b>" if t == "overall" else _TAG_WORDS[t],
                *(_cell(by_model[m].get(t, {}), 2) for m in comparison.models),
                f"{int(by_model[comparison.models[0]].get(t, {}).get('count') or 0):,}",
            )
            for t in tags
        ]
        if len(tags) > 1:
            parts.append(
                blocks.table(
                    ("Kind", *(_model(comparison, m) for m in comparison.models), "Images"),
                    rows,
                    kind="models",
                    caption=f"{escape(name)}: share of images that are right in all respects",
                )
            )
    return blocks.section("geneval", "GenEval by kind", *parts) if parts else ""


def sources(comparison: Comparison) -> str:
    """Means within each prompt set."""
    found = comparison.summary.get("sources", {})
    if len(found) < 2:
        return ""
    tables = []
    for source, by_model in found.items():
        rows = []
        for name in comparison.columns:
            values = [by_model[m][name] for m in comparison.models]
            if any(v.get("count") for v in values):
                rows.append(
                    (
                        _reward(comparison, name),
                        *(_cell(v, _decimals(values)) for v in values),
                        f"{int(values[0].get('count') or 0):,}",
                    )
                )
        tables.append(
            blocks.fold(
                f"Prompts of {escape(source)}",
                blocks.table(
                    ("Reward", *(_model(comparison, m) for m in comparison.models), "Images"),
                    rows,
                    kind="models",
                ),
            )
        )
    return blocks.section("sources", "By prompt set", *tables)


def paper(comparison: Comparison) -> str:
    """The paper's own table, said to be the paper's."""
    found = comparison.summary.get("paper")
    if not found:
        return ""
    columns = np.array(list(found["rows"].values()), float)
    decimals = [
        2 if abs(column).max() > 1 or name in ("GenEval", "OCR") else 3
        for name, column in zip(found["metrics"], columns.T)
    ]
    rows = [
        (
            escape(name),
            *(blocks.data(value, d) for value, d in zip(values, decimals)),
            blocks.data(number(z), 2, signed=True),
        )
        for (name, values), z in zip(found["rows"].items(), found["composite"])
    ]
    lead = (
        "<b>Not measured here.</b> Reference rows from MARBLE (arXiv 2605.06507, Table 1): SD3.5-medium at 512 px with "
        "the paper's prompts and reward models. Its composite is taken over its own four rows. A row of this page may "
        "be put beside it only if model, prompts, reward models and their units are the same."
    )
    return blocks.section(
        "paper",
        "The paper's table",
        blocks.table(
            ("Paper", *map(escape, found["metrics"]), "composite"), rows, kind="models paper"
        ),
        lead=lead,
    )


def chosen(comparison: Comparison, count: int) -> list[int]:
    """Which prompts are shown: evenly spread, each text once."""
    first: dict[str, int] = {}
    for i, prompt in enumerate(comparison.prompts):
        first.setdefault(f"{prompt.get('source')}\n{prompt.get('prompt')}", i)
    index = list(first.values())
    if not index or count < 1:
        return []
    return [
        index[i]
        for i in sorted({int(i) for i in np.linspace(0, len(index) - 1, min(count, len(index)))})
    ]


def images(comparison: Comparison, count: int) -> str:
    """The same prompts and seeds, a column a model."""
    cards = []
    seed = comparison.record.get("settings", {}).get("seed")
    for i in chosen(comparison, count):
        text = str(comparison.prompts[i].get("prompt"))
        cells = []
        for model in comparison.models:
            file = comparison.path / model / f"{i:05d}.png"
            shown = (
                document.inline(file, f"{model}: {text}", comparison.flaws)
                if file.exists()
                else '<span class="hole">not drawn</span>'
            )
            cells.append(f'<div>{shown}<span class="when">{escape(model)}</span></div>')
        mark = "" if seed is None else f' <span class="seed">seed {escape(str(seed))}:{i}</span>'
        cards.append(
            f'<figure class="card"><div class="pair contest" style="--models:{len(cells)}">{"".join(cells)}'
            f"</div><figcaption>{escape(text)}{mark}</figcaption></figure>"
        )
    if not cards:
        return ""
    lead = "From left to right the models, from the same noise. The prompts are evenly spread over the list, unpicked."
    wide = " wide-cards" if len(comparison.models) > 2 else ""
    return blocks.section(
        "images",
        "Same prompt, same seed",
        f'<div class="cards{wide}">{"".join(cards)}</div>',
        lead=lead,
    )


def setup(comparison: Comparison) -> str:
    """What was compared, how images were drawn, and the command."""
    record = comparison.record
    rows = [
        (
            _model(comparison, name),
            escape(str(entry.get("origin") or entry.get("source", {}).get("model") or "")),
            blocks.text(entry.get("trained") or "\N{EN DASH}"),
        )
        for name, entry in record["models"].items()
    ]
    settings = {k: v for k, v in (record.get("settings") or {}).items() if v not in ("", None)}
    drawn = [(escape(str(k)).replace("_", " "), blocks.text(v)) for k, v in settings.items()]
    rewards = [
        (
            escape(name),
            blocks.text(entry.get("kind", "function")),
            blocks.text(entry.get("path", "")),
        )
        for name, entry in (record.get("rewards") or {}).items()
    ]
    return blocks.section(
        "setup",
        "Set-up",
        blocks.table(("Model", "What it is", "Trained on"), rows, kind="config"),
        *(
            blocks.fold(title, blocks.table(head, lines, kind="config"))
            for title, head, lines in (
                ("How images were drawn", ("Setting", "Value"), drawn),
                ("Rewards", ("Reward", "Kind", "From"), rewards),
            )
            if lines
        ),
        f"<h3>Command</h3><pre>{escape(str(record.get('command', '')))}</pre>"
        if record.get("command")
        else "",
    )


def render(comparison: Comparison, num_images: int = 24) -> str:
    """The whole page as HTML text."""
    models, record = comparison.models, comparison.record
    facts = [
        ("Models", ", ".join(models)),
        ("Images a model", f"{record.get('num_images', 0):,}"),
        ("Prompts", str(record.get("prompts", ""))),
    ]
    settings = record.get("settings") or {}
    if settings:
        facts.append(
            (
                "Sampler",
                f"{settings.get('num_steps')} steps of {settings.get('solver')}, guidance "
                f"{number(settings.get('guidance')):g}, seed {settings.get('seed')}",
            )
        )
    listed = "".join(
        f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in facts if value
    )
    legend = "".join(f"<li>{_model(comparison, m)}</li>" for m in models)
    title = " \N{MIDDLE DOT} ".join(map(escape, models))
    header = (
        f'<header><p class="kicker">Evaluation</p><h1>{title}</h1>'
        f'<dl>{listed}</dl><ul class="legend" aria-label="Models">{legend}</ul></header>'
    )
    body = "".join(
        [
            scores(comparison),
            gains(comparison),
            geneval(comparison),
            sources(comparison),
            paper(comparison),
            images(comparison, num_images),
            setup(comparison),
        ]
    )
    footer = (
        f"Made from <code>{escape(str(comparison.path))}</code>: scores.jsonl of every model, summary.json and "
        "the images beside them."
    )
    return document.document(
        f"{', '.join(models)}: evaluation",
        header,
        _SECTIONS,
        body + document.notes(comparison.flaws),
        footer,
    )


def write_comparison(path: epath.PathLike, num_images: int = 24) -> epath.Path:
    """Writes `index.html` into the folder of an evaluation, replacing an earlier one in one move.

    Raises:
      InputError: it is not such a folder.
    """
    comparison = read_comparison(path)
    return document.write_page(comparison.path / PAGE_NAME, render(comparison, num_images))
