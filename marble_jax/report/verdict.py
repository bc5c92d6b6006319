"""The upper half of the page in words and numbers: what the run achieved, reward by reward."""

from __future__ import annotations

import math
from html import escape

from marble_jax.report import blocks, findings, fresh_samples, joint_rates
from marble_jax.report.alarms import Alarm, alarms
from marble_jax.report.findings import Outcome
from marble_jax.report.formatting import data, decimals_for, percent, spaced_percent, with_minus
from marble_jax.report.intervals import narrowest, number
from marble_jax.report.marks import interval_bar
from marble_jax.report.markup import element, items
from marble_jax.report.records import Records, step_of

_SIGNS = {
    "up": "\N{BLACK UP-POINTING TRIANGLE}",
    "down": "\N{BLACK DOWN-POINTING TRIANGLE}",
    "unclear": "\N{BLACK DIAMOND}",
    "unknown": "?",
}
_WORDS = {
    "up": "up",
    "down": "down",
    "unclear": "no clear change",
    "unknown": "not on record",
}
_COLUMNS = ("Gain", "Gain against zero", "Verdict")


def verdict(records: Records) -> str:
    """Returns the headline, one chip per reward, and what the intervals do and do not cover."""
    results = findings.outcomes(records)
    raised = alarms(records)
    headline = escape(findings.headline(records, results))
    return blocks.section(
        "verdict",
        "Verdict",
        element("p", headline, class_="headline"),
        _chips(records, results),
        _caution(raised),
        _tiles(records, raised),
        _basis(records),
    )


def _sign(kind: str) -> str:
    # Screen readers say the word beside it instead.
    return element("span", _SIGNS[kind], aria_hidden="true")


def _chips(records: Records, results: tuple[Outcome, ...]) -> str:
    # Before the first evaluation every chip would say that nothing is known.
    if not records.trained or not results:
        return ""
    chips = []
    for outcome in results:
        name = element("b", escape(outcome.reward))
        note = ", never trained" if outcome.heldout else ""
        words = f"{_sign(outcome.kind)} {name} {_WORDS[outcome.kind]}{note}"
        chips.append(element("li", words, class_=outcome.kind))
    return element("ul", *chips, class_="chips")


def _caution(raised: tuple[Alarm, ...]) -> str:
    """Returns the alarms' titles above the numbers: a rise in a broken run is no success."""
    titles = [escape(alarm.title) for alarm in raised if alarm.level == "alarm"]
    if not titles:
        return ""
    lead = element("b", "Before believing it:")
    details = element("a", "Details", href="#health")
    return element("p", f"{lead} {'. '.join(titles)}. {details}", class_="caution")


def _tiles(records: Records, raised: tuple[Alarm, ...]) -> str:
    """Returns the four or five numbers to remember; "" before the first record."""
    tiles = _gradient_tiles(records) + _course_tiles(records)
    if records.rows:
        tiles.append(_alarm_tile(raised))
    if not tiles:
        return ""
    entries = []
    for value, label in tiles:
        entries.append(element("b", value) + element("span", label))
    return element("ul", items(entries), class_="tiles")


def _gradient_tiles(records: Records) -> list[tuple[str, str]]:
    """Returns value and label of how the update stood to the rewards' gradients."""
    tiles = []
    conflict_rate = records.series("harmonize/conflict").mean()
    if math.isfinite(conflict_rate):
        tiles.append(
            (percent(conflict_rate), "of checked steps moved against a reward on their own samples")
        )
    worst = records.series("harmonize/worst_cos").mean()
    if math.isfinite(worst):
        shown = with_minus(f"{worst:+.2f}")
        tiles.append((shown, "mean worst cosine of the update with a reward, likewise"))
    judged = fresh_samples.judgements(records)
    if any(judgement.mean_update.bounded for judgement in judged):
        against = len(fresh_samples.opposed(judged))
        tiles.append(
            (f"{against} of {len(judged)}", "rewards opposed by the mean update on other samples")
        )
    return tiles


def _course_tiles(records: Records) -> list[tuple[str, str]]:
    """Returns value and label of how the diversity of samples moved, and of the pace."""
    tiles = []
    drift = records.series("rollout/diversity").drift()
    if drift is not None and drift.start > 0:
        change = with_minus(f"{drift.relative:+.0%}")
        label = f"diversity of a prompt's {records.samples} since the start"
        tiles.append((spaced_percent(change), label))
    step_seconds = findings.timings(records)["step"]
    if math.isfinite(step_seconds):
        shown = f"{step_seconds:.3g}\N{NO-BREAK SPACE}s"
        tiles.append((shown, "per optimiser step (median)"))
    return tiles


def _alarm_tile(raised: tuple[Alarm, ...]) -> tuple[str, str]:
    num_alarms = 0
    for alarm in raised:
        num_alarms += alarm.level == "alarm"
    num_watches = len(raised) - num_alarms
    noun = "alarm" if num_alarms == 1 else "alarms"
    link = element("a", str(num_alarms), href="#health")
    return link, f"{noun} and {num_watches} to watch"


def _basis(records: Records) -> str:
    """Returns what the verdict rests on."""
    if not records.trained:
        return ""
    last = records.trained[-1]
    num_prompts = number(last.get("num_prompts"))
    prompts = ""
    if math.isfinite(num_prompts):
        prompts = f" on {num_prompts:,.0f} prompts"
    return element(
        "p",
        f"Measured at step {step_of(last):,}{prompts}: averaged (EMA) weights against the base "
        "model, same prompts and seeds. "
        "Up or down means that the 95&nbsp;% bootstrap interval of the paired gain lies wholly on one side "
        "of zero. The intervals cover the choice of "
        "prompts only: not another training seed, and not that several rewards are tested at once.",
        class_="small",
    )


def before_after(records: Records) -> str:
    """Returns base, trained and gain per reward, each with its interval."""
    title = "Before and after"
    if not records.base and not records.trained:
        message = (
            "No evaluation yet. <code>evaluation.jsonl</code> gets its first entry when the base model is "
            "evaluated."
        )
        return blocks.section("before-after", title, blocks.absent(message))
    rows = [_outcome_row(records, outcome) for outcome in findings.outcomes(records)]
    last = "not&nbsp;evaluated&nbsp;yet"
    if records.trained:
        last = f"step&nbsp;{step_of(records.trained[-1]):,}"
    table = blocks.table(
        ("Reward", "Base", f"Trained<br>({last})", *_COLUMNS, records.samples.capitalize()),
        rows,
        kind="outcome",
        caption="Mean score with its 95&nbsp;% interval below it, in each reward's own units; higher is better",
    )
    note = element(
        "p",
        "Bars: each row has its own scale; the upright line is zero. "
        f"<i>{records.samples.capitalize()}</i> counts those to which the reward applies.",
        class_="small",
    )
    rates = joint_rates.run_table(findings.joint(records), records.samples)
    return blocks.section("before-after", title, table, note, rates)


def _outcome_row(records: Records, outcome: Outcome) -> tuple[str, ...]:
    base, trained, gain = outcome.base, outcome.trained, outcome.gain
    # One number of digits a row, so that base, trained and gain can be compared by eye.
    decimals = decimals_for(narrowest((base, trained, gain)))
    num_images = trained.count
    if not math.isfinite(num_images):
        num_images = base.count
    words = f"{_sign(outcome.kind)} {_WORDS[outcome.kind]}"
    return (
        blocks.reward_label(records, outcome.reward),
        blocks.interval_cell(base, decimals),
        blocks.interval_cell(trained, decimals),
        blocks.interval_cell(gain, decimals, signed=True),
        interval_bar(gain, records.slot(outcome.reward), width=132),
        element("span", words, class_=f"verdict {outcome.kind}"),
        data(num_images, 0),
    )
