"""What the records say, in words: which rewards rose, how often the update conflicted, where the time went."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from marble_jax.report.intervals import Interval, number
from marble_jax.report.records import Records, step_of
from marble_jax.report.run_curves import recorded_curves

_KINDS = ("up", "unclear", "down", "unknown")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one reward between the base model and the last evaluation of trained weights.

    Attributes:
      reward: its name.
      heldout: True when it was never trained.
      base: score of the base model, in the reward's own units; NaN where missing.
      trained: score of the trained weights, likewise.
      gain: paired difference of the two, likewise.
    """

    reward: str
    heldout: bool
    base: Interval
    trained: Interval
    gain: Interval

    @property
    def kind(self) -> str:
        """ "up", "down" or "unclear" by the side of zero on which the gain's interval lies; "unknown" without one."""
        return self.gain.direction


def outcomes(records: Records) -> tuple[Outcome, ...]:
    """Returns one outcome per reward, trained ones first."""
    # Judged at the last evaluation and never at the best one: the best of many is high by chance.
    last = records.trained[-1] if records.trained else None
    results = []
    for name in records.names:
        results.append(
            Outcome(
                reward=name,
                heldout=name in records.heldout,
                base=records.score(records.base, name),
                trained=records.score(last, name),
                gain=records.score(last, name, "gain"),
            )
        )
    return tuple(results)


def listing(names: Sequence[str]) -> str:
    """Returns `a`, `a and b`, `a, b and c`."""
    *before, last = names
    if not before:
        return last
    return f"{', '.join(before)} and {last}"


def _names_by_kind(group: Sequence[Outcome]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for outcome in group:
        names[outcome.kind].append(outcome.reward)
    return names


def headline(records: Records, results: Sequence[Outcome]) -> str:
    """Returns one or two honest sentences: trained rewards first, then held-out ones."""
    reason = _no_verdict(records, results)
    if reason:
        return reason
    trained = [outcome for outcome in results if not outcome.heldout]
    heldout = [outcome for outcome in results if outcome.heldout]
    sentence = _trained_sentence(_names_by_kind(trained), len(trained))
    last_step = step_of(records.trained[-1])
    if records.num_steps is None or last_step < records.num_steps:
        sentence = f"So far, at step {last_step:,}: {sentence[0].lower()}{sentence[1:]}"
    return sentence + _heldout_sentence(_names_by_kind(heldout))


def _no_verdict(records: Records, results: Sequence[Outcome]) -> str:
    """Returns why nothing can be said yet; "" where there is a verdict."""
    if not records.rows and not records.evaluations:
        return "The run has no records yet."
    if not records.trained:
        return "Trained weights have not been evaluated yet, so there is no verdict."
    if all(outcome.kind == "unknown" for outcome in results):
        return (
            "The last evaluation has no gain over the base model on record, so there is no verdict."
        )
    return ""


def _trained_sentence(names: dict[str, list[str]], num_trained: int) -> str:
    parts = [_risen(len(names["up"]), num_trained)]
    unclear, fallen, unjudged = names["unclear"], names["down"], names["unknown"]
    if unclear:
        verb = "shows" if len(unclear) == 1 else "show"
        parts.append(f"{listing(unclear)} {verb} no clear change")
    if fallen:
        verb = "is" if len(fallen) == 1 else "are"
        parts.append(f"{listing(fallen)} {verb} down")
    if unjudged:
        parts.append(f"{listing(unjudged)} could not be judged")
    return "; ".join(parts) + "."


def _risen(num_risen: int, num_trained: int) -> str:
    if num_risen == 0:
        return "No trained reward is clearly up"
    if num_risen < num_trained:
        verb = "is" if num_risen == 1 else "are"
        return f"{num_risen} of {num_trained} trained rewards {verb} up"
    few = {1: "The trained reward is up", 2: "Both trained rewards are up"}
    return few.get(num_trained, f"All {num_trained} trained rewards are up")


def _heldout_sentence(names: dict[str, list[str]]) -> str:
    parts = []
    for kind, words in (("up", "up"), ("unclear", "without clear change"), ("down", "down")):
        if names[kind]:
            parts.append(f"{listing(names[kind])} {words}")
    if not parts:
        return ""
    return f" Never trained: {'; '.join(parts)}."


def summarise(records: Records) -> dict[str, Any]:
    """Returns numbers and curves by which runs compare, the format of `compare/*.json`; None where not on record."""
    gains = {}
    for outcome in outcomes(records):
        if outcome.kind == "unknown":
            continue
        gains[outcome.reward] = {
            "mean": _plain(outcome.gain.mean),
            "low": _plain(outcome.gain.low),
            "high": _plain(outcome.gain.high),
        }
    return {
        "name": records.name,
        "method": str(records.run.get("method", "")),
        "conflict_rate": _plain(records.series("harmonize/conflict").mean()),
        "worst_cos": _plain(records.series("harmonize/worst_cos").mean()),
        "later_conflict_rate": _plain(records.series("out_of_sample/conflict").mean()),
        "later_worst_cos": _plain(records.series("out_of_sample/worst_cos").mean()),
        "gain": gains,
        "joint": joint(records),
        "setting": setting(records),
        "curves": recorded_curves(records),
    }


def setting(records: Records) -> dict[str, Any]:
    """Returns what two runs have to share for their gains to be comparable; None for what is not on record."""
    last = records.trained[-1] if records.trained else {}
    done = None
    if records.last_step is not None:
        # Steps count from 0.
        done = records.last_step + 1
    return {
        "steps": done,
        "prompts a step": records.configured("rollout.prompts_per_step"),
        "images a prompt": records.configured("rollout.images_per_prompt"),
        "seed": records.configured("seed"),
        "evaluated prompts": last.get("num_prompts"),
        "evaluation seed": records.configured("evaluation.seed"),
    }


def joint(records: Records) -> dict[str, Any]:
    """Returns the last evaluation's joint rates over the base model by set of rewards; empty without any."""
    if not records.trained:
        return {}
    rates = records.trained[-1].get("joint")
    return rates if isinstance(rates, dict) else {}


def _plain(value: float) -> float | None:
    # JSON has no NaN.
    if not math.isfinite(value):
        return None
    return value


def timings(records: Records) -> dict[str, float]:
    """Returns median seconds per step by phase: `rollout`, `rewards_wait`, `train`, `other` and `step`.

    NaN where missing. `other` is what the step's total leaves, never below zero.
    """
    phases = {}
    in_phases = 0.0
    for phase in ("rollout", "rewards_wait", "train"):
        # Medians, so that the first step, which compiles, does not count.
        seconds = records.series(f"time/{phase}_s").median()
        phases[phase] = seconds
        if math.isfinite(seconds):
            in_phases += seconds
    phases["step"] = records.series("time/step_s").median()
    # The phases' sum is the nearest thing to a total that is not on record.
    if not math.isfinite(phases["step"]) and in_phases:
        phases["step"] = in_phases
    # Medians need not add up: the phases' sum may come out above the median of the steps.
    phases["other"] = max(0.0, phases["step"] - in_phases)
    return phases


def seconds_elapsed(records: Records) -> float:
    """Returns wall-clock seconds between the first and the last record; NaN with fewer than two."""
    times = []
    for row in records.rows:
        moment = number(row.get("time"))
        if math.isfinite(moment):
            times.append(moment)
    if len(times) < 2:
        return math.nan
    return times[-1] - times[0]
