"""What the harmonisation did: the rewards' weights, how the update stood to their gradients, the gradients' norms."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from marble_jax.report import blocks, charts
from marble_jax.report.records import Records


def weights(records: Records) -> str:
    """Alpha over time with the steps at which it was solved."""
    title = "Weights of the rewards (alpha)"
    entries = blocks.per_reward(records, "harmonize/alpha")
    if not entries:
        return blocks.section(
            "alpha", title, blocks.absent("No alpha on record yet, or the method does not use one.")
        )
    refreshed = records.series("harmonize/refreshed")
    refreshes = refreshed.step[refreshed.value == 1] if len(refreshed) else np.array([], np.int64)
    sparse = 0 < len(refreshes) <= 60
    span = blocks.step_range(records)
    lines = [charts.Line(name, s.step, s.value, slot) for slot, name, s in entries]
    if sparse:
        solved = [
            (slot, name, records.series(f"harmonize/alpha_solved/{name}"))
            for slot, name, _ in entries
        ]
        lines += [
            charts.Line(f"{name} as solved", s.step, s.value, slot, kind="dots", named=False)
            for slot, name, s in solved
            if len(s)
        ]
    uniform = 1 / len(entries)

    def draw(width: int) -> str:
        return charts.line_chart(
            lines,
            width=width,
            height=320 if width > 500 else 280,
            label="Alpha of each reward over optimiser steps",
            y_label="alpha (the rewards' sum is 1)",
            x_range=span,
            include=(0.0,),
            references=[(uniform, f"equal, {uniform:.2g}")],
            rug=refreshes if sparse else None,
        )

    caption = "Lines: the alpha in use, after smoothing."
    if sparse:
        caption += (
            f" Marks: what the solver asked for at each of its {len(refreshes)} refreshes; ticks along the foot: "
            "the refreshes."
        )
    elif len(refreshes):
        caption += f" It was refreshed in {len(refreshes)} of {len(refreshed)} steps."
    entropy = records.series("harmonize/alpha_entropy")
    if entropy.finite.size and len(entries) > 1:
        caption += f" Evenness (entropy over its maximum) last: {blocks.percent(entropy.last() / math.log(len(entries)))}."
    rows = [
        (
            blocks.reward_label(records, name),
            *(
                blocks.data(v, 3)
                for v in (
                    s.value[0],
                    s.last(),
                    s.mean(),
                    s.finite.min() if s.finite.size else math.nan,
                )
            ),
        )
        for _, name, s in entries
    ]
    grid = blocks.fold(
        "Alpha as a table", blocks.table(("Reward", "First", "Last", "Mean", "Lowest"), rows)
    )
    return blocks.section("alpha", title, blocks.figure("Alpha over time", caption, draw, grid))


def _heat(records: Records) -> str:
    """Mean pairwise cosines as a table whose cells are shaded: orange against, blue along, white at zero."""
    names = records.rewards
    rows, seen = [], False
    for a in names:
        cells = [blocks.reward_label(records, a, tag=False, solid=True)]
        for b in names:
            value = math.nan
            for key in (f"harmonize/cos_pair/{a}|{b}", f"harmonize/cos_pair/{b}|{a}"):
                series = records.series(key)
                value = series.mean() if len(series) and a != b else value
            seen |= math.isfinite(value)
            if a == b:
                cells.append('<span class="cell self" aria-label="itself"></span>')
            elif math.isfinite(value):
                side, share = (
                    ("along" if value >= 0 else "against"),
                    round(min(abs(value) / 0.6, 1.0) * 100),
                )
                cells.append(
                    f'<span class="cell {side}" style="--share:{share}%">{blocks.data(value, 2, signed=True)}</span>'
                )
            else:
                cells.append(blocks.data(math.nan))
        rows.append(cells)
    if not seen:
        return ""
    return blocks.table(
        ("", *(f'<span class="turned">{escape(n)}</span>' for n in names)),
        rows,
        kind="heat",
        caption="Mean cosine between two rewards' gradients over the run: blue pull together, orange pull apart",
    )


def conflict(records: Records) -> str:
    """How the update stands to each reward's own gradient, and the rewards to each other."""
    title = "Agreement of gradients"
    entries = blocks.per_reward(records, "harmonize/cos_update")
    if not entries:
        return blocks.section(
            "conflict",
            title,
            blocks.absent(
                "No per-reward gradients on record yet; cosines appear on the steps that take them."
            ),
        )
    flags, worst = records.series("harmonize/conflict"), records.series("harmonize/worst_cos")
    lead = ""
    if flags.finite.size:
        hits = int((flags.finite > 0).sum())
        lead = (
            f"The update moved against at least one reward's own gradient in <b>{hits} of {flags.finite.size}</b> "
            f"checked steps ({blocks.percent(flags.mean())})."
        )
        if worst.finite.size:
            lead += f" The least favoured reward's cosine averaged <b>{blocks.data(worst.mean(), 2, signed=True)}</b>."
    draw = blocks.reward_chart(
        records,
        "harmonize/cos_update",
        "Cosine between the update and each reward's gradient over optimiser steps",
        "cosine with the update",
        against=True,
        include=(0.0,),
    )
    caption = (
        "Above zero the update improves the reward to first order; in the shaded part it makes it "
        f"worse.{blocks.smoothing_note(records, f'harmonize/cos_update/{entries[0][1]}')}"
    )
    rows = [
        (
            blocks.reward_label(records, name),
            blocks.data(s.mean(), 3, signed=True),
            blocks.data(float(s.finite.min()) if s.finite.size else math.nan, 3, signed=True),
            blocks.percent(float((s.finite < 0).mean()))
            if s.finite.size
            else blocks.data(math.nan),
            blocks.data(s.finite.size, 0),
        )
        for _, name, s in entries
    ]
    grid = blocks.table(("Reward", "Mean cosine", "Lowest", "Below zero", "Steps checked"), rows)
    solver = []
    for key, label in (
        (
            "harmonize/min_norm",
            "Norm of the shortest convex combination of unit gradients (0: rewards fully opposed)",
        ),
        ("harmonize/kkt_residual", "Optimality residual of the solve (should be near 0)"),
    ):
        series = records.series(key)
        if series.finite.size:
            solver.append(
                (
                    label,
                    blocks.short(series.median()),
                    blocks.short(float(series.finite.min())),
                    blocks.short(float(series.finite.max())),
                )
            )
    check = (
        blocks.fold(
            "The solver's own figures",
            blocks.table(("Figure", "Median", "Lowest", "Highest"), solver),
        )
        if solver
        else ""
    )
    return blocks.section(
        "conflict",
        title,
        blocks.figure("The update's cosine with each reward's gradient", caption, draw),
        f'<div class="beside">{grid}{_heat(records)}</div>',
        check,
        lead=lead,
    )


def norms(records: Records) -> str:
    """Gradient norms per reward, on a logarithmic axis."""
    title = "Gradient norms"
    entries = blocks.per_reward(records, "harmonize/grad_norm")
    if not entries:
        return blocks.section(
            "norms", title, blocks.absent("No per-reward gradient norms on record yet.")
        )
    medians = {name: s.median() for _, name, s in entries if s.median() > 0}
    lead = ""
    if len(medians) > 1:
        big, small = max(medians, key=medians.get), min(medians, key=medians.get)
        lead = (
            f"{escape(big)}'s gradient is {medians[big] / medians[small]:,.2g} times as long as {escape(small)}'s "
            "(medians). "
            "This is the imbalance that a plain weighted sum of rewards would pass on to the update."
        )
    draw = blocks.reward_chart(
        records,
        "harmonize/grad_norm",
        "Norm of each reward's gradient over optimiser steps, logarithmic axis",
        "norm of each reward's gradient (log)",
        log=True,
    )
    rows = [
        (
            blocks.reward_label(records, name),
            blocks.short(s.median()),
            blocks.short(float(s.finite.min()) if s.finite.size else math.nan),
            blocks.short(float(s.finite.max()) if s.finite.size else math.nan),
        )
        for _, name, s in entries
    ]
    grid = blocks.fold(
        "Norms as a table", blocks.table(("Reward", "Median", "Lowest", "Highest"), rows)
    )
    caption = (
        "Logarithmic axis: equal distances are equal "
        f"ratios.{blocks.smoothing_note(records, f'harmonize/grad_norm/{entries[0][1]}')}"
    )
    return blocks.section(
        "norms", title, blocks.figure("Per-reward gradient norms", caption, draw, grid), lead=lead
    )
