"""One self-contained HTML file that tells a training run from its records, be it over, half-way or just begun."""

from __future__ import annotations

import contextlib
import datetime
import math
from html import escape
from typing import Any

from etils import epath

from marble_jax.report import (
    blocks,
    document,
    findings,
    fresh_samples,
    gradients,
    harmony,
    health,
    other_runs,
    provenance,
    scores,
    strips,
    timing,
    verdict,
)
from marble_jax.report.formatting import duration
from marble_jax.report.intervals import number
from marble_jax.report.markup import element, items
from marble_jax.report.reading import read_records
from marble_jax.report.records import Records

REPORT_NAME = "report.html"
_SECTIONS = (
    ("verdict", "Verdict"),
    ("before-after", "Table"),
    ("images", "Images"),
    ("curves", "Scores"),
    ("compare", "Other runs"),
    ("alpha", "Alpha"),
    ("conflict", "Agreement"),
    ("fresh", "Other samples"),
    (harmony.ANCHOR, "Noise"),
    ("norms", "Norms"),
    ("health", "Health"),
    ("time", "Time"),
    ("setup", "Set-up"),
)


def _moment(seconds: float) -> str:
    try:
        # UTC, so that a page does not change with the place where it is made.
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        # Beyond the year 9999: no time of this clock.
        return f"{seconds:g} s"
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _started(recorded: Any) -> Any:
    """Returns the start as minutes in UTC where it is an ISO time or Unix seconds; else as recorded."""
    seconds = number(recorded)
    if math.isfinite(seconds):
        return _moment(seconds)
    try:
        moment = datetime.datetime.fromisoformat(str(recorded))
    except ValueError:
        return recorded
    # A time without a zone is nobody's UTC; it is shown as it was written.
    if moment.tzinfo is None:
        return f"{moment:%Y-%m-%d %H:%M}"
    return _moment(moment.timestamp())


def _status(records: Records) -> tuple[str, str]:
    """Returns a word for the run's state, and the step it has reached."""
    if records.last_step is None:
        return "just begun", "no optimiser step on record yet"
    # Steps count from 0.
    done, total = records.last_step + 1, records.num_steps
    if total is None:
        return "under way or stopped", f"{done:,} steps on record"
    state = "complete" if done >= total else "not finished"
    return state, f"{done:,} of {total:,} steps"


def _hardware(recorded: Any) -> Any:
    if not isinstance(recorded, dict):
        return recorded
    return ", ".join(f"{name} {value}" for name, value in recorded.items())


def _facts(records: Records) -> list[tuple[str, Any]]:
    """Returns label and value of what stands below the title; an empty value is left out there."""
    run = records.run
    facts = [("Method", run.get("method")), ("Started", _started(run.get("started")))]
    if records.rows:
        last_record = number(records.rows[-1].get("time"))
        if math.isfinite(last_record):
            facts.append(("Last record", _moment(last_record)))
    elapsed = _seconds_since_start(records)
    if math.isfinite(elapsed):
        facts.append(("Duration", duration(elapsed)))
    hardware = run.get("hardware")
    if hardware:
        facts.append(("Hardware", _hardware(hardware)))
    return facts


def _seconds_since_start(records: Records) -> float:
    """Returns wall-clock seconds from the start to the last record, compilation included; NaN without records.

    A run that does not say when it began, or not in which zone, has those from its first record on.
    """
    recorded = records.run.get("started")
    begun = number(recorded)
    if isinstance(recorded, str):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            moment = datetime.datetime.fromisoformat(recorded)
            begun = moment.timestamp() if moment.tzinfo else math.nan
    last = number(records.rows[-1].get("time")) if records.rows else math.nan
    if math.isfinite(begun) and last >= begun:
        return last - begun
    return findings.seconds_elapsed(records)


def _progress(records: Records, reached: str) -> str:
    if not records.num_steps or records.last_step is None:
        return ""
    # A run may have gone on past the number it was first asked for.
    done = min(records.last_step + 1, records.num_steps)
    return element("progress", max=records.num_steps, value=done, aria_label=reached)


def _legend(records: Records) -> str:
    if not records.names:
        return ""
    labels = [blocks.reward_label(records, name) for name in records.names]
    return element("ul", items(labels), class_="legend", aria_label="Rewards")


def _header(records: Records) -> str:
    state, reached = _status(records)
    status = f"{element('b', state)}, {reached} {_progress(records, reached)}"
    return element(
        "header",
        element("p", "Training report", class_="kicker"),
        element("h1", escape(records.name)),
        element("p", status, class_="state"),
        document.facts(_facts(records)),
        _legend(records),
    )


def _sections(records: Records) -> list[tuple[str, str]]:
    """Returns anchor and name of each section."""
    named = dict(_SECTIONS) | {"images": records.samples.capitalize()}
    return list(named.items())


def render(records: Records) -> str:
    """Returns the whole page as HTML text; a pure function of the records and the images they point to."""
    flaws = list(records.flaws)
    sections = [
        verdict.verdict(records),
        verdict.before_after(records),
        strips.images(records, flaws),
        scores.curves(records),
        other_runs.comparison(records),
        gradients.weights(records),
        gradients.conflict(records),
        fresh_samples.fresh_samples(records),
        harmony.batch_sizes(records),
        gradients.norms(records),
        health.health(records),
        timing.time_spent(records),
        provenance.setup(records),
    ]
    # Made after the sections, since an image that cannot be read is found out while it is embedded.
    notes = document.notes(flaws)
    workdir = element("code", escape(str(records.workdir)))
    footer = (
        f"Made from the records in {workdir} "
        f"with {len(records.rows):,} step records and {len(records.evaluations):,} evaluations."
    )
    title = f"{records.name}: training report"
    body = "".join([*sections, notes])
    return document.document(title, _header(records), _sections(records), body, footer)


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` into a training workdir, replacing an earlier one in one move.

    Args:
      workdir: a local or remote (`gs://`) directory; see `reading.read_records` for what it may hold.

    Returns:
      The path of the page.

    Raises:
      InputError: the directory does not exist.
    """
    records = read_records(workdir)
    page = render(records)
    return document.write_page(records.workdir / REPORT_NAME, page)
