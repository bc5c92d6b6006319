"""Whether the run is sound and where its time goes: alarms in words with the curves behind them, seconds per phase."""

from __future__ import annotations

import math
from html import escape

from marble_jax.report import blocks, charts, findings
from marble_jax.report.records import Records

_PHASES = (
    ("rollout", "Rollout (sampling images)"),
    ("rewards_wait", "Waiting for rewards"),
    ("train", "Gradients and update"),
    ("other", "Everything else"),
)


def _metric_panels(records: Records, wanted: tuple[tuple[str, str, str, bool], ...]) -> str:
    items = []
    for key, title, unit, log in wanted:
        lines = blocks.smooth_lines(
            records, key, title, None, named=False, smooth=key != "training/learning_rate"
        )
        svg = charts.line_chart(
            lines,
            width=blocks.PANEL,
            height=180,
            label=f"{title} over optimiser steps",
            y_label=unit + (" (log)" if log else ""),
            x_range=blocks.step_range(records),
            log=log,
        )
        items.append((title, svg))
    return blocks.panels(items) if any(svg for _, svg in items) else ""


def health(records: Records) -> str:
    """Alarms in words, then the curves they were read from."""
    title = "Health"
    if not records.rows:
        return blocks.section(
            "health",
            title,
            blocks.absent(
                "No metrics yet. <code>metrics.jsonl</code> gets one line per optimiser step."
            ),
        )
    raised = findings.alarms(records)
    if raised:
        listed = "".join(
            f'<li class="{a.level}"><b><span class="level">{"Alarm" if a.level == "alarm" else "Watch"}</span>'
            f" {escape(a.title)}</b><p>{escape(a.text)}</p></li>"
            for a in raised
        )
        words = f'<ul class="alarms">{listed}</ul>'
    else:
        words = (
            '<p class="calm">No alarm. Looked at: diversity, brightness, latent norm, constant or failing '
            "rewards, waiting for rewards, groups without spread, starved weights, "
            "missing losses, rising gradient norms, held-out losses, rewards past their peak.</p>"
        )
    drift = _metric_panels(
        records,
        (
            (
                "rollout/diversity",
                "Diversity within a prompt's group",
                "distance between images of one prompt",
                False,
            ),
            ("rollout/brightness", "Brightness", "mean, 0 black to 1 white", False),
            ("rollout/x0_norm", "Size of the latents", "norm of x0", False),
        ),
    )
    learning = _metric_panels(
        records,
        (
            ("objective/loss", "Training loss", "loss", False),
            (
                "objective/kl",
                "Distance from the base model",
                "mean squared velocity difference",
                False,
            ),
            ("training/grad_norm", "Gradient norm, before clipping", "norm", True),
            ("training/learning_rate", "Learning rate", "learning rate", False),
        ),
    )
    ties = blocks.figure(
        "Groups in which every image scored alike",
        "Such a group has no best image and teaches nothing about that reward.",
        blocks.reward_chart(
            records,
            "rollout/zero_std_share",
            "Share of groups without spread per reward over optimiser steps",
            "share of groups",
            height=240,
            include=(0.0,),
        ),
        missing="No record yet of groups without spread.",
    )
    rows = []
    for name in records.rewards:
        missing, failed, std, lost = (
            records.series(f"rollout/{key}/{name}")
            for key in ("missing_share", "failed", "score_std", "failed_count")
        )
        if not (len(missing) or len(failed) or len(std)):
            continue
        total = float(failed.finite.max()) if failed.finite.size else math.nan
        rows.append(
            (
                blocks.reward_label(records, name),
                blocks.percent(missing.mean()),
                blocks.percent(missing.last()),
                "none"
                if total == 0
                else blocks.percent(total)
                if total <= 1
                else blocks.short(total),
                blocks.data(float(lost.finite.sum()), 0)
                if lost.finite.size
                else blocks.short(math.nan),
                blocks.short(std.median()),
            )
        )
    shares = (
        blocks.table(
            (
                "Reward",
                "Missing, mean",
                "Missing, last step",
                "Failed, worst step",
                "Failed, in all",
                "Spread of scores (median)",
            ),
            rows,
            caption="Missing: the reward does not apply to the image's prompt, or its call failed",
        )
        if rows
        else ""
    )
    return blocks.section("health", title, words, drift, ties, shares, learning)


def time_spent(records: Records) -> str:
    """Median seconds per phase of a step, and how long the run takes."""
    title, phases = "Time", findings.timings(records)
    total = phases["step"]
    if not math.isfinite(total) or total <= 0:
        return blocks.section("time", title, blocks.absent("No timings on record yet."))
    known = [(key, label, phases[key]) for key, label in _PHASES if math.isfinite(phases[key])]
    whole = sum(seconds for _, _, seconds in known) or total
    parts = "".join(
        f'<span class="phase {key}" style="flex-grow:{max(seconds / whole, 1e-4):.4f}" title="{label}: '
        f'{seconds:.3g} s"></span>'
        for key, label, seconds in known
    )
    rows = [
        (
            f'<span class="key phase {key}"></span>{label}',
            blocks.data(seconds, 2, unit="&nbsp;s"),
            blocks.percent(seconds / whole),
        )
        for key, label, seconds in known
    ]
    rows.append(("<b>One step</b>", blocks.data(total, 2, unit="&nbsp;s"), ""))
    elapsed = findings.seconds_elapsed(records)
    sentences = (
        [f"From first to last record: {blocks.duration(elapsed)}."]
        if math.isfinite(elapsed)
        else []
    )
    if math.isfinite(phases["rewards_wait"]):
        sentences.append(
            f"{blocks.percent(phases['rewards_wait'] / whole)} of a step is spent waiting for rewards."
        )
    if (
        records.num_steps
        and records.last_step is not None
        and records.last_step + 1 < records.num_steps
    ):
        left = records.num_steps - records.last_step - 1
        sentences.append(
            f"{left:,} steps are left, about {blocks.duration(left * total)} at this pace (evaluations not counted)."
        )
    bar = (
        '<div class="phases" role="img" aria-label="Share of a step by phase; the table below has the numbers">'
        f"{parts}</div>"
    )
    grid = blocks.table(("Phase", "Seconds (median step)", "Share"), rows)
    chart = _metric_panels(records, (("time/step_s", "Seconds per step", "seconds", False),))
    return blocks.section(
        "time", title, bar, f'<div class="beside">{grid}{chart}</div>', lead=" ".join(sentences)
    )
