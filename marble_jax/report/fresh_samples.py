"""How updates stood to each reward on samples that they were not made of."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from marble_jax.report import blocks
from marble_jax.report.formatting import data, percent
from marble_jax.report.gradients import cosine_table
from marble_jax.report.intervals import Interval
from marble_jax.report.records import Records, Series

MEAN_UPDATE = "out_of_sample/cos_mean_update"
LAST_UPDATE = "out_of_sample/cos_update"
SIGNAL_SHARE = "out_of_sample/own_cosine"
LEAST_STEPS = 4
"""Steps from which on a mean gets an error."""


def mean_over_steps(series: Series) -> Interval:
    """Returns the mean over steps with two standard errors to either side; ends are NaN with fewer than four steps.

    Each step brings samples of its own, so that its error is independent of the others'.
    """
    values = series.finite
    mean, count = series.mean(), values.size
    if count < LEAST_STEPS:
        return Interval(mean, math.nan, math.nan, count)
    margin = 2 * float(values.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - margin, mean + margin, count)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What other samples say of the updates, for one reward.

    Attributes:
      reward: its name.
      signal_share: cosine of its gradients of different steps.
      last_update: cosine of the update before with this step's gradient.
      mean_update: cosine of the running mean of updates with this step's gradient.
    """

    reward: str
    signal_share: Interval
    last_update: Interval
    mean_update: Interval


def judgements(records: Records) -> list[Judgement]:
    """Returns one judgement for each trained reward that has any on record."""
    found = []
    for name, _ in blocks.per_reward(records, SIGNAL_SHARE):
        figures = []
        for key in (SIGNAL_SHARE, LAST_UPDATE, MEAN_UPDATE):
            figures.append(mean_over_steps(records.series(f"{key}/{name}")))
        found.append(Judgement(name, *figures))
    return found


def opposed(found: list[Judgement]) -> list[str]:
    """Returns the rewards that the running mean of updates clearly works against."""
    return [judged.reward for judged in found if judged.mean_update.direction == "down"]


def fresh_samples(records: Records) -> str:
    """Returns the section; a sentence where nothing is on record yet."""
    title = "On other samples"
    found = judgements(records)
    if not found:
        return blocks.section("fresh", title, blocks.absent(_why_nothing(records)))
    chart = blocks.reward_chart(
        records,
        MEAN_UPDATE,
        "Cosine between the mean of earlier updates and each reward's gradient over optimiser steps",
        "cosine with the mean update",
        shade_below_zero=True,
        include=(0.0,),
    )
    caption = (
        "The mean of updates is Adam's first moment before the step. Cosines are small where gradients are mostly "
        "noise: what counts is the side of zero on which a curve stays."
    )
    caption += blocks.smoothing_note(records, f"{MEAN_UPDATE}/{found[0].reward}")
    figure = blocks.figure(
        "The mean update's cosine with gradients of later samples", caption, chart
    )
    tables = _table(records, found) + _signal_pairs(records, found)
    return blocks.section("fresh", title, figure, tables, lead=_lead(records, found))


def _why_nothing(records: Records) -> str:
    """Returns why no step was compared: none will be, or the second one is still to come."""
    combined = records.configured("harmonize.balancer") in ("equal", "fixed")
    scalarized = records.configured("advantages.scalarize") not in (None, "none")
    if records.configured("harmonize.mode") == "upstream" and (combined or scalarized):
        return "Nothing to compare with: upstream's step solves for no alpha here, and takes no reward's own gradient."
    return (
        "Nothing to compare with yet: from the second step that takes per-reward gradients on, each is "
        "compared with those before it."
    )


def _lead(records: Records, found: list[Judgement]) -> str:
    lead = (
        "An update always agrees with the gradients that it is made of, their errors included. Here earlier updates "
        "are compared with gradients of <b>other images</b>."
    )
    mode = records.configured("harmonize.mode")
    if mode == "amortized":
        lead += " Only steps that solve for alpha take every reward's gradient and are compared."
    elif mode == "upstream":
        lead += (
            " Only steps that solve for alpha are compared, by the gradients of one micro-batch, which are noisier "
            "than those of a step."
        )
    bounded = [judged for judged in found if judged.mean_update.bounded]
    if not bounded:
        return lead
    against = opposed(found)
    share = min(judged.signal_share.mean for judged in found)
    lead += (
        f" The mean update works against <b>{len(against)} of {len(found)}</b> rewards by more than two standard "
        f"errors. The least share of signal in a step's gradient is {percent(max(share, 0.0))}; the rest is noise, "
        "which averaging over steps removes."
    )
    return lead


def _table(records: Records, found: list[Judgement]) -> str:
    rows = []
    for judged in found:
        below = records.series(f"{MEAN_UPDATE}/{judged.reward}").finite
        below_zero = data(math.nan)
        if below.size:
            below_zero = percent(float((below < 0).mean()))
        rows.append(
            (
                blocks.reward_label(records, judged.reward),
                blocks.interval_cell(judged.signal_share, 3, signed=True),
                blocks.interval_cell(judged.last_update, 3, signed=True),
                blocks.interval_cell(judged.mean_update, 3, signed=True),
                below_zero,
            )
        )
    head = ("Reward", "Signal share", "Last update", "Mean update", "Mean update below zero")
    return blocks.table(
        head,
        rows,
        caption="Mean cosines over the run with two standard errors below them. Signal share: a reward's gradient "
        "with its own of earlier steps",
    )


def _signal_pairs(records: Records, found: list[Judgement]) -> str:
    """Returns the cosines of the rewards' true gradients, from products between steps."""
    names = [judged.reward for judged in found]
    shares = {judged.reward: judged.signal_share for judged in found}
    cosines = np.full((len(names), len(names)), np.nan)
    for i, first in enumerate(names):
        for j, second in enumerate(names[i + 1 :], i + 1):
            product = records.series(f"out_of_sample/cos_pair/{first}|{second}").mean()
            # A share that is not clearly above zero has no length to divide by.
            if shares[first].direction == "up" and shares[second].direction == "up":
                length = math.sqrt(shares[first].mean * shares[second].mean)
                cosines[i, j] = cosines[j, i] = product / length
    if not np.isfinite(cosines).any():
        return ""
    caption = (
        "Cosines of the rewards' true gradients, by products between steps (noise can carry an estimate past 1; "
        "empty where a reward's signal is not clearly above zero): blue pull together, orange pull apart"
    )
    return cosine_table(records, names, cosines, caption)
