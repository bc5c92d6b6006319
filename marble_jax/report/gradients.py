"""What the harmonisation did: the rewards' weights, how the update stood to their gradients, the gradients' norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from marble_jax.report import blocks, charts
from marble_jax.report.curves import Curve
from marble_jax.report.formatting import data, percent, short
from marble_jax.report.markup import element
from marble_jax.report.records import Records, Series

MAX_MARKED_REFRESHES = 60
"""Refreshes of alpha that can be told apart as ticks and dots on a chart; more would cover the curves."""
FULL_SHADE = 0.6
"""Size of a cosine from which a cell has its full colour; gradients of different rewards seldom agree more."""


def weights(records: Records) -> str:
    """Returns alpha over time with the steps at which it was solved."""
    title = "Weights of the rewards (alpha)"
    entries = blocks.per_reward(records, records.alpha_key)
    if not entries:
        message = "No alpha on record yet, or the method does not use one."
        return blocks.section("alpha", title, blocks.absent(message))
    refreshes = _refreshes(records)
    marked = 0 < len(refreshes) <= MAX_MARKED_REFRESHES
    curves = []
    for name, series in entries:
        curves.append(Curve(name, series.step, series.value, records.slot(name)))
    rug = None
    if marked:
        rug = refreshes
        curves += _solved(records, entries)
    uniform = 1 / len(entries)
    chart = charts.Chart(
        curves,
        "Alpha of each reward over optimiser steps",
        y_label="alpha (the rewards' sum is 1)",
        x_range=blocks.step_range(records),
        include=(0.0,),
        references=[(uniform, f"equal, {uniform:.2g}")],
        rug=rug,
    )
    caption = (
        "Lines: the alpha that each update used; between solves that is their running average."
    )
    caption += _refresh_note(records, refreshes, marked) + _evenness_note(entries)
    table = blocks.fold("Alpha as a table", _alpha_table(records, entries))
    figure = blocks.figure("Alpha over time", caption, chart, table, heights=(320, 280))
    return blocks.section("alpha", title, figure)


def _refreshes(records: Records) -> np.ndarray:
    """Returns int [R], the steps at which alpha was solved anew."""
    refreshed = records.series("harmonize/refreshed")
    return refreshed.step[refreshed.value == 1]


def _solved(records: Records, entries: list[tuple[str, Series]]) -> list[Curve]:
    """Returns what the solver asked for, before smoothing, as dots."""
    curves = []
    for name, _ in entries:
        series = records.series(f"harmonize/alpha_solved/{name}")
        if not len(series):
            continue
        slot = records.slot(name)
        label = f"{name} as solved"
        curves.append(Curve(label, series.step, series.value, slot, kind="dots", named=False))
    return curves


def _refresh_note(records: Records, refreshes: np.ndarray, marked: bool) -> str:
    if marked:
        return (
            f" Marks: what the solver asked for at each of its {len(refreshes)} refreshes; ticks along the foot: "
            "the refreshes."
        )
    if len(refreshes):
        num_steps = len(records.series("harmonize/refreshed"))
        return f" It was refreshed in {len(refreshes)} of {num_steps} steps."
    return ""


def _evenness_note(entries: list[tuple[str, Series]]) -> str:
    """Returns how even the last alpha is, of what is drawn."""
    last = np.array([series.last() for _, series in entries])
    # A single weight has no evenness: its entropy's maximum is 0.
    if not np.isfinite(last).all() or len(last) < 2:
        return ""
    positive = last[last > 0]
    entropy = max(0.0, -float(np.sum(positive * np.log(positive))))
    evenness = entropy / math.log(len(last))
    return f" Evenness (entropy over its maximum) last: {percent(evenness)}."


def _alpha_table(records: Records, entries: list[tuple[str, Series]]) -> str:
    rows = []
    for name, series in entries:
        rows.append(
            (
                blocks.reward_label(records, name),
                data(series.value[0], 3),
                data(series.last(), 3),
                data(series.mean(), 3),
                data(series.lowest(), 3),
            )
        )
    return blocks.table(("Reward", "First", "Last", "Mean", "Lowest"), rows)


def conflict(records: Records) -> str:
    """Returns how the update stood to each reward's own gradient, and the rewards' gradients to each other."""
    title = "Agreement of gradients"
    entries = blocks.per_reward(records, "harmonize/cos_update")
    if not entries:
        message = (
            "No per-reward gradients on record yet; cosines appear on the steps that take them."
        )
        return blocks.section("conflict", title, blocks.absent(message))
    chart = blocks.reward_chart(
        records,
        "harmonize/cos_update",
        "Cosine between the update and each reward's gradient over optimiser steps",
        "cosine with the update",
        shade_below_zero=True,
        include=(0.0,),
    )
    first_name, _ = entries[0]
    caption = (
        "Above zero the update improves the reward to first order on the samples of its own step; in the shaded part "
        "it makes it worse there. The next section has other samples."
    )
    caption += blocks.smoothing_note(records, f"harmonize/cos_update/{first_name}")
    figure = blocks.figure("The update's cosine with each reward's gradient", caption, chart)
    tables = element("div", _cosine_table(records, entries), _pairs(records), class_="beside")
    lead = _conflict_lead(records)
    return blocks.section("conflict", title, figure, tables, _solver_table(records), lead=lead)


def _conflict_lead(records: Records) -> str:
    flags = records.series("harmonize/conflict")
    num_checked = flags.finite.size
    if not num_checked:
        return ""
    num_conflicts = int((flags.finite > 0).sum())
    share = percent(flags.mean())
    lead = (
        "In sample, the update moved against at least one reward's own gradient in "
        f"<b>{num_conflicts} of {num_checked}</b> checked steps ({share})."
    )
    worst = records.series("harmonize/worst_cos").mean()
    if math.isfinite(worst):
        shown = data(worst, 2, signed=True)
        lead += f" The least favoured reward's cosine averaged <b>{shown}</b>."
    return lead


def _cosine_table(records: Records, entries: list[tuple[str, Series]]) -> str:
    rows = []
    for name, series in entries:
        num_checked = series.finite.size
        below_zero = data(math.nan)
        if num_checked:
            below_zero = percent(float((series.finite < 0).mean()))
        rows.append(
            (
                blocks.reward_label(records, name),
                data(series.mean(), 3, signed=True),
                data(series.lowest(), 3, signed=True),
                below_zero,
                data(num_checked, 0),
            )
        )
    return blocks.table(("Reward", "Mean cosine", "Lowest", "Below zero", "Steps checked"), rows)


def _pairs(records: Records) -> str:
    """Returns mean pairwise cosines as a table with shaded cells: orange against, blue along, white at zero."""
    cosines = _pair_means(records)
    if not np.isfinite(cosines).any():
        return ""
    caption = (
        "Mean cosine between two rewards' gradients of one step, over the run: blue pull together, "
        "orange pull apart"
    )
    return cosine_table(records, records.rewards, cosines, caption)


def cosine_table(records: Records, names: Sequence[str], cosines: np.ndarray, caption: str) -> str:
    """Returns cosines of pairs of rewards as a table with shaded cells.

    Args:
      records: of the run.
      names: of K rewards.
      cosines: float64 [K, K]; NaN where there is none.
      caption: markup above the table.
    """
    head, rows = [""], []
    for name, row in zip(names, cosines):
        # Turned on its side, or long names would make the columns wider than their numbers.
        head.append(element("span", escape(name), class_="turned"))
        cells = [_shaded(cosine) for cosine in row.tolist()]
        rows.append([blocks.reward_label(records, name, tag=False, solid=True), *cells])
    # A gradient's cosine with itself says nothing.
    for i, cells in enumerate(rows):
        cells[i + 1] = element("span", class_="cell self", role="img", aria_label="itself")
    return blocks.table(head, rows, kind="heat", caption=caption)


def _pair_means(records: Records) -> np.ndarray:
    """Returns float64 [K, K], the mean cosine of each pair over the run; NaN on the diagonal and without a record."""
    num_rewards = len(records.rewards)
    cosines = np.full((num_rewards, num_rewards), np.nan)
    for i, reward in enumerate(records.rewards):
        for j, partner in enumerate(records.rewards):
            # A pair is recorded once, under the name that comes first in the run.
            series = records.series(f"harmonize/cos_pair/{reward}|{partner}")
            if i != j and len(series):
                cosines[i, j] = cosines[j, i] = series.mean()
    return cosines


def _shaded(cosine: float) -> str:
    shown = data(cosine, 2, signed=True)
    if not math.isfinite(cosine):
        return shown
    side = "along" if cosine >= 0 else "against"
    share = min(abs(cosine) / FULL_SHADE, 1.0)
    return element("span", shown, class_=f"cell {side}", style=f"--share:{round(share * 100)}%")


def _solver_table(records: Records) -> str:
    rows = []
    for key, label in (
        (
            "harmonize/min_norm",
            "Norm of the shortest convex combination of unit gradients (0: rewards fully opposed)",
        ),
        ("harmonize/kkt_residual", "Optimality residual of the solve (should be near 0)"),
    ):
        series = records.series(key)
        if series.finite.size:
            rows.append((label, *_spread(series)))
    if not rows:
        return ""
    table = blocks.table(("Figure", "Median", "Lowest", "Highest"), rows)
    return blocks.fold("The solver's own figures", table)


def _spread(series: Series) -> tuple[str, str, str]:
    """Returns median, lowest and highest value as text."""
    return short(series.median()), short(series.lowest()), short(series.highest())


def norms(records: Records) -> str:
    """Returns gradient norms per reward, on a logarithmic axis."""
    title = "Gradient norms"
    entries = blocks.per_reward(records, "harmonize/grad_norm")
    if not entries:
        message = "No per-reward gradient norms on record yet."
        return blocks.section("norms", title, blocks.absent(message))
    # Norms of different rewards differ by orders of magnitude.
    chart = blocks.reward_chart(
        records,
        "harmonize/grad_norm",
        "Norm of each reward's gradient over optimiser steps, logarithmic axis",
        "norm of each reward's gradient (log)",
        log=True,
    )
    rows = []
    for name, series in entries:
        rows.append((blocks.reward_label(records, name), *_spread(series)))
    table = blocks.fold(
        "Norms as a table", blocks.table(("Reward", "Median", "Lowest", "Highest"), rows)
    )
    first_name, _ = entries[0]
    caption = "Logarithmic axis: equal distances are equal ratios."
    caption += blocks.smoothing_note(records, f"harmonize/grad_norm/{first_name}")
    figure = blocks.figure("Per-reward gradient norms", caption, chart, table)
    return blocks.section("norms", title, figure, lead=_imbalance(entries))


def _imbalance(entries: list[tuple[str, Series]]) -> str:
    """Returns the sentence on the longest and the shortest gradient; "" with fewer than two above zero."""
    medians = {}
    for name, series in entries:
        median = series.median()
        # A reward that has not trained yet has gradients of norm 0, and no ratio to the others.
        if median > 0:
            medians[name] = median
    if len(medians) < 2:
        return ""
    longest = max(medians, key=medians.__getitem__)
    shortest = min(medians, key=medians.__getitem__)
    ratio = medians[longest] / medians[shortest]
    return (
        f"{escape(longest)}'s gradient is {ratio:,.2g} times as long as {escape(shortest)}'s "
        "(medians). "
        "This is the imbalance that a plain weighted sum of rewards would pass on to the update."
    )
