"""Whether the policies of a run agree where they should, and differ where they should, told from its figures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2}
"""Distance of a step's log-probability in training from that in sampling, from which it is told where no ratio is
clipped by it, by `model.dtype`.

In float32 rounding came to 7e-8 at most in 60 steps of the embedded pipeline, where a single update moved
log-probabilities by 7e-5 and more. In bfloat16 it came to 2e-7 in its first step on a CPU, which rounds alike in
training and in rollouts. Where kernels for batches of unlike size do not, it is reckoned: half of `(slope / noise)^2`
times the mean squared difference of velocities that rounding makes (`training.rounding`) is 7e-5 on average over the
steps of Flow-GRPO for SD3.5-medium, and 2e-3 with its guidance of 4.5, for velocities of mean square 2."""
GAP_SHARE = 0.1
"""The same where ratios are clipped by it, in ranges of the clip: a ratio that is off by a tenth of it clips what it
should not."""
GAP_FLOOR = 8 * 2.0**-23
"""The least of that limit: log-probabilities are reckoned in float32 whatever the network's dtype, and are about 1."""
STEPS_ALIKE = 20
"""Steps after the first at which two policies must not all be the same: fewer tell nothing, as a schedule may begin
with policies that are one, so that a run of 20 steps or less is never told."""


def gap_limit(dtype: str, clip_range: float, form: str) -> float:
    """Distance of log-probabilities, in nats an element, up to which training and sampling agree.

    Args:
      dtype: `model.dtype`.
      clip_range: of the ratio, 0 for none.
      form: of the ratio, "ppo" or "guard". Guard's compares two means of training, so that its clip is not one of this
        distance.
    """
    if clip_range > 0 and form == "ppo":
        return max(GAP_SHARE * clip_range, GAP_FLOOR)
    return ROUNDING[dtype]


def first_gap(record: Mapping[str, Any]) -> float:
    """Mean distance of log-probabilities where the trained policy is the one that sampled; NaN for other objectives."""
    for name in ("objective/log_prob_gap_first", "objective/log_prob_gap"):
        value = record.get(name)
        if value is not None:
            return float(value)
    return math.nan


def disagreement(record: Mapping[str, Any], limit: float) -> str:
    """What is wrong if training gives a step of the same policy another probability than sampling gave it; "" if not.

    Args:
      record: of an optimiser step.
      limit: see `gap_limit`.
    """
    gap = first_gap(record)
    if not gap > limit:
        return ""
    return (
        "training and rollout disagree: the log-probability of a step is off by "
        f"{gap:.2g} on average where the policy is the same, and the ratio of densities, which should be 1, by as much "
        f"(told from {limit:.2g} on); look at model.dtype and rollout.merge_adapter"
    )


def same_policy(record: Mapping[str, Any]) -> float:
    """1 where a step was taken with a rollout policy that was the trained one to the last bit, 0 where it was not; NaN
    where the objective does not compare the two.

    Velocities do not tell: those of one policy differ by rounding where they are computed in batches of unlike size.
    """
    gap, same = record.get("objective/velocity_gap"), record.get("rollout_policy/is_trained")
    if gap is None or same is None or math.isnan(gap):
        return math.nan
    return float(same)


def steps_alike_by_schedule(schedule: str, delay: int) -> int:
    """Optimiser steps for which a schedule of the rollout policy keeps it the trained one, to leave it afterwards.

    Args:
      schedule: `rollout_policy.schedule`.
      delay: `rollout_policy.delay`, which one of the schedules has.
    """
    return delay if schedule == "delayed_linear" else 0


def became_regression(same: Sequence[float], by_schedule: int = 0) -> str:
    """What is wrong if the trained policy never left the rollout policy; "" if it did.

    Args:
      same: `same_policy` by optimiser step, from the first on.
      by_schedule: steps at the beginning at which the two are meant to be one, see `steps_alike_by_schedule`.
    """
    # Before the first update the two are the same in any case.
    first = by_schedule + 1
    later = [value for value in same[first:] if not math.isnan(value)]
    if len(later) < STEPS_ALIKE or not all(later):
        return ""
    return (
        f"the rollout policy was the trained one at each of the last {len(later)} steps: nothing but weighted "
        "regression on the rollouts is left of the objective; look at rollout_policy.schedule and rate"
    )


class PolicyWatch:
    """Says once in a run where policies agree that should not, and where they do not that should.

    Args:
      limit: see `gap_limit`.
      say: called with a line of warning.
      by_schedule: see `became_regression`.
    """

    def __init__(self, limit: float, say: Callable[[str], object], by_schedule: int = 0):
        self._limit, self._say, self._by_schedule = limit, say, by_schedule
        self._same: list[float] = []
        self._told: set[str] = set()

    def see(self, record: Mapping[str, Any]) -> None:
        """Looks at the record of an optimiser step, the next one each time."""
        self._same.append(same_policy(record))
        for kind, text in (
            ("apart", disagreement(record, self._limit)),
            ("alike", became_regression(self._same, self._by_schedule)),
        ):
            if text and kind not in self._told:
                self._told.add(kind)
                self._say(f"warning: {text}")
