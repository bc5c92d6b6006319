"""The page's building blocks: numbers, tables, figures, sections.

Arguments named as markup (cells, captions, bodies) are used as they are: text from a record goes through `text` or
`html.escape` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from marble_jax.report import charts
from marble_jax.report.records import Records, Series

WIDE, NARROW, PANEL = 1000, 350, 326
"""Chart widths in CSS pixels: across the page on a desk, on a phone, and one panel of several side by side."""


def text(value: Any) -> str:
    """Any recorded value as escaped text."""
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return escape(str(value))


def decimals_for(width: float) -> int:
    """How many decimals show an interval of this width to two digits; 3 when the width is unknown."""
    return (
        min(6, max(0, 1 - math.floor(math.log10(width))))
        if math.isfinite(width) and width > 0
        else 3
    )


def data(value: float, decimals: int = 3, *, signed: bool = False, unit: str = "") -> str:
    """A rounded number in an element that carries the full value, or a dash with words for screen readers."""
    if not math.isfinite(value):
        return '<span class="none" title="not on record">\N{EN DASH}</span>'
    shown = f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    return f'<data value="{float(value)!r}">{shown}{unit}</data>'


def short(value: float) -> str:
    """A number to three significant digits."""
    return (
        "\N{EN DASH}" if not math.isfinite(value) else f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
    )


def percent(value: float) -> str:
    return (
        "\N{EN DASH}"
        if not math.isfinite(value)
        else "<1 %"
        if 0 < value < 0.005
        else f"{value:.0%}".replace("%", "\N{NO-BREAK SPACE}%")
    )


def duration(seconds: float) -> str:
    """`41 s`, `7 min`, `3 h 05 min`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return "\N{EN DASH}"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes < 48 * 60
        else f"{minutes // 1440} d {minutes % 1440 // 60} h"
    )


def reward_label(records: Records, name: str, *, tag: bool = True, solid: bool = False) -> str:
    """A reward's swatch and name, with a tag where it was never trained."""
    slot = records.names.index(name) if name in records.names else None
    note = ' <span class="tag">never trained</span>' if tag and name in records.heldout else ""
    return f'<span class="reward">{charts.swatch(slot, solid=solid)}<span class="name">{escape(name)}</span>{note}</span>'


def absent(message: str) -> str:
    return f'<p class="absent">{message}</p>'


def section(anchor: str, title: str, *body: str, lead: str = "") -> str:
    """A page section; `lead` is markup that says what to look for."""
    head = f'<p class="lead">{lead}</p>' if lead else ""
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">{title}</h2>'
        f"{head}{''.join(body)}</section>"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", kind: str = ""
) -> str:
    """A table of markup cells whose first column heads its row; it scrolls sideways by itself on a narrow screen."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{kind}">{title}<thead><tr>{columns}</tr></thead><tbody>{lines}</tbody>'
        "</table></div>"
    )


def fold(summary: str, *body: str) -> str:
    return f"<details><summary>{summary}</summary>{''.join(body)}</details>"


def figure(
    title: str, caption: str, draw: Callable[[int], str], *extra: str, missing: str = ""
) -> str:
    """A chart drawn wide and narrow, of which the screen shows one, with its title above and how to read it below."""
    wide = draw(WIDE)
    if not wide:
        return absent(missing or f"{title}: nothing on record yet.")
    return (
        f'<figure><h3>{title}</h3><div class="wide">{wide}</div><div class="narrow">{draw(NARROW)}</div>'
        f"<figcaption>{caption}</figcaption>{''.join(extra)}</figure>"
    )


def panels(items: Iterable[tuple[str, str]]) -> str:
    """Small charts side by side; items are (title markup, svg)."""
    return (
        '<div class="panels">'
        + "".join(
            f'<figure class="panel"><h3>{title}</h3>{svg}</figure>' for title, svg in items if svg
        )
        + "</div>"
    )


def smooth_lines(
    records: Records,
    key: str,
    label: str,
    slot: int | None,
    *,
    dashed: bool = True,
    named: bool = True,
    smooth: bool = True,
) -> list[charts.Line]:
    """A metric as thin raw values with a running mean on top, or as one line when it has too few values to smooth."""
    series = records.series(key)
    width = charts.smoothing_width(len(series)) if smooth else 1
    if width == 1:
        return (
            [charts.Line(label, series.step, series.value, slot, dashed=dashed, named=named)]
            if len(series)
            else []
        )
    return [
        charts.Line(label, series.step, series.value, slot, kind="faint", named=False),
        charts.Line(
            label,
            series.step,
            charts.running_mean(series.value, width),
            slot,
            dashed=dashed,
            named=named,
        ),
    ]


def smoothing_note(records: Records, key: str) -> str:
    """The sentence that explains thin and thick lines, where a curve was smoothed."""
    count = len(records.series(key))
    width, bundle = charts.smoothing_width(count), charts.bundle_size(count)
    return (
        f" Thin: {'as recorded' if bundle == 1 else f'means of {bundle} records'}; thick: mean of {width} "
        "neighbouring records."
        if width > 1
        else ""
    )


def step_range(records: Records) -> tuple[float, float]:
    """From step 0 to the last step on record, the same for all charts so that they line up."""
    steps = [records.last_step or 0] + [int(e["step"]) for e in records.evaluations]
    return 0.0, float(max(max(steps), 1))


def per_reward(records: Records, prefix: str) -> list[tuple[int, str, Series]]:
    """(slot, name, series) of each trained reward that has `prefix/name` on record."""
    found = [
        (slot, name, records.series(f"{prefix}/{name}"))
        for slot, name in enumerate(records.rewards)
    ]
    return [entry for entry in found if len(entry[2])]


def reward_chart(
    records: Records, prefix: str, label: str, y_label: str, *, height: int = 300, **options: Any
) -> Callable[[int], str]:
    """A `draw(width)` of one metric for all trained rewards, labelled at the right."""
    lines = [
        line
        for slot, name, _ in per_reward(records, prefix)
        for line in smooth_lines(records, f"{prefix}/{name}", name, slot)
    ]

    def draw(width: int) -> str:
        tall = height if width > 500 else height - 30
        return charts.line_chart(
            lines,
            width=width,
            height=tall,
            label=label,
            y_label=y_label,
            x_range=step_range(records),
            **options,
        )

    return draw
