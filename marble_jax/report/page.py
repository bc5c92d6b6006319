"""One self-contained HTML file that tells a training run from its records, be it over, half-way or just begun."""

from __future__ import annotations

import datetime
import math
from html import escape

from etils import epath

from marble_jax.report import blocks, document, findings, gradients, health, outcome, provenance
from marble_jax.report.records import Records, number, read_records

REPORT_NAME = "report.html"
_SECTIONS = (
    ("verdict", "Verdict"),
    ("before-after", "Table"),
    ("images", "Images"),
    ("curves", "Scores"),
    ("compare", "Other runs"),
    ("alpha", "Alpha"),
    ("conflict", "Agreement"),
    ("norms", "Norms"),
    ("health", "Health"),
    ("time", "Time"),
    ("setup", "Set-up"),
)


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _started(value: object) -> object:
    """The start as minutes in UTC where it is an ISO time or Unix seconds; else as recorded."""
    if math.isfinite(number(value)):
        return _moment(number(value))
    try:
        moment = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return value
    return _moment(moment.timestamp()) if moment.tzinfo else f"{moment:%Y-%m-%d %H:%M}"


def _status(records: Records) -> tuple[str, str]:
    """A word for the run's state, and the step it has reached."""
    if records.last_step is None:
        return "just begun", "no optimiser step on record yet"
    done, total = records.last_step + 1, records.num_steps
    if total is None:
        return "under way or stopped", f"{done:,} steps on record"
    return ("complete" if done >= total else "not finished"), f"{done:,} of {total:,} steps"


def _header(records: Records) -> str:
    state, reached = _status(records)
    facts = [
        ("Method", records.run.get("method")),
        ("Started", _started(records.run.get("started"))),
    ]
    times = [number(row.get("time")) for row in records.rows[-1:]]
    if times and math.isfinite(times[0]):
        facts.append(("Last record", _moment(times[0])))
    elapsed = findings.seconds_elapsed(records)
    if math.isfinite(elapsed):
        facts.append(("Duration", blocks.duration(elapsed)))
    hardware = records.run.get("hardware")
    if hardware:
        facts.append(
            (
                "Hardware",
                ", ".join(f"{k} {v}" for k, v in hardware.items())
                if isinstance(hardware, dict)
                else hardware,
            )
        )
    listed = "".join(
        f"<div><dt>{label}</dt><dd>{blocks.text(value)}</dd></div>"
        for label, value in facts
        if value not in (None, "", [])
    )
    share = ""
    if records.num_steps and records.last_step is not None:
        share = (
            f'<progress max="{records.num_steps}" value="{min(records.last_step + 1, records.num_steps)}" '
            f'aria-label="{reached}"></progress>'
        )
    legend = "".join(f"<li>{blocks.reward_label(records, name)}</li>" for name in records.names)
    return (
        f'<header><p class="kicker">Training report</p><h1>{escape(records.name)}</h1><p class="state"><b>'
        f"{state}</b>, {reached} {share}</p>"
        f"<dl>{listed}</dl>"
        + (f'<ul class="legend" aria-label="Rewards">{legend}</ul>' if legend else "")
        + "</header>"
    )


def render(records: Records) -> str:
    """The whole page as HTML text; a pure function of the records and the images they point to."""
    flaws = list(records.flaws)
    body = "".join(
        [
            outcome.verdict(records),
            outcome.before_after(records),
            outcome.images(records, flaws),
            outcome.curves(records),
            outcome.comparison(records),
            gradients.weights(records),
            gradients.conflict(records),
            gradients.norms(records),
            health.health(records),
            health.time_spent(records),
            provenance.setup(records),
        ]
    )
    footer = (
        f"Made from the records in <code>{escape(str(records.workdir))}</code> "
        f"with {len(records.rows):,} step records and {len(records.evaluations):,} evaluations."
    )
    return document.document(
        f"{records.name}: training report",
        _header(records),
        _SECTIONS,
        body + document.notes(flaws),
        footer,
    )


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` into a training workdir, replacing an earlier one in one move.

    Args:
      workdir: a local or remote (`gs://`) directory; see `records.read_records` for what it may hold.

    Returns:
      The path of the page.

    Raises:
      InputError: the directory does not exist.
    """
    records = read_records(workdir)
    page = render(records)
    return document.write_page(records.workdir / REPORT_NAME, page)
