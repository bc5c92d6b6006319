"""The page's building blocks: labels, tables, figures, sections, and the curves of a metric.

Arguments named as markup (cells, captions, bodies) are used as they are: text from a record goes through
`formatting.text` or `html.escape` first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from typing import Any

from marble_jax.report import charts, smoothing
from marble_jax.report.curves import Curve
from marble_jax.report.formatting import data, three_digits
from marble_jax.report.intervals import Interval, number
from marble_jax.report.marks import swatch
from marble_jax.report.markup import element
from marble_jax.report.records import Records, Series

WIDE, NARROW, PANEL = 1000, 350, 326
"""Chart widths in CSS pixels: across the page on a desk, on a phone, and one panel of several side by side."""


def labelled(slot: int | None, name: str, *, solid: bool = False) -> str:
    """Returns a swatch with a name beside it, as in a legend; the name is plain text."""
    words = element("span", escape(name), class_="name")
    return swatch(slot, solid=solid) + words


def reward_label(records: Records, name: str, *, tag: bool = True, solid: bool = False) -> str:
    """Returns a reward's swatch and name, with a tag where it was never trained."""
    note = ""
    if tag and name in records.heldout:
        note = " " + element("span", "never trained", class_="tag")
    return element("span", labelled(records.slot(name), name, solid=solid), note, class_="reward")


def absent(message: str) -> str:
    """Returns the sentence that stands where there is nothing to show yet."""
    return element("p", message, class_="absent")


def section(anchor: str, title: str, *body: str, lead: str = "") -> str:
    """Returns a page section; `lead` is markup that says what to look for."""
    heading = element("h2", title, id=f"{anchor}-title")
    introduction = ""
    if lead:
        introduction = element("p", lead, class_="lead")
    return element(
        "section", heading, introduction, *body, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", kind: str = ""
) -> str:
    """Returns a table of markup cells whose first column heads its row.

    Args:
      head: the columns' titles.
      rows: cells.
      caption: markup above the table.
      kind: class that the style sheet knows.
    """
    # A column without a title is headed by nothing, and no title to a screen reader.
    columns = "".join([element("th", cell, scope="col") if cell else "<td></td>" for cell in head])
    body = "".join([_table_row(row) for row in rows])
    title = element("caption", caption) if caption else ""
    content = [title, element("thead", element("tr", columns)), element("tbody", body)]
    # A wide table scrolls sideways by itself, so that the page does not on a narrow screen; with a keyboard, too.
    return element(
        "div",
        element("table", *content, class_=kind),
        class_="scroll",
        role="group",
        aria_label=f"Table: {plain(caption) or plain(', '.join(head))}",
        tabindex=0,
    )


def plain(markup: str) -> str:
    """Returns the text of a piece of markup."""
    return unescape(re.sub(r"<[^>]*>", "", markup))


def _table_row(cells: Sequence[str]) -> str:
    first, *others = cells
    parts = [element("th", first, scope="row")]
    for cell in others:
        parts.append(element("td", cell))
    return element("tr", *parts)


def interval_cell(interval: Interval, decimals: int, *, signed: bool = False) -> str:
    """Returns a mean with its interval below it, where both ends are on record."""
    mean = data(interval.mean, decimals, signed=signed)
    if not interval.bounded:
        return mean
    low = data(interval.low, decimals, signed=signed)
    high = data(interval.high, decimals, signed=signed)
    return mean + element("span", f"{low} to {high}", class_="range")


def image_scores(scores: Mapping[str, Any]) -> str:
    """Returns the scores of one image in small print, a line a reward; "" without one that is on record."""
    lines = []
    for name, score in scores.items():
        value = number(score)
        # A reward that does not apply to the prompt, or failed, has nothing to show.
        if math.isfinite(value):
            lines.append(element("dt", escape(str(name))) + element("dd", three_digits(value)))
    if not lines:
        return ""
    return element("dl", *[element("div", line) for line in lines], class_="points")


def fold(summary: str, *body: str) -> str:
    """Returns content that is hidden until its summary is opened."""
    return element("details", element("summary", summary), *body)


def figure(
    title: str,
    caption: str,
    chart: charts.Chart,
    *extra: str,
    heights: tuple[int, int] = (300, 270),
    missing: str = "",
) -> str:
    """Returns a chart drawn wide and narrow, of which the screen shows one.

    Args:
      title: markup above the chart.
      caption: markup below it: how to read it.
      chart: what is drawn.
      extra: markup below the caption.
      heights: CSS pixels of the wide and of the narrow drawing.
      missing: what to say without a chart.
    """
    wide_height, narrow_height = heights
    wide = chart.draw(WIDE, wide_height)
    if not wide:
        return absent(missing or f"{title}: nothing on record yet.")
    # Drawn anew and not scaled: scaled to a phone, the text of the wide drawing could not be read.
    narrow = chart.draw(NARROW, narrow_height)
    return element(
        "figure",
        element("h3", title),
        element("div", wide, class_="wide"),
        element("div", narrow, class_="narrow"),
        element("figcaption", caption),
        *extra,
    )


def panels(entries: Iterable[tuple[str, str]]) -> str:
    """Returns small charts side by side; entries are (title markup, svg), and one without a chart is left out."""
    parts = []
    for title, svg in entries:
        if svg:
            parts.append(element("figure", element("h3", title), svg, class_="panel"))
    return element("div", *parts, class_="panels")


def smooth_curves(
    records: Records,
    key: str,
    label: str,
    slot: int | None,
    *,
    named: bool = True,
    smooth: bool = True,
) -> list[Curve]:
    """Returns a metric as thin raw values with a running mean on top, or as one line when it has too few values."""
    series = records.series(key)
    if not len(series):
        return []
    # A width of 1 is no smoothing, and the curve needs no raw values behind it.
    width = 1
    if smooth:
        width = smoothing.smoothing_width(len(series))
    if width == 1:
        return [Curve(label, series.step, series.value, slot, named=named)]
    means = smoothing.running_mean(series.value, width)
    return [
        Curve(label, series.step, series.value, slot, kind="faint", named=False),
        Curve(label, series.step, means, slot, named=named),
    ]


def smoothing_note(records: Records, key: str) -> str:
    """Returns the sentence that explains thin and thick lines, where a curve was smoothed."""
    count = len(records.series(key))
    width = smoothing.smoothing_width(count)
    if width == 1:
        return ""
    bundle = smoothing.bundle_size(count)
    thin = "as recorded"
    if bundle > 1:
        thin = f"means of {bundle} records"
    return f" Thin: {thin}; thick: mean of {width} neighbouring records."


def step_range(records: Records) -> tuple[float, float]:
    """Returns step 0 and the last step on record, the same for all charts so that they line up."""
    last = records.last_step or 0
    for evaluation in records.evaluations:
        last = max(last, int(evaluation["step"]))
    return 0.0, float(max(last, 1))


def per_reward(records: Records, prefix: str) -> list[tuple[str, Series]]:
    """Returns name and series of each trained reward that has `prefix/name` on record."""
    entries = []
    for name in records.rewards:
        series = records.series(f"{prefix}/{name}")
        if len(series):
            entries.append((name, series))
    return entries


def reward_chart(
    records: Records, prefix: str, label: str, y_label: str, **options: Any
) -> charts.Chart:
    """Returns the chart of one metric for all trained rewards, labelled at the right.

    Args:
      records: of the run.
      prefix: the metric's key without the reward's name.
      label: what the chart shows, in a sentence, for screen readers.
      y_label: quantity and unit.
      options: further attributes of the chart.
    """
    curves = []
    for name, _ in per_reward(records, prefix):
        curves.extend(smooth_curves(records, f"{prefix}/{name}", name, records.slot(name)))
    return charts.Chart(curves, label, y_label=y_label, x_range=step_range(records), **options)
