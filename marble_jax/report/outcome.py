"""The upper half of the page: what the run achieved. Verdict, table, images, curves, other runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from marble_jax.report import blocks, charts, document, findings
from marble_jax.report.records import Records, Strip, number, step_of

_WORDS = {
    "up": ("\N{BLACK UP-POINTING TRIANGLE}", "up"),
    "down": ("\N{BLACK DOWN-POINTING TRIANGLE}", "down"),
    "unclear": ("\N{BLACK DIAMOND}", "no clear change"),
    "unknown": ("?", "not on record"),
}
MAX_PROMPTS = 12
MAX_BETWEEN = 4


def _tiles(records: Records) -> str:
    """The four or five numbers to remember."""
    tiles = []
    conflict = records.series("harmonize/conflict")
    if conflict.finite.size:
        tiles.append((blocks.percent(conflict.mean()), "of checked steps moved against a reward"))
    worst = records.series("harmonize/worst_cos")
    if worst.finite.size:
        tiles.append(
            (
                f"{worst.mean():+.2f}".replace("-", "\N{MINUS SIGN}"),
                "mean worst cosine of the update with a reward",
            )
        )
    pair = findings.windows(records.series("rollout/diversity"))
    if pair and pair[0] > 0:
        tiles.append(
            (
                f"{pair[1] / pair[0] - 1:+.0%}".replace("-", "\N{MINUS SIGN}").replace(
                    "%", "\N{NO-BREAK SPACE}%"
                ),
                "diversity of a prompt's images since the start",
            )
        )
    step = findings.timings(records)["step"]
    if math.isfinite(step):
        tiles.append((f"{step:.3g}\N{NO-BREAK SPACE}s", "per optimiser step (median)"))
    raised = findings.alarms(records)
    if records.rows:
        loud = sum(a.level == "alarm" for a in raised)
        tiles.append(
            (
                f'<a href="#health">{loud}</a>',
                ("alarm" if loud == 1 else "alarms") + f" and {len(raised) - loud} to watch",
            )
        )
    return (
        '<ul class="tiles">'
        + "".join(f"<li><b>{value}</b><span>{label}</span></li>" for value, label in tiles)
        + "</ul>"
        if tiles
        else ""
    )


def verdict(records: Records) -> str:
    """The headline, one chip per reward, and what the intervals do and do not cover."""
    found = findings.outcomes(records)
    chips = []
    for outcome in found:
        if records.trained:
            sign, word = _WORDS[outcome.kind]
            note = ", never trained" if outcome.heldout else ""
            chips.append(
                f'<li class="{outcome.kind}"><span aria-hidden="true">{sign}</span> <b>'
                f"{escape(outcome.reward)}</b> {word}{note}</li>"
            )
    body = [
        f'<p class="headline">{escape(findings.headline(records, found))}</p>',
        f'<ul class="chips">{"".join(chips)}</ul>' if chips else "",
    ]
    raised = [a for a in findings.alarms(records) if a.level == "alarm"]
    if raised:
        titles = ". ".join(escape(a.title) for a in raised)
        body.append(
            f'<p class="caution"><b>Before believing it:</b> {titles}. <a href="#health">Details</a></p>'
        )
    body.append(_tiles(records))
    if records.trained:
        last = records.trained[-1]
        prompts = number(last.get("num_prompts"))
        count = f" on {prompts:,.0f} prompts" if math.isfinite(prompts) else ""
        body.append(
            f'<p class="small">Measured at step {step_of(last):,}{count}: averaged (EMA) weights against the base '
            "model, same prompts and seeds. "
            "Up or down means that the 95&nbsp;% bootstrap interval of the paired gain lies wholly on one side "
            "of zero. The intervals cover the choice of "
            "prompts only: not another training seed, and not that several rewards are tested at once.</p>"
        )
    return blocks.section("verdict", "Verdict", *body)


def before_after(records: Records) -> str:
    """Base, trained and gain per reward, each with its interval."""
    title = "Before and after"
    if not records.base and not records.trained:
        return blocks.section(
            "before-after",
            title,
            blocks.absent(
                "No evaluation yet. <code>evaluation.jsonl</code> gets its first entry when the base model is "
                "evaluated."
            ),
        )
    rows = []
    for slot, outcome in enumerate(findings.outcomes(records)):
        widths = [v["high"] - v["low"] for v in (outcome.base, outcome.trained, outcome.gain)]
        decimals = blocks.decimals_for(
            min((w for w in widths if math.isfinite(w) and w > 0), default=math.nan)
        )

        def cell(value: dict[str, float], signed: bool = False, decimals: int = decimals) -> str:
            shown = blocks.data(value["mean"], decimals, signed=signed)
            if not math.isfinite(value["low"]) or not math.isfinite(value["high"]):
                return shown
            low, high = (blocks.data(value[k], decimals, signed=signed) for k in ("low", "high"))
            return f'{shown}<span class="range">{low} to {high}</span>'

        sign, word = _WORDS[outcome.kind]
        count = (
            outcome.trained["count"]
            if math.isfinite(outcome.trained["count"])
            else outcome.base["count"]
        )
        bar = charts.interval_bar(
            outcome.gain["mean"], outcome.gain["low"], outcome.gain["high"], slot, width=132
        )
        rows.append(
            (
                blocks.reward_label(records, outcome.reward),
                cell(outcome.base),
                cell(outcome.trained),
                cell(outcome.gain, True),
                bar,
                f'<span class="verdict {outcome.kind}"><span aria-hidden="true">{sign}</span> {word}</span>',
                blocks.data(count, 0),
            )
        )
    last = (
        f"step&nbsp;{step_of(records.trained[-1]):,}"
        if records.trained
        else "not&nbsp;evaluated&nbsp;yet"
    )
    grid = blocks.table(
        (
            "Reward",
            "Base",
            f"Trained<br>({last})",
            "Gain",
            "Gain against zero",
            "Verdict",
            "Images",
        ),
        rows,
        kind="outcome",
        caption="Mean score with its 95&nbsp;% interval below it, in each reward's own units; higher is better",
    )
    return blocks.section(
        "before-after",
        title,
        grid,
        '<p class="small">Bars: each row has its own scale; the upright line is zero. '
        "<i>Images</i> counts those to which the reward applies.</p>",
    )


def _embed(strip: Strip, index: int, flaws: list[str]) -> str:
    """One image of a strip."""
    step, path = strip.images[index]
    return document.inline(path, f"Step {step}: {strip.prompt}", flaws)


def _step_name(step: int) -> str:
    return "base" if step == 0 else f"step {step:,}"


def _between(steps: Sequence[int]) -> list[int]:
    """Up to MAX_BETWEEN steps evenly from the inside of `steps`."""
    inner = list(steps[1:-1])
    if len(inner) <= MAX_BETWEEN:
        return inner
    return [inner[round(i)] for i in np.linspace(0, len(inner) - 1, MAX_BETWEEN)]


def images(records: Records, flaws: list[str]) -> str:
    """The fixed prompts before and after, and folded below them the steps between.

    Appends a sentence to `flaws` for each unreadable file.
    """
    title = "Same prompt, same seed"
    strips = [s for s in records.strips if s.images]
    if not strips:
        return blocks.section(
            "images",
            title,
            blocks.absent(
                "No sample images yet. They appear under <code>samples/</code> with the first evaluation."
            ),
        )
    shown = strips[:MAX_PROMPTS]
    cards, timelines = [], []
    for strip in shown:
        steps = [step for step, _ in strip.images]
        ends = [0] if len(steps) == 1 else [0, len(steps) - 1]
        cells = "".join(
            f'<div>{_embed(strip, i, flaws)}<span class="when">{_step_name(steps[i])}</span></div>'
            for i in ends
        )
        seed = f' <span class="seed">seed {strip.seed}</span>' if strip.seed is not None else ""
        cards.append(
            f'<figure class="card"><div class="pair">{cells}</div><figcaption>'
            f"{escape(strip.prompt)}{seed}</figcaption></figure>"
        )
        middle = "".join(
            f'<div>{_embed(strip, steps.index(s), flaws)}<span class="when">{_step_name(s)}</span></div>'
            for s in _between(steps)
        )
        if middle:
            timelines.append(
                f'<figure class="timeline"><figcaption>{escape(strip.prompt)}</figcaption><div class="scroll">'
                f'<div class="row">{middle}</div></div></figure>'
            )
    count = f" The first {len(shown)} of {len(strips)} prompts." if len(shown) < len(strips) else ""
    lead = (
        "Left the base model, right the latest evaluated weights, from the same initial noise. The "
        f"prompts are the run's fixed list, in its order.{count}"
    )
    if all(len(s.images) == 1 for s in shown):
        lead = f"Images of one step only so far; the next evaluation adds the comparison.{count}"
    return blocks.section(
        "images",
        title,
        f'<div class="cards">{"".join(cards)}</div>',
        blocks.fold("The steps between", *timelines) if timelines else "",
        lead=lead,
    )


def curves(records: Records) -> str:
    """One panel per reward: evaluated mean with interval, the base model's level, and training rollouts behind."""
    title, span = "Scores over training", blocks.step_range(records)
    items = []
    for slot, name in enumerate(records.names):
        lines = []
        rollout = records.series(f"rollout/score_mean/{name}")
        if rollout.finite.size:
            width = charts.smoothing_width(len(rollout))
            lines.append(
                charts.Line(
                    "rollouts", rollout.step, rollout.value, slot, kind="faint", named=False
                )
            )
            lines.append(
                charts.Line(
                    "rollouts",
                    rollout.step,
                    charts.running_mean(rollout.value, width),
                    None,
                    kind="back",
                    dashed=False,
                    named=False,
                )
            )
        base = records.score(records.base, name)
        entries = ([(step_of(records.base), base)] if records.base else []) + [
            (step_of(e), records.score(e, name)) for e in records.trained
        ]
        if entries:
            values = {
                f: np.array([score[f] for _, score in entries]) for f in ("mean", "low", "high")
            }
            lines.append(
                charts.Line(
                    "evaluation",
                    np.array([s for s, _ in entries], float),
                    values["mean"],
                    slot,
                    low=values["low"],
                    high=values["high"],
                    kind="points",
                    dashed=False,
                    named=False,
                )
            )
        reference = [(base["mean"], "base")] if math.isfinite(base["mean"]) else []
        svg = charts.line_chart(
            lines,
            width=blocks.PANEL,
            height=210,
            label=f"{name} over optimiser steps: evaluation mean with 95 % interval, and rollout mean",
            y_label="mean score",
            x_range=span,
            references=reference,
        )
        items.append((blocks.reward_label(records, name, solid=True), svg))
    if not any(svg for _, svg in items):
        return blocks.section("curves", title, blocks.absent("No scores on record yet."))
    rows = [
        (
            f"{'base' if e.get('policy') == 'base' else f'step {step_of(e):,}'}",
            *(blocks.data(records.score(e, n)["mean"], 4) for n in records.names),
            blocks.duration(number(e.get("seconds"))),
        )
        for e in records.evaluations
    ]
    grid = (
        blocks.fold(
            "All evaluations as a table",
            blocks.table(("Weights", *map(escape, records.names), "Took"), rows),
        )
        if rows
        else ""
    )
    lead = (
        "Coloured marks and band: evaluation on fixed prompts with its 95&nbsp;% interval. Thin dark line: mean "
        "score of the training rollouts "
        "(faint: each step), on other prompts and by another policy, so compare its shape and not its level. "
        "Dashed: the base model's evaluation."
    )
    return blocks.section("curves", title, blocks.panels(items), grid, lead=lead)


def comparison(records: Records) -> str:
    """This run beside other runs, when their summaries are in `compare/`."""
    if not records.compare:
        return ""
    here = findings.summarise(records)
    here["name"] = f"{here['name']} (this run)"
    summaries = [here, *records.compare]
    gains = [s.get("gain") if isinstance(s.get("gain"), dict) else {} for s in summaries]
    names = list(records.names) + [
        n for n in dict.fromkeys(n for g in gains for n in g) if n not in records.names
    ]
    rows = []
    for summary in summaries:
        conflict, worst = number(summary.get("conflict_rate")), number(summary.get("worst_cos"))
        rows.append(
            (
                blocks.text(summary.get("name", "unnamed")),
                blocks.text(summary.get("method", "")),
                blocks.data(100 * conflict, 0, unit="&nbsp;%"),
                blocks.data(worst, 2, signed=True),
            )
        )
    grid = blocks.table(("Run", "Method", "Steps against a reward", "Mean worst cosine"), rows)
    items = []
    for name in names:
        entries = [
            {f: number((g.get(name) or {}).get(f)) for f in ("mean", "low", "high")} for g in gains
        ]
        ends = [abs(e[f]) for e in entries for f in ("low", "high") if math.isfinite(e[f])]
        if not ends:
            continue
        slot = records.names.index(name) if name in records.names else None
        decimals = blocks.decimals_for(
            min((e["high"] - e["low"] for e in entries if e["high"] > e["low"]), default=math.nan)
        )
        lines = [
            (
                "<b>this run</b>" if s is here else blocks.text(s.get("name", "unnamed")),
                charts.interval_bar(
                    e["mean"], e["low"], e["high"], slot, width=120, reach=max(ends)
                ),
                blocks.data(e["mean"], decimals, signed=True),
            )
            for s, e in zip(summaries, entries)
        ]
        items.append(
            (
                blocks.reward_label(records, name, solid=True),
                blocks.table(("Run", "Gain against zero", "Gain"), lines, kind="forest"),
            )
        )
    return blocks.section(
        "compare",
        "Beside other runs",
        grid,
        blocks.panels(items),
        lead=(
            "Gains over the base model with 95&nbsp;% intervals; within one reward all runs share a scale, and "
            "the upright line is zero. "
            "The comparison is fair only if the runs share prompts, seeds and number of steps."
        ),
    )
