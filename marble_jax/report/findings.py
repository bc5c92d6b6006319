"""What the records say, in words: which rewards rose, whether the run is healthy, how often the update conflicted."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

from marble_jax.report.records import Records, Series, number, step_of

WINDOW_SHARE = 0.1
"""Drifts compare the mean over the first tenth of the steps with the mean over the last tenth."""
DIVERSITY_ALARM, DIVERSITY_WATCH = 0.5, 0.75
BRIGHTNESS_ALARM, BRIGHTNESS_WATCH = 0.20, 0.10
X0_NORM_ALARM, X0_NORM_WATCH = 0.25, 0.10
FAILED_ALARM = 0.05
WAIT_WATCH = 0.10
"""Share of a step's time, spent waiting for rewards, from which it is worth a look."""
ZERO_STD_WATCH = 0.5
STARVED_ALPHA = 0.01
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one reward between the base model and the last evaluation of trained weights.

    Attributes:
      reward: its name.
      heldout: True when it was never trained.
      kind: "up" (the gain's interval lies above zero), "down" (below), "unclear" (it holds zero), "unknown" (no
        numbers).
      base, trained, gain: each `mean`, `low`, `high` (and `count`), in the reward's own units; NaN where missing.
    """

    reward: str
    heldout: bool
    kind: str
    base: dict[str, float]
    trained: dict[str, float]
    gain: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One thing to look at. `level` is "alarm" (distrust the run until explained) or "watch"."""

    level: str
    title: str
    text: str


def outcomes(records: Records) -> tuple[Outcome, ...]:
    """One outcome per reward, trained ones first; judged at the *last* evaluation, never at the best one."""
    last = records.trained[-1] if records.trained else None
    found = []
    for name in records.names:
        gain = records.score(last, name, "gain")
        low, high = gain["low"], gain["high"]
        kind = (
            "unknown"
            if not (math.isfinite(low) and math.isfinite(high))
            else "up"
            if low > 0
            else "down"
            if high < 0
            else "unclear"
        )
        found.append(
            Outcome(
                name,
                name in records.heldout,
                kind,
                records.score(records.base, name),
                records.score(last, name),
                gain,
            )
        )
    return tuple(found)


def listing(names: list[str] | tuple[str, ...]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def headline(records: Records, found: tuple[Outcome, ...]) -> str:
    """One or two honest sentences: trained rewards first, then held-out ones."""
    trained = [o for o in found if not o.heldout]
    if not records.rows and not records.evaluations:
        return "The run has no records yet."
    if not records.trained:
        return "Trained weights have not been evaluated yet, so there is no verdict."
    if all(o.kind == "unknown" for o in found):
        return (
            "The last evaluation has no gain over the base model on record, so there is no verdict."
        )
    names = {
        kind: [o.reward for o in trained if o.kind == kind]
        for kind in ("up", "unclear", "down", "unknown")
    }
    if trained and len(names["up"]) == len(trained):
        first = {1: "The trained reward is up", 2: "Both trained rewards are up"}.get(
            len(trained), f"All {len(trained)} trained rewards are up"
        )
    elif not names["up"]:
        first = "No trained reward is clearly up"
    else:
        first = f"{len(names['up'])} of {len(trained)} trained rewards {'is' if len(names['up']) == 1 else 'are'} up"
    rest = []
    if names["unclear"]:
        rest.append(
            f"{listing(names['unclear'])} {'shows' if len(names['unclear']) == 1 else 'show'} no clear change"
        )
    if names["down"]:
        rest.append(f"{listing(names['down'])} {'is' if len(names['down']) == 1 else 'are'} down")
    if names["unknown"]:
        rest.append(f"{listing(names['unknown'])} could not be judged")
    if records.num_steps is None or step_of(records.trained[-1]) < records.num_steps:
        first = f"So far, at step {step_of(records.trained[-1]):,}: {first[0].lower()}{first[1:]}"
    sentence = first + ("; " + "; ".join(rest) if rest else "") + "."
    heldout = [o for o in found if o.heldout and o.kind != "unknown"]
    parts = []
    for kind, words in (("up", "up"), ("unclear", "without clear change"), ("down", "down")):
        members = [o.reward for o in heldout if o.kind == kind]
        if members:
            parts.append(f"{listing(members)} {words}")
    return sentence + (f" Never trained: {'; '.join(parts)}." if parts else "")


def windows(series: Series) -> tuple[float, float] | None:
    """Mean over the first and the last tenth of the values; None with fewer than four values."""
    values = series.finite
    if values.size < 4:
        return None
    width = max(1, round(values.size * WINDOW_SHARE))
    return float(values[:width].mean()), float(values[-width:].mean())


def last_window(series: Series) -> np.ndarray:
    """float64: the last tenth of the values, at least one."""
    values = series.finite
    return values[-max(1, round(values.size * WINDOW_SHARE)) :] if values.size else values


def _drifts(records: Records) -> list[Alarm]:
    found = []
    pair = windows(records.series("rollout/diversity"))
    if pair and pair[0] > 0 and pair[1] < DIVERSITY_WATCH * pair[0]:
        alarm = pair[1] <= DIVERSITY_ALARM * pair[0]
        text = (
            f"Images of one prompt differ less than at the start: {pair[0]:.3g} then, {pair[1]:.3g} now "
            f"({pair[1] / pair[0] - 1:+.0%}). Collapse onto one look per prompt reads like this; see the images."
        )
        found.append(
            Alarm(
                "alarm" if alarm else "watch",
                "Diversity has halved" if alarm else "Diversity is falling",
                text,
            )
        )
    pair = windows(records.series("rollout/brightness"))
    if pair and abs(pair[1] - pair[0]) > BRIGHTNESS_WATCH:
        level = "alarm" if abs(pair[1] - pair[0]) > BRIGHTNESS_ALARM else "watch"
        text = (
            f"Mean brightness (0 black, 1 white) went from {pair[0]:.3f} to {pair[1]:.3f}. A reward may be paid "
            "for light rather than for content."
        )
        found.append(
            Alarm(
                level,
                "Images are getting " + ("brighter" if pair[1] > pair[0] else "darker"),
                text,
            )
        )
    pair = windows(records.series("rollout/x0_norm"))
    if pair and pair[0] > 0 and abs(pair[1] / pair[0] - 1) > X0_NORM_WATCH:
        level = "alarm" if abs(pair[1] / pair[0] - 1) > X0_NORM_ALARM else "watch"
        text = (
            f"The size of the sampled latents went from {pair[0]:.3g} to {pair[1]:.3g} "
            f"({pair[1] / pair[0] - 1:+.0%}); the VAE was never trained far from its usual range."
        )
        found.append(Alarm(level, "Latent norm is drifting", text))
    return found


def _reward_faults(records: Records) -> list[Alarm]:
    found = []
    for name in records.rewards:
        std, mean = (
            records.series(f"rollout/score_std/{name}"),
            records.series(f"rollout/score_mean/{name}"),
        )
        recent = last_window(std)
        if recent.size and recent.max() <= 1e-6 * max(
            1.0, abs(mean.last()) if len(mean.finite) else 1.0
        ):
            text = (
                f"Every image of the last {recent.size} step(s) scored {mean.last():.4g}. A reward that is "
                "installed wrongly looks like this, and so does one that is solved."
            )
            found.append(Alarm("alarm", f"{name} is constant", text))
        missing = records.series(f"rollout/missing_share/{name}")
        if missing.finite.size and missing.finite.min() >= 1.0:
            found.append(
                Alarm(
                    "alarm",
                    f"{name} never applied",
                    "It was missing on every image of every step: the prompts may lack what it needs.",
                )
            )
        failed = records.series(f"rollout/failed/{name}")
        if failed.finite.size and failed.finite.max() > 0:
            steps = int((failed.finite > 0).sum())
            level = "alarm" if failed.mean() > FAILED_ALARM else "watch"
            text = (
                f"Calls failed in {steps} of {failed.finite.size} step(s), at worst "
                f"{amount(failed.finite.max())}. Failed scores count as missing, never as zero."
            )
            found.append(Alarm(level, f"{name} failed at times", text))
        ties = last_window(records.series(f"rollout/zero_std_share/{name}"))
        if ties.size and ties.mean() > ZERO_STD_WATCH:
            text = (
                f"In {ties.mean():.0%} of the groups of the last {ties.size} step(s) every image scored alike; "
                "those groups teach nothing."
            )
            found.append(Alarm("watch", f"{name}: most groups tie", text))
        alpha = last_window(records.series(f"harmonize/alpha/{name}"))
        if alpha.size and len(records.rewards) > 1 and alpha.mean() < STARVED_ALPHA:
            found.append(
                Alarm(
                    "watch",
                    f"{name} has almost no weight",
                    f"Its alpha averaged {alpha.mean():.2g} over the last {alpha.size} step(s).",
                )
            )
    return found


def _waits(records: Records) -> list[Alarm]:
    """Rewards that hold the run up."""
    phases = timings(records)
    share = phases["rewards_wait"] / phases["step"] if phases["step"] > 0 else math.nan
    if not share > WAIT_WATCH:
        return []
    text = (
        f"{share:.0%} of a step is spent waiting for rewards that run beside the sampling. More of them at a time "
        "(rewards.num_workers), more replicas of a remote one, or smaller rollout batches shorten the wait."
    )
    return [Alarm("watch", "Rewards hold the run up", text)]


def _failed_evaluations(records: Records) -> list[Alarm]:
    found: dict[str, list[str]] = {}
    for evaluation in records.evaluations:
        failed = evaluation.get("failed")
        for name, count in failed.items() if isinstance(failed, dict) else ():
            if number(count) > 0:
                found.setdefault(name, []).append(
                    f"{number(count):g} in step {step_of(evaluation)}"
                )
    return [
        Alarm(
            "watch",
            f"{name} failed in evaluations",
            f"Held-out images without a score: {', '.join(where)}. Gains compare the images that both have.",
        )
        for name, where in found.items()
    ]


def _outcome_faults(records: Records) -> list[Alarm]:
    found = []
    for outcome in outcomes(records):
        if outcome.heldout and outcome.kind == "down":
            text = (
                f"The held-out reward {outcome.reward} lost {abs(outcome.gain['mean']):.3g} "
                f"(interval {outcome.gain['low']:.3g} to {outcome.gain['high']:.3g}) while others were trained: "
                "rewards may be won at the images' cost."
            )
            found.append(Alarm("alarm", f"{outcome.reward} fell without being trained", text))
        history = [(step_of(e), records.score(e, outcome.reward)) for e in records.trained]
        history = [(step, score) for step, score in history if math.isfinite(score["mean"])]
        if outcome.heldout or len(history) < 2:
            continue
        step, best = max(history, key=lambda entry: entry[1]["mean"])
        if math.isfinite(best["low"]) and history[-1][1]["mean"] < best["low"]:
            text = (
                f"It peaked at {best['mean']:.4g} at step {step} and is {history[-1][1]['mean']:.4g} now, below "
                "the peak's interval; an earlier checkpoint may be the better one."
            )
            found.append(Alarm("watch", f"{outcome.reward} is past its peak", text))
    return found


def _numeric_faults(records: Records) -> list[Alarm]:
    found = []
    for key, word in (("objective/loss", "loss"), ("training/grad_norm", "gradient norm")):
        series = records.series(key)
        broken = series.step[~np.isfinite(series.value)]
        if broken.size:
            where = ", ".join(map(str, broken[:5])) + (", ..." if broken.size > 5 else "")
            found.append(
                Alarm(
                    "watch",
                    f"No number for the {word}",
                    f"The {word} was missing or not finite in {broken.size} step(s): {where}.",
                )
            )
    norm = records.series("training/grad_norm")
    if norm.finite.size >= 10 and last_window(norm).mean() > 10 * norm.median() > 0:
        text = f"The last tenth averages {last_window(norm).mean():.3g}, the run's median is {norm.median():.3g}."
        found.append(Alarm("alarm", "Gradient norm has risen tenfold", text))
    return found


def alarms(records: Records) -> tuple[Alarm, ...]:
    """Everything that asks for a look, alarms before watches."""
    found = (
        _outcome_faults(records)
        + _drifts(records)
        + _reward_faults(records)
        + _failed_evaluations(records)
    )
    found += _numeric_faults(records) + _waits(records)
    found = [
        dataclasses.replace(alarm, text=_MINUS.sub("\N{MINUS SIGN}", alarm.text)) for alarm in found
    ]
    return tuple(sorted(found, key=lambda alarm: alarm.level != "alarm"))


def amount(value: float) -> str:
    """A failure record in words: the share of scores up to 1, a count above."""
    return f"{value:.1%} of the scores" if value <= 1 else f"{value:g} scores"


def summarise(records: Records) -> dict[str, Any]:
    """The few numbers by which runs compare; the format of `compare/*.json`. Numbers not on record are None."""

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    gain = {
        o.reward: {f: plain(o.gain[f]) for f in ("mean", "low", "high")}
        for o in outcomes(records)
        if o.kind != "unknown"
    }
    return {
        "name": records.name,
        "method": str(records.run.get("method", "")),
        "conflict_rate": plain(records.series("harmonize/conflict").mean()),
        "worst_cos": plain(records.series("harmonize/worst_cos").mean()),
        "gain": gain,
    }


def timings(records: Records) -> dict[str, float]:
    """Median seconds per step by phase: `rollout`, `rewards_wait`, `train`, `other` and `step`; NaN where missing.

    `other` is what the step's total leaves, never below zero. Medians, so that the compiling first step does not count.
    """
    phases = {
        name: records.series(f"time/{name}_s").median()
        for name in ("rollout", "rewards_wait", "train", "step")
    }
    known = sum(v for k, v in phases.items() if k != "step" and math.isfinite(v))
    if not math.isfinite(phases["step"]) and known:
        phases["step"] = known
    phases["other"] = max(0.0, phases["step"] - known)
    return phases


def seconds_elapsed(records: Records) -> float:
    """Wall-clock seconds between the first and the last record; NaN with fewer than two."""
    times = [number(row.get("time")) for row in records.rows]
    times = [t for t in times if math.isfinite(t)]
    return times[-1] - times[0] if len(times) > 1 else math.nan
