"""Whether the policies of a run agree where they should, and differ where they should, told from its figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

GAP_LIMIT = 1e-3
"""Distance of a step's log-probability in training from that in sampling, from which it is told, without a clip."""
GAP_SHARE = 0.1
"""The same with a clip, in ranges of the clip: a ratio that is off by a tenth of it clips what it should not."""
STEPS_ALIKE = 20
"""Steps after the first at which two policies must not all be the same: fewer tell nothing, as policies that hardly
differ yet may be the same to within rounding, so that a run of 20 steps or less is never told."""


def first_gap(record: Mapping[str, Any]) -> float:
    """Mean distance of log-probabilities where the trained policy is the one that sampled; NaN for other objectives."""
    for name in ("objective/log_prob_gap_first", "objective/log_prob_gap"):
        value = record.get(name)
        if value is not None:
            return float(value)
    return math.nan


def disagreement(record: Mapping[str, Any], clip_range: float) -> str:
    """What is wrong if training gives a step of the same policy another probability than sampling gave it; "" if not.

    Args:
      record: of an optimiser step.
      clip_range: of the ratio, 0 for none.
    """
    gap = first_gap(record)
    limit = GAP_SHARE * clip_range if clip_range > 0 else GAP_LIMIT
    if not gap > limit:
        return ""
    return (
        "training and rollout disagree: the log-probability of a step is off by "
        f"{gap:.2g} on average where the policy is the same, and the ratio of densities, which should be 1, by as much "
        f"(up to {limit:.2g} is rounding); look at model.dtype and rollout.merge_adapter"
    )


def became_regression(gaps: Sequence[float]) -> str:
    """What is wrong if the trained policy's velocity never left the rollout policy's; "" if it did.

    Args:
      gaps: mean squared distances by optimiser step, from the first on; NaN where the objective does not know it.
    """
    # Before the first update the two are the same.
    later = [gap for gap in gaps[1:] if not math.isnan(gap)]
    if len(later) < STEPS_ALIKE or any(later):
        return ""
    return (
        f"the velocity of the trained policy was that of the rollout policy at each of {len(later)} steps: nothing but "
        "weighted regression on the rollouts is left of the objective; look at rollout_policy.schedule and rate"
    )
