"""Whether the run is sound: alarms in words, with the curves and shares behind them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from marble_jax.report import blocks, charts
from marble_jax.report.alarms import Alarm, alarms
from marble_jax.report.formatting import data, percent, short
from marble_jax.report.markup import element
from marble_jax.report.records import Records, Series


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric in a panel of its own.

    Attributes:
      key: its name in `metrics.jsonl`.
      title: markup above the panel.
      unit: of the y axis.
      log: logarithmic y axis.
      smooth: whether a running mean is drawn over the values.
    """

    key: str
    title: str
    unit: str
    log: bool = False
    smooth: bool = True


VELOCITY_UNIT = "mean squared velocity difference"
STEP_UNIT = "squared difference of step means / (2 diffusion\N{SUPERSCRIPT TWO})"
"""Of a policy gradient's divergence; see `objectives.policy_gradient`."""

_DRIFTS = (
    Metric(
        "rollout/diversity",
        "Diversity within a prompt's group",
        "distance between images of one prompt",
    ),
    Metric("rollout/brightness", "Brightness", "mean, 0 black to 1 white"),
    Metric("rollout/x0_norm", "Size of the latents", "norm of x0"),
    # Of clips alone: without a record of it there is no panel.
    Metric("rollout/motion", "Motion", "mean difference of neighbouring frames"),
)
_LEARNING = (
    Metric("objective/loss", "Training loss", "loss"),
    Metric("objective/kl", "Distance from the base model", VELOCITY_UNIT),
    Metric(
        "objective/velocity_gap",
        "Distance from the rollout policy",
        VELOCITY_UNIT,
    ),
    Metric("objective/ratio", "Ratio of densities, trained over rollout policy", "ratio"),
    Metric("objective/outside_clip_range", "Samples outside the clip's range", "share"),
    # Outside on the side that the advantage asks for; the last of several updates'.
    Metric("objective/clipped_share", "Weights that the clip sets to 0", "share"),
    # Of an estimate one step's value may be below 0.
    Metric("objective/step_kl", "Divergence of a step from the rollout policy", "nats an element"),
    Metric(
        "objective/log_prob_gap",
        "Log-probability in training minus that in sampling, in size",
        "nats an element",
        log=True,
    ),
    Metric("training/grad_norm", "Gradient norm, before clipping", "norm", log=True),
    # A schedule has no noise to take the mean of, and a mean would round its corners.
    Metric("training/learning_rate", "Learning rate", "learning rate", smooth=False),
)
_ROUNDED = {
    "rounding/kl": "the distance from the base model",
    "rounding/velocity_gap": "the distance from the rollout policy",
    "rounding/loss": "what the losses say of the policy rather than of the images",
}
_CALM = (
    "No alarm. Looked at: policies that should agree or differ, diversity, brightness, latent norm, motion "
    "of clips, constant or failing rewards, waiting for rewards, groups without spread, starved weights, "
    "missing losses, rising gradient norms, held-out losses, rewards past their peak."
)


def _learning(records: Records) -> tuple[Metric, ...]:
    """Returns the metrics of the loss, with the distance from the base model in the unit of the run's objective."""
    if records.configured("objective.name") != "policy_gradient":
        return _LEARNING
    return tuple(
        dataclasses.replace(metric, unit=STEP_UNIT) if metric.key == "objective/kl" else metric
        for metric in _LEARNING
    )


def metric_panels(records: Records, metrics: Sequence[Metric]) -> str:
    """Returns one panel a metric; "" when none is on record."""
    drawn = charts.draw_alike([_metric_chart(records, m) for m in metrics], blocks.PANEL, 180)
    if not any(drawn):
        return ""
    return blocks.panels(zip([metric.title for metric in metrics], drawn))


def _metric_chart(records: Records, metric: Metric) -> charts.Chart:
    curves = blocks.smooth_curves(
        records, metric.key, metric.title, None, named=False, smooth=metric.smooth
    )
    return charts.Chart(
        curves,
        f"{metric.title} over optimiser steps",
        y_label=f"{metric.unit} (log)" if metric.log else metric.unit,
        x_range=blocks.step_range(records),
        log=metric.log,
    )


def health(records: Records) -> str:
    """Returns alarms in words, then the curves they were read from."""
    title = "Health"
    if not records.rows:
        message = "No metrics yet. <code>metrics.jsonl</code> gets one line per optimiser step."
        return blocks.section("health", title, blocks.absent(message))
    return blocks.section(
        "health",
        title,
        _alarm_list(alarms(records)),
        metric_panels(records, _DRIFTS),
        _ties(records),
        _shares(records),
        metric_panels(records, _learning(records)),
        _rounding_note(records),
    )


def _alarm_list(raised: Sequence[Alarm]) -> str:
    if not raised:
        # What was looked at is named, or silence might mean that nothing was.
        return element("p", _CALM, class_="calm")
    entries = []
    for alarm in raised:
        level = element("span", alarm.level.capitalize(), class_="level")
        heading = element("b", level, " ", escape(alarm.title))
        words = element("p", escape(alarm.text))
        entries.append(element("li", heading, words, class_=alarm.level))
    return element("ul", *entries, class_="alarms")


def _rounding_note(records: Records) -> str:
    """Returns which of the figures above lie below the rounding of the compute dtype, and when; "" for none."""
    parts = []
    for key, words in _ROUNDED.items():
        marked = records.series(key)
        steps = marked.step[marked.value == 1]
        # Before the first update all policies are the same, whatever the dtype.
        if not (steps > 0).any():
            continue
        last = int(steps.max())
        parts.append(f"{words} in {len(steps)} of {len(marked)} step(s), the last of them {last}")
    if not parts:
        return ""
    floor = records.series("rounding/floor").last()
    text = (
        f"Below the rounding of the compute dtype, and no figure to read: {'; '.join(parts)}. Two policies that are "
        f"all but equal differ by up to {short(floor)} there, as a mean squared velocity difference."
    )
    return element("p", escape(text), class_="rounding")


def _ties(records: Records) -> str:
    chart = blocks.reward_chart(
        records,
        "rollout/zero_std_share",
        "Share of groups without spread per reward over optimiser steps",
        "share of groups",
        include=(0.0,),
    )
    return blocks.figure(
        "Groups in which every image scored alike",
        "Such a group has no best image and teaches nothing about that reward.",
        chart,
        heights=(240, 210),
        missing="No record yet of groups without spread.",
    )


def _shares(records: Records) -> str:
    """Returns how much of each reward's scores is missing or failed; "" without a record of it."""
    rows = []
    for name in records.rewards:
        rows.extend(_share_rows(records, name))
    if not rows:
        return ""
    head = (
        "Reward",
        "Missing, mean",
        "Missing, last step",
        "Failed, worst step",
        "Failed, in all",
        "Spread of scores (median)",
    )
    caption = "Missing: the reward does not apply to the image's prompt, or its call failed"
    return blocks.table(head, rows, caption=caption)


def _share_rows(records: Records, name: str) -> list[tuple[str, ...]]:
    """Returns the row of one reward; none without a record of it."""
    missing = records.series(f"rollout/missing_share/{name}")
    failed = records.series(f"rollout/failed/{name}")
    failed_count = records.series(f"rollout/failed_count/{name}")
    spread = records.series(f"rollout/score_std/{name}")
    if not len(missing) and not len(failed) and not len(spread):
        return []
    row = (
        blocks.reward_label(records, name),
        # Both, since a curriculum may change which prompts a reward applies to.
        percent(missing.mean()),
        percent(missing.last()),
        _worst_failure(failed),
        _sum(failed_count),
        short(spread.median()),
    )
    return [row]


def _worst_failure(failed: Series) -> str:
    worst = failed.highest()
    if worst == 0:
        return "none"
    # The record is a share up to 1; a count of scores is above it.
    if worst <= 1:
        return percent(worst)
    return short(worst)


def _sum(failed_count: Series) -> str:
    if not failed_count.finite.size:
        return short(math.nan)
    return data(float(failed_count.finite.sum()), 0)
