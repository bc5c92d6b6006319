"""Whether a run is healthy: every sign of trouble that the records can show, in words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from marble_jax import agreement
from marble_jax.report import findings
from marble_jax.report.findings import Outcome
from marble_jax.report.intervals import Interval, number
from marble_jax.report.records import Records, Series, step_of

# Thresholds are judgements, set where a reader of the images would start to doubt them; they decide what is told and
# never what is trained.
DIVERSITY_ALARM, DIVERSITY_WATCH = 0.5, 0.75
BRIGHTNESS_ALARM, BRIGHTNESS_WATCH = 0.20, 0.10
X0_NORM_ALARM, X0_NORM_WATCH = 0.25, 0.10
MOTION_ALARM, MOTION_WATCH = 0.5, 0.75
RISEN = 0.1
"""Rise of a mean score, in standard deviations of a step's scores, from which a reward counts as risen."""
FAILED_ALARM = 0.05
WAIT_WATCH = 0.10
"""Share of a step's time, spent waiting for rewards, from which it is worth a look."""
ZERO_STD_WATCH = 0.5
STARVED_ALPHA = 0.01
CONSTANT_SPREAD = 1e-6
"""Spread of scores, relative to their size, below which float32 scores are the same number."""
NORM_ALARM = 10
_SHOWN_STEPS = 5
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One thing to look at.

    Attributes:
      level: "alarm" (distrust the run until explained) or "watch".
      title: a few words, plain text.
      text: what was measured and what it may mean, plain text.
    """

    level: str
    title: str
    text: str


def alarms(records: Records) -> tuple[Alarm, ...]:
    """Returns everything that asks for a look, alarms before watches."""
    raised = _outcome_faults(records)
    raised += _drifts(records)
    for name in records.rewards:
        raised += _reward_faults(records, name)
    raised += _failed_evaluations(records)
    raised += _policies_alike_or_apart(records)
    raised += _missing_numbers(records)
    raised += _risen_norm(records)
    raised += _waits(records)
    worded = []
    for alarm in raised:
        # Hyphens inside words and numbers' exponents are left as they are.
        text = _MINUS.sub("\N{MINUS SIGN}", alarm.text)
        worded.append(dataclasses.replace(alarm, text=text))
    # The sort is stable: within a level the order above remains, gravest first.
    worded.sort(key=lambda alarm: alarm.level != "alarm")
    return tuple(worded)


def _level(size: float, threshold: float) -> str:
    return "alarm" if size > threshold else "watch"


def amount(value: float) -> str:
    """Returns a failure record in words: the share of scores up to 1, a count above."""
    if value <= 1:
        return f"{value:.1%} of the scores"
    return f"{value:g} scores"


def _outcome_faults(records: Records) -> list[Alarm]:
    raised = []
    for outcome in findings.outcomes(records):
        if not outcome.heldout:
            raised += _past_peak(records, outcome)
        elif outcome.kind == "down":
            raised.append(_fallen(records, outcome))
    return raised


def _fallen(records: Records, outcome: Outcome) -> Alarm:
    gain = outcome.gain
    text = (
        f"The held-out reward {outcome.reward} lost {abs(gain.mean):.3g} "
        f"(interval {gain.low:.3g} to {gain.high:.3g}) while others were trained: "
        f"rewards may be won at the {records.samples}' cost."
    )
    return Alarm("alarm", f"{outcome.reward} fell without being trained", text)


def _history(records: Records, reward: str) -> list[tuple[int, Interval]]:
    """Returns step and score of every evaluation of trained weights that has one."""
    history = []
    for evaluation in records.trained:
        score = records.score(evaluation, reward)
        if math.isfinite(score.mean):
            history.append((step_of(evaluation), score))
    return history


def _past_peak(records: Records, outcome: Outcome) -> list[Alarm]:
    """Returns a watch where a reward's last score lies below the interval of its best one."""
    history = _history(records, outcome.reward)
    # A single evaluation is its own peak.
    if len(history) < 2:
        return []
    best_step, best = max(history, key=lambda entry: entry[1].mean)
    _, last = history[-1]
    # Without an interval, or inside it, a lower last score may be chance.
    if not math.isfinite(best.low) or last.mean >= best.low:
        return []
    text = (
        f"It peaked at {best.mean:.4g} at step {best_step} and is {last.mean:.4g} now, below "
        "the peak's interval; an earlier checkpoint may be the better one."
    )
    return [Alarm("watch", f"{outcome.reward} is past its peak", text)]


def _drifts(records: Records) -> list[Alarm]:
    return _diversity(records) + _brightness(records) + _latent_norm(records) + _freezing(records)


def _diversity(records: Records) -> list[Alarm]:
    drift = records.series("rollout/diversity").drift()
    if drift is None or drift.start <= 0:
        return []
    if drift.end >= DIVERSITY_WATCH * drift.start:
        return []
    level, title = "watch", "Diversity is falling"
    if drift.end <= DIVERSITY_ALARM * drift.start:
        level, title = "alarm", "Diversity has halved"
    text = (
        f"{records.samples.capitalize()} of one prompt differ less than at the start: {drift.start:.3g} then, "
        f"{drift.end:.3g} now ({drift.relative:+.0%}). Collapse onto one look per prompt reads like this; "
        f"see the {records.samples}."
    )
    return [Alarm(level, title, text)]


def _brightness(records: Records) -> list[Alarm]:
    drift = records.series("rollout/brightness").drift()
    if drift is None:
        return []
    change = drift.end - drift.start
    if abs(change) <= BRIGHTNESS_WATCH:
        return []
    level = _level(abs(change), BRIGHTNESS_ALARM)
    direction = "brighter" if change > 0 else "darker"
    text = (
        f"Mean brightness (0 black, 1 white) went from {drift.start:.3f} to {drift.end:.3f}. A reward may be paid "
        "for light rather than for content."
    )
    return [Alarm(level, f"{records.samples.capitalize()} are getting {direction}", text)]


def _latent_norm(records: Records) -> list[Alarm]:
    drift = records.series("rollout/x0_norm").drift()
    # A norm of zero has no relative change; records of a broken run may hold one.
    if drift is None or drift.start <= 0:
        return []
    if abs(drift.relative) <= X0_NORM_WATCH:
        return []
    level = _level(abs(drift.relative), X0_NORM_ALARM)
    text = (
        f"The size of the sampled latents went from {drift.start:.3g} to {drift.end:.3g} "
        f"({drift.relative:+.0%}); the VAE was never trained far from its usual range."
    )
    return [Alarm(level, "Latent norm is drifting", text)]


def _freezing(records: Records) -> list[Alarm]:
    """Returns what tells of clips that come to a stand, which several rewards may pay for."""
    drift = records.series("rollout/motion").drift()
    # Clips that never moved cannot freeze.
    if drift is None or drift.start <= 0:
        return []
    if drift.end >= MOTION_WATCH * drift.start:
        return []
    level, title = "watch", "Clips move less"
    if drift.end <= MOTION_ALARM * drift.start:
        level, title = "alarm", "Clips are freezing"
    text = (
        f"Neighbouring frames differed by {drift.start:.3g} at the start and by {drift.end:.3g} now "
        f"({drift.relative:+.0%})."
    )
    risen = [name for name in records.rewards if _has_risen(records, name)]
    if risen:
        verb = "has" if len(risen) == 1 else "have"
        text += f" Meanwhile {findings.listing(risen)} {verb} risen: "
        text += "rewards of single frames, and of smoothness, can be won by standing still."
    return [Alarm(level, title, text)]


def _has_risen(records: Records, name: str) -> bool:
    """Whether a reward's mean score on rollouts is clearly higher than at the start."""
    drift = records.series(f"rollout/score_mean/{name}").drift()
    spread = records.series(f"rollout/score_std/{name}").median()
    if drift is None or not math.isfinite(spread):
        return False
    return drift.end - drift.start > RISEN * spread


def _reward_faults(records: Records, name: str) -> list[Alarm]:
    """Returns what is wrong with one trained reward's scores, groups or weight."""
    return (
        _constant(records, name)
        + _never_applied(records, name)
        + _failed_calls(records, name)
        + _ties(records, name)
        + _starved(records, name)
    )


def _constant(records: Records, name: str) -> list[Alarm]:
    spread = records.series(f"rollout/score_std/{name}").recent()
    last_mean = records.series(f"rollout/score_mean/{name}").last()
    size = 1.0
    # Rewards of large numbers (PickScore: about 20) are rounded more coarsely than those within 0 and 1.
    if math.isfinite(last_mean):
        size = max(1.0, abs(last_mean))
    if not spread.size or spread.max() > CONSTANT_SPREAD * size:
        return []
    text = (
        f"All {records.samples} of the last {spread.size} step(s) scored {last_mean:.4g}. A reward that is "
        "installed wrongly looks like this, and so does one that is solved."
    )
    return [Alarm("alarm", f"{name} is constant", text)]


def _never_applied(records: Records, name: str) -> list[Alarm]:
    missing = records.series(f"rollout/missing_share/{name}")
    if not missing.finite.size or missing.lowest() < 1.0:
        return []
    text = f"It was missing on all {records.samples} of every step: the prompts may lack what it needs."
    return [Alarm("alarm", f"{name} never applied", text)]


def _failed_calls(records: Records, name: str) -> list[Alarm]:
    failed = records.series(f"rollout/failed/{name}")
    num_failed = int((failed.finite > 0).sum())
    if num_failed == 0:
        return []
    level = _level(failed.mean(), FAILED_ALARM)
    text = (
        f"Calls failed in {num_failed} of {failed.finite.size} step(s), at worst "
        f"{amount(failed.highest())}. Failed scores count as missing, never as zero."
    )
    return [Alarm(level, f"{name} failed at times", text)]


def _ties(records: Records, name: str) -> list[Alarm]:
    ties = records.series(f"rollout/zero_std_share/{name}").recent()
    if not ties.size or ties.mean() <= ZERO_STD_WATCH:
        return []
    text = (
        f"In {ties.mean():.0%} of the groups of the last {ties.size} step(s) all {records.samples} scored alike; "
        "those groups teach nothing."
    )
    return [Alarm("watch", f"{name}: most groups tie", text)]


def _starved(records: Records, name: str) -> list[Alarm]:
    alpha = records.series(f"{records.alpha_key}/{name}").recent()
    # A single reward has all the weight, whatever a record says.
    if not alpha.size or len(records.rewards) < 2:
        return []
    if alpha.mean() >= STARVED_ALPHA:
        return []
    text = f"Its alpha averaged {alpha.mean():.2g} over the last {alpha.size} step(s)."
    return [Alarm("watch", f"{name} has almost no weight", text)]


def _failed_evaluations(records: Records) -> list[Alarm]:
    failures: dict[str, list[str]] = {}
    for evaluation in records.evaluations:
        for name, num_failed in _failures(evaluation).items():
            where = f"{num_failed:g} in step {step_of(evaluation)}"
            failures.setdefault(name, []).append(where)
    raised = []
    for name, places in failures.items():
        text = (
            f"Held-out {records.samples} without a score: {', '.join(places)}. "
            f"Gains compare the {records.samples} that both have."
        )
        raised.append(Alarm("watch", f"{name} failed in evaluations", text))
    return raised


def _failures(evaluation: dict[str, Any]) -> dict[str, float]:
    """Returns the number of failed scores of each reward that failed in an evaluation."""
    counts = evaluation.get("failed")
    if not isinstance(counts, dict):
        return {}
    return {name: number(count) for name, count in counts.items() if number(count) > 0}


def _policies_alike_or_apart(records: Records) -> list[Alarm]:
    """Policies that agree where they must not, or do not where they must."""
    raised = []
    same = [_same_policy(row) for row in records.rows]
    alike = agreement.became_regression(same, _steps_alike_by_schedule(records))
    if alike:
        raised.append(
            Alarm("alarm", "The rollout policy is the trained one", f"In this run {alike}.")
        )
    limit = _gap_limit(records)
    for series in map(records.series, ("objective/log_prob_gap_first", "objective/log_prob_gap")):
        if not series.finite.size:
            continue
        apart = agreement.disagreement({"objective/log_prob_gap": series.finite.max()}, limit)
        if apart:
            raised.append(Alarm("alarm", "Training and rollout disagree", f"At worst, {apart}."))
        break
    return raised


def _same_policy(row: Mapping[str, Any]) -> float:
    """Returns `agreement.same_policy` of a record, in which null, text and the like are no numbers."""
    keys = ("objective/velocity_gap", "rollout_policy/is_trained")
    return agreement.same_policy({key: number(row.get(key)) for key in keys})


def _steps_alike_by_schedule(records: Records) -> int:
    """Returns the steps for which the rollout policy was to be the trained one; 0 where that is not on record."""
    delay = number(records.configured("rollout_policy.delay"))
    if not math.isfinite(delay):
        return 0
    schedule = str(records.configured("rollout_policy.schedule"))
    return agreement.steps_alike_by_schedule(schedule, int(delay))


def _gap_limit(records: Records) -> float:
    """Returns the distance of log-probabilities that is told; see `agreement.gap_limit`."""
    dtype = str(records.configured("model.dtype"))
    if dtype not in agreement.ROUNDING:
        # Not on record, or damaged: the wider one accuses nobody wrongly.
        dtype = "bfloat16"
    clip_range = number(records.configured("policy_gradient.clip_range"))
    if not math.isfinite(clip_range):
        clip_range = 0.0
    form = str(records.configured("policy_gradient.form"))
    return agreement.gap_limit(dtype, clip_range, form)


def _missing_numbers(records: Records) -> list[Alarm]:
    raised = []
    for key, word in (("objective/loss", "loss"), ("training/grad_norm", "gradient norm")):
        series = records.series(key)
        steps = _steps_without_number(series)
        if not steps:
            continue
        where = ", ".join(map(str, steps[:_SHOWN_STEPS]))
        if len(steps) > _SHOWN_STEPS:
            where += ", ..."
        text = f"The {word} was missing or not finite in {len(steps)} step(s): {where}."
        raised.append(Alarm("watch", f"No number for the {word}", text))
    return raised


def _steps_without_number(series: Series) -> list[int]:
    return series.step[~np.isfinite(series.value)].tolist()


def _risen_norm(records: Records) -> list[Alarm]:
    norm = records.series("training/grad_norm")
    # A tenth of fewer values is one step, and one step's norm says little.
    if norm.finite.size < 10:
        return []
    recent, median = norm.recent().mean(), norm.median()
    if median <= 0 or recent <= NORM_ALARM * median:
        return []
    text = f"The last tenth averages {recent:.3g}, the run's median is {median:.3g}."
    return [Alarm("alarm", "Gradient norm has risen tenfold", text)]


def _waits(records: Records) -> list[Alarm]:
    """Returns a watch where rewards hold the run up."""
    phases = findings.timings(records)
    if not phases["step"] > 0:
        return []
    share = phases["rewards_wait"] / phases["step"]
    # Written so that a share of NaN, which is no record of waiting, raises nothing.
    if not share > WAIT_WATCH:
        return []
    text = (
        f"{share:.0%} of a step is spent waiting for rewards that run beside the sampling. More of them at a time "
        "(rewards.num_workers), more replicas of a remote one, or smaller rollout batches shorten the wait."
    )
    return [Alarm("watch", "Rewards hold the run up", text)]
