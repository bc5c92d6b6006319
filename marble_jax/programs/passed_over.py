"""Changed keys that a run passes over although nothing is wrong with them: said at its start instead of refused.

A preset may set a key for a mode, a schedule or an objective that it leaves to the user, such as `refresh_every` for
`harmonize.mode=amortized`, and the next change makes it count. What a user sets by hand and nothing reads is worth a
line. Keys that would be missed in what is trained are refused (`programs.unread_keys`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from marble_jax.config import KEYS, Settings, flatten
from marble_jax.objectives.awm import ROOT_WEIGHTINGS
from marble_jax.objectives.registry import make_objective
from marble_jax.training.batch_sizes import is_stochastic, window_of


def passed_over(settings: Settings, stated: Collection[str] | None = None) -> str:
    """Returns a line on keys that differ from their defaults and that a run does not read; "" where there are none.

    Args:
      settings: of the run, which have passed `check_settings`.
      stated: keys that may be named, such as those of the command line; all when None.
    """
    flat = flatten(settings)
    changed = []
    for name in sorted(_unread(settings)):
        if flat[name] != KEYS[name].default and (stated is None or name in stated):
            changed.append(f"{name}={_as_written(flat[name])}")
    if not changed:
        return ""
    return f"changed and not read by this run: {', '.join(changed)}"


def _as_written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def _unread(settings: Settings) -> set[str]:
    """Keys that a run of these settings does not read, whatever their values."""
    return {
        *_of_training(settings),
        *_of_rollouts(settings),
        *_of_harmonizing(settings),
        *_of_records(settings),
    }


def _of_training(settings: Settings) -> list[str]:
    training, unread = settings.training, []
    if training.learning_rate_schedule == "constant":
        unread.append("training.min_learning_rate_ratio")
    if training.non_finite == "skip":
        unread.append("training.non_finite_patience")
    if training.non_finite != "rollback":
        unread.append("training.max_rollbacks")
    if settings.reward_schedule.dropout == 0:
        unread += ["reward_schedule.dropout_targets", "reward_schedule.dropout_warmup"]
    if settings.objective.name == "awm" and settings.awm.weighting not in ROOT_WEIGHTINGS:
        unread.append("awm.power")
    return unread


def _of_rollouts(settings: Settings) -> list[str]:
    schedule, unread = settings.rollout_policy.schedule, []
    if schedule == "copy":
        unread += ["rollout_policy.rate", "rollout_policy.cap"]
    if schedule != "delayed_linear":
        unread.append("rollout_policy.delay")
    # Without noise these keys are refused.
    if not is_stochastic(settings.rollout):
        return unread
    window = window_of(settings.rollout)
    if window.num_starts == 1:
        unread.append("rollout.window_schedule")
    if window.num_starts == 1 or window.schedule != "sliding":
        unread.append("rollout.window_every")
    return unread


def _of_harmonizing(settings: Settings) -> list[str]:
    harmonize, objective, unread = settings.harmonize, make_objective(settings), []
    cleaned = harmonize.gram == "cleaned"
    if harmonize.mode == "exact":
        unread.append("harmonize.refresh_every")
        # What a cleaned solve holds on to, and what anchors are expected to weigh, is the running average, too.
        if not (harmonize.smooth_exact or cleaned or harmonize.anchor_error):
            unread.append("harmonize.rho")
    if not cleaned:
        unread.append("harmonize.shrinkage")
    if harmonize.is_upstream:
        unread.append("harmonize.anchor_every")
    elif objective.num_anchors == 0 and objective.kl_weight == 0:
        unread += ["harmonize.anchor_every", "harmonize.anchor_error"]
    return unread


def _of_records(settings: Settings) -> list[str]:
    unread = []
    if not settings.export.push_to_hub:
        unread.append("export.private")
    if not settings.logging.wandb:
        unread += ["logging.wandb_entity", "logging.wandb_tags", "logging.wandb_mode"]
    return unread
