"""One self-contained HTML file that compares several models on the same prompts and seeds, made by `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from etils import epath

from marble_jax.report import blocks, comparison_tables, document
from marble_jax.report.comparison_tables import model_label
from marble_jax.report.evaluation_record import Comparison, read_comparison
from marble_jax.report.formatting import NOT_ON_RECORD, text
from marble_jax.report.intervals import number
from marble_jax.report.markup import element, items

PAGE_NAME = "index.html"
_SECTIONS = (
    ("scores", "Scores"),
    ("gains", "Gains"),
    ("joint", "All at once"),
    ("geneval", "GenEval"),
    ("sources", "Sources"),
    ("paper", "The paper's table"),
    ("images", "Images"),
    ("setup", "Set-up"),
)


def _first_images(comparison: Comparison) -> list[int]:
    """Returns the index of every prompt's first image."""
    by_prompt: dict[tuple[str, str], int] = {}
    for index, prompt in enumerate(comparison.prompts):
        # Several images of one prompt differ by their seed alone; the first one stands for them.
        by_prompt.setdefault((str(prompt.get("source")), str(prompt.get("prompt"))), index)
    return list(by_prompt.values())


def chosen(comparison: Comparison, count: int) -> list[int]:
    """Returns the indices of the images that are shown: evenly spread, each prompt once."""
    indices = _first_images(comparison)
    if not indices or count < 1:
        return []
    positions = np.linspace(0, len(indices) - 1, min(count, len(indices)))
    distinct = sorted({int(position) for position in positions})
    return [indices[position] for position in distinct]


def images(comparison: Comparison, count: int) -> str:
    """Returns the same prompts and seeds, a column a model; "" without prompts."""
    cards = [_card(comparison, index) for index in chosen(comparison, count)]
    if not cards:
        return ""
    lead = "From left to right the models, from the same noise. The prompts are evenly spread over the list, unpicked."
    classes = "cards"
    # Two images fit where a training report's pair does; more need the width of the page.
    if len(comparison.models) > 2:
        classes = "cards wide-cards"
    return blocks.section(
        "images", "Same prompt, same seed", element("div", *cards, class_=classes), lead=lead
    )


def _card(comparison: Comparison, index: int) -> str:
    """Returns every model's image at `index`, with its prompt."""
    prompt = str(comparison.prompts[index].get("prompt"))
    cells = []
    for model in comparison.models:
        shown = _image(comparison, model, index, prompt)
        caption = element("span", escape(model), class_="when")
        points = blocks.image_scores(comparison.image_scores.get(model, {}).get(index, {}))
        cells.append(element("div", shown, caption, points))
    seed = comparison.settings.get("seed")
    mark = ""
    if seed is not None:
        mark = " " + element("span", f"seed {escape(str(seed))}:{index}", class_="seed")
    row = element("div", *cells, class_="pair contest", style=f"--models:{len(cells)}")
    return element("figure", row, element("figcaption", escape(prompt), mark), class_="card")


def _image(comparison: Comparison, model: str, index: int, prompt: str) -> str:
    file = comparison.path / model / f"{index:05d}.png"
    if not file.exists():
        return element("span", "not drawn", class_="hole")
    return document.inline(file, f"{model}: {prompt}", comparison.flaws)


def setup(comparison: Comparison) -> str:
    """Returns what was compared, how images were drawn, and the command."""
    record = comparison.record
    command = ""
    if record.get("command"):
        command = element("h3", "Command") + element("pre", escape(str(record["command"])))
    return blocks.section(
        "setup",
        "Set-up",
        _model_table(comparison),
        _settings_table(comparison),
        _reward_table(record.get("rewards") or {}),
        command,
    )


def _model_table(comparison: Comparison) -> str:
    rows = []
    for name, entry in comparison.record["models"].items():
        # A training run has an origin; of a plain checkpoint there is the name it was loaded by.
        origin = entry.get("origin") or (entry.get("source") or {}).get("model") or ""
        trained = text(entry.get("trained") or NOT_ON_RECORD)
        rows.append((model_label(comparison, name), escape(str(origin)), trained))
    return blocks.table(("Model", "What it is", "Trained on"), rows, kind="config")


def _settings_table(comparison: Comparison) -> str:
    """Returns how the images of all models were drawn, and where each of these settings comes from."""
    origins = comparison.record.get("settings_from") or {}
    rows = []
    for name, value in comparison.settings.items():
        if value in ("", None, []):
            continue
        label = escape(str(name)).replace("_", " ")
        # The option is called otherwise than the setting.
        origin = origins.get({"num_steps": "steps"}.get(name, name), "")
        rows.append((label, text(value), escape(str(origin))))
    if not rows:
        return ""
    heading = element("h3", "How the images of all models were drawn")
    return heading + blocks.table(("Setting", "Value", "From"), rows, kind="config")


def _reward_table(rewards: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in rewards.items():
        kind = text(entry.get("kind", "function"))
        rows.append((escape(name), kind, text(entry.get("path", ""))))
    if not rows:
        return ""
    return blocks.fold("Rewards", blocks.table(("Reward", "Kind", "From"), rows, kind="config"))


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    record, settings = comparison.record, comparison.settings
    facts = [
        ("Models", ", ".join(comparison.models)),
        ("Images a model", f"{record.get('num_images') or 0:,}"),
        ("Prompts", str(record.get("prompts", ""))),
    ]
    if settings:
        facts.append(("All models drawn with", _drawing(settings)))
    native = comparison.record.get("native_sizes") or {}
    for model, size in native.items():
        facts.append((f"Own size of {model}", f"{size} px, not drawn at"))
    return facts


def _drawing(settings: Mapping[str, Any]) -> str:
    """Returns in a line how images were drawn; what older evaluations do not have on record is left out."""
    parts = []
    if settings.get("size"):
        size = list(settings["size"])
        # Of clips their frames come first.
        if number(settings.get("num_frames")) > 1:
            size.insert(0, settings["num_frames"])
        parts.append(" x ".join(map(str, size)) + " px")
    parts.append(f"{settings.get('num_steps')} steps of {settings.get('solver')}")
    parts.append(f"guidance {number(settings.get('guidance')):g}")
    if settings.get("max_sequence_length"):
        parts.append(f"{settings['max_sequence_length']} text tokens")
    if settings.get("dtype"):
        parts.append(str(settings["dtype"]))
    if settings.get("stream_dtype") not in (None, "compute", settings.get("dtype")):
        parts.append(f"streams {settings['stream_dtype']}")
    if settings.get("integer_timesteps"):
        parts.append("whole timesteps")
    parts.append(f"seed {settings.get('seed')}")
    return ", ".join(parts)


def _header(comparison: Comparison) -> str:
    names = [escape(model) for model in comparison.models]
    legend = [model_label(comparison, model) for model in comparison.models]
    return element(
        "header",
        element("p", "Evaluation", class_="kicker"),
        element("h1", " \N{MIDDLE DOT} ".join(names)),
        document.facts(_facts(comparison)),
        element("ul", items(legend), class_="legend", aria_label="Models"),
    )


def render(comparison: Comparison, num_images: int = 24) -> str:
    """Returns the whole page as HTML text.

    Args:
      comparison: what is on record; its `flaws` get a sentence for each image that cannot be read.
      num_images: prompts whose images are shown, at most.
    """
    sections = [
        comparison_tables.scores(comparison),
        comparison_tables.gains(comparison),
        comparison_tables.joint(comparison),
        comparison_tables.geneval(comparison),
        comparison_tables.sources(comparison),
        comparison_tables.paper(comparison),
        images(comparison, num_images),
        setup(comparison),
    ]
    # Made after the sections, since an image that cannot be read is found out while it is embedded.
    notes = document.notes(comparison.flaws)
    folder = element("code", escape(str(comparison.path)))
    footer = (
        f"Made from {folder}: scores.jsonl of every model, summary.json and the images beside them."
    )
    title = f"{', '.join(comparison.models)}: evaluation"
    body = "".join([*sections, notes])
    return document.document(title, _header(comparison), _SECTIONS, body, footer)


def write_comparison(path: epath.PathLike, num_images: int = 24) -> epath.Path:
    """Writes `index.html` into the folder of an evaluation, replacing an earlier one in one move.

    Raises:
      InputError: it is not such a folder.
    """
    comparison = read_comparison(path)
    return document.write_page(comparison.path / PAGE_NAME, render(comparison, num_images))
