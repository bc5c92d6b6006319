"""What a training run left behind: its settings, and its policies from a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from marble_jax.config import KEYS, Settings, settings_from_flat
from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.families.base import Family
from marble_jax.harmonize.registry import balancer_of
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable import lora
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.state import TrainState, initial_state
from marble_jax.types import Adapter


def run_settings(workdir: Workdir) -> Settings:
    """Returns the settings that a run was started with.

    A key that is younger than the run has its default; one that no longer exists is passed over.

    Raises:
      InputError: there is no run, or its record is damaged.
    """
    if not (workdir.path / "config.json").exists():
        raise InputError(
            f"--workdir: expected a training run (with config.json); received {workdir.path}"
        )
    flat = {name: key.default for name, key in KEYS.items()}
    for name, value in workdir.config().items():
        if name in KEYS:
            flat[name] = value
    return settings_from_flat(flat)


def restore_policy(
    settings: Settings,
    workdir: Workdir,
    family: Family,
    shapes: Any,
    policy: str,
    step: int | None = None,
) -> tuple[Adapter, int]:
    """Returns a policy's adapter from a checkpoint, and the step that the adapter is of.

    Args:
      settings: of the run.
      workdir: the run.
      family: of its model.
      shapes: parameters or abstract parameters of its transformer.
      policy: one of `policies.TRAINED_POLICIES`.
      step: of the checkpoint; the newest if None.

    Raises:
      InputError: no such checkpoint, one of another configuration, or no best policy yet.
    """
    if not workdir.checkpoints.exists():
        raise InputError(
            f"--workdir: expected a run with a checkpoint; received {workdir.path}, which has none yet"
        )
    spec = lora.lora_spec(settings.lora, family)
    # Only its shapes count: the checkpoint overwrites every value.
    adapter = lora.init_adapter(jax.random.key(0), family.layers_at, shapes, spec)
    blank = new_state(settings, adapter, 0)
    checkpoints = Checkpoints(workdir.checkpoints, say=Console().say)
    try:
        _, state = checkpoints.restore(blank, step)
    finally:
        checkpoints.close()
    return getattr(state, policy), trained_steps(state, policy, "--policy", str(workdir.path))


def trained_steps(state: TrainState, policy: str, option: str, run: str) -> int:
    """Returns the optimiser steps that a state's policy was trained for.

    Args:
      state: of a run.
      policy: one of `policies.TRAINED_POLICIES`.
      option: what chose it, for the message.
      run: whose state it is, likewise.

    Raises:
      InputError: the best policy before there is one.
    """
    if policy != "best":
        return int(state.step)
    # Its score is minus infinity until an evaluation was better than none.
    if not np.isfinite(state.best_score):
        raise InputError(
            f"{option}: expected one that the run has; received 'best' of {run}, where no evaluation since the start "
            "is on record"
        )
    # The best policy is older than the state that keeps it.
    return int(state.best_step)


def new_state(settings: Settings, adapter: Adapter, seed: int) -> TrainState:
    """Returns the training state of a run before its first step, of the shapes that its checkpoints have.

    Args:
      settings: of the run.
      adapter: that it starts from.
      seed: of its random key.
    """
    names = settings.rewards.train
    balancer = balancer_of(settings.harmonize, names)
    balancer_state = balancer.init(len(names))
    optimizer = make_optimizer(settings.training)
    adaptive = settings.harmonize.anchor_error > 0
    skips = settings.nft.skip_rollout_pass
    return initial_state(adapter, optimizer, len(names), balancer_state, seed, adaptive, skips)
