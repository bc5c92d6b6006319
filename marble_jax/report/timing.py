"""Where the run's time goes: seconds per phase of a step, and how long is left."""

from __future__ import annotations

import math

from marble_jax.report import blocks, findings
from marble_jax.report.formatting import data, duration, percent
from marble_jax.report.health import Metric, metric_panels
from marble_jax.report.intervals import number
from marble_jax.report.markup import element
from marble_jax.report.records import Records

_PHASES = (
    ("rollout", "Rollout (sampling images)"),
    ("rewards_wait", "Waiting for rewards"),
    ("train", "Gradients and update"),
    ("other", "Everything else"),
)
_STEP_SECONDS = (Metric("time/step_s", "Seconds per step", "seconds"),)
_SECONDS = "&nbsp;s"


def time_spent(records: Records) -> str:
    """Returns median seconds per phase of a step, and how long the run takes."""
    title = "Time"
    phases = findings.timings(records)
    step_seconds = phases["step"]
    if not math.isfinite(step_seconds) or step_seconds <= 0:
        return blocks.section("time", title, blocks.absent("No timings on record yet."))
    recorded = _recorded(phases)
    # Shares of the phases' own sum, which is not the step's median where medians do not add up.
    whole = sum(seconds for _, _, seconds in recorded) or step_seconds
    tables = element("div", _table(recorded, whole, step_seconds), _beside_steps(records))
    panel = metric_panels(records, _STEP_SECONDS)
    return blocks.section(
        "time",
        title,
        _bar(recorded, whole),
        element("div", tables, panel, class_="beside"),
        lead=_lead(records, phases, whole),
    )


def _recorded(phases: dict[str, float]) -> list[tuple[str, str, float]]:
    """Returns key, label and seconds of the phases that are on record."""
    recorded = []
    for phase, label in _PHASES:
        if math.isfinite(phases[phase]):
            recorded.append((phase, label, phases[phase]))
    return recorded


def _bar(recorded: list[tuple[str, str, float]], whole: float) -> str:
    """Returns a bar that is divided as a step is."""
    parts = []
    for phase, label, seconds in recorded:
        # A phase of no time keeps a hair's breadth, so that the colours of bar and table still match.
        share = max(seconds / whole, 1e-4)
        parts.append(
            element(
                "span",
                class_=f"phase {phase}",
                style=f"flex-grow:{share:.4f}",
                title=f"{label}: {seconds:.3g} s",
            )
        )
    description = "Share of a step by phase; the table below has the numbers"
    return element("div", *parts, class_="phases", role="img", aria_label=description)


def _table(recorded: list[tuple[str, str, float]], whole: float, step_seconds: float) -> str:
    rows = []
    for phase, label, seconds in recorded:
        key = element("span", class_=f"key phase {phase}")
        rows.append((key + label, data(seconds, 2, unit=_SECONDS), percent(seconds / whole)))
    rows.append(("<b>One step</b>", data(step_seconds, 2, unit=_SECONDS), ""))
    return blocks.table(("Phase", "Seconds (median step)", "Share"), rows)


def _beside_steps(records: Records) -> str:
    """Returns a table of what does not belong to a step alone: compiling, evaluations, checkpoints; "" without any."""
    evaluations = []
    for evaluation in records.evaluations:
        seconds = number(evaluation.get("seconds"))
        if math.isfinite(seconds):
            evaluations.append(seconds)
    rows = []
    for label, spans in (
        ("Compiling, in steps", records.series("time/compile_s").finite.tolist()),
        ("Evaluations", evaluations),
        (
            "Saving checkpoints, while the run waits",
            records.series("time/checkpoint_s").finite.tolist(),
        ),
    ):
        if spans:
            longest, total = _unbroken(max(spans)), _unbroken(sum(spans))
            rows.append((label, str(len(spans)), longest, total))
    if not rows:
        return ""
    return blocks.table(("Beside the steps", "Times", "Longest", "In all"), rows)


def _unbroken(seconds: float) -> str:
    return duration(seconds).replace(" ", "&nbsp;")


def _lead(records: Records, phases: dict[str, float], whole: float) -> str:
    sentences = []
    elapsed = findings.seconds_elapsed(records)
    if math.isfinite(elapsed):
        sentences.append(f"From first to last record: {duration(elapsed)}.")
    if math.isfinite(phases["rewards_wait"]):
        share = percent(phases["rewards_wait"] / whole)
        sentences.append(f"{share} of a step is spent waiting for rewards.")
    steps_left = _steps_left(records)
    if steps_left > 0:
        pace = duration(steps_left * phases["step"])
        sentences.append(
            f"{steps_left:,} steps are left, about {pace} at this pace (evaluations not counted)."
        )
    return " ".join(sentences)


def _steps_left(records: Records) -> int:
    if records.num_steps is None or records.last_step is None:
        return 0
    # Steps count from 0.
    return records.num_steps - (records.last_step + 1)
