"""Settings of the optimiser and of the policies that follow the trained one."""

from __future__ import annotations

import dataclasses

from marble_jax.config.keys import key


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The optimiser and its steps."""

    # A finished run can be made longer, unless something follows the number of steps (`table.may_change_on_resume`).
    num_steps: int = key(1000, "optimiser steps", "steps, >= 1", resumable=True)
    micro_batch_size: int = key(
        144,
        "samples (image, timestep) a micro-batch, over all devices",
        "samples, >= 1",
        "paper",
    )
    timestep_fraction: float = key(
        0.99,
        "share of an image's timesteps trained on: fraction * N rounded down, at least one; of the steps with noise of "
        "a stochastic solver, rounded up",
        "(0, 1]",
        "paper",
    )
    first_timestep: int = key(
        0,
        "with last_timestep, levels of noise from this one on, counted from the noisiest, 1, are cut into as many "
        "parts, nearly equal, as timesteps are trained on, and an image is trained at one of each; 0: at any levels",
        "levels, >= 0",
    )
    last_timestep: int = key(0, "the last of these levels; 0 with first_timestep=0", "levels, >= 0")
    updates_per_rollout: int = key(
        1,
        "updates that share an optimiser step's images, each on its own part of them; the learning rate's schedule "
        "and the averaged policy count every one",
        "[1, 1000]",
    )
    learning_rate: float = key(3e-4, "AdamW step size", "[0, 10]", "paper")
    learning_rate_schedule: str = key(
        "constant", "learning rate over steps", "constant|cosine", "paper"
    )
    min_learning_rate_ratio: float = key(
        0.0, "last learning rate over the first, with cosine", "[0, 1]", "paper"
    )
    weight_decay: float = key(1e-4, "AdamW decoupled weight decay", "[0, 1000]", "paper")
    beta1: float = key(0.9, "AdamW first moment decay", "[0, 1)", "paper")
    beta2: float = key(0.999, "AdamW second moment decay", "[0, 1)", "paper")
    epsilon: float = key(1e-8, "AdamW epsilon", "(0, 1]", "paper")
    clip_norm: float = key(1.0, "global norm the update's gradient is clipped to", "> 0", "paper")
    # Rules for steps that went wrong; one that went right does not depend on them.
    non_finite: str = key(
        "stop",
        "a gradient that is not finite moves nothing; after some in a row 'stop' saves and ends the "
        "run, 'rollback' goes back to the last checkpoint with other random numbers, 'skip' goes on",
        "skip|stop|rollback",
        resumable=True,
    )
    non_finite_patience: int = key(5, "how many in a row", "steps, >= 1", resumable=True)
    max_rollbacks: int = key(
        3,
        "rollbacks, since the command was given, before the run is stopped after all",
        ">= 0",
        resumable=True,
    )


@dataclasses.dataclass(frozen=True)
class RolloutPolicySettings:
    """How the rollout policy follows the current one."""

    schedule: str = key(
        "linear_capped",
        "decay of the rollout policy towards the current one over steps",
        "copy|linear_capped|delayed_linear",
        "paper",
    )
    # Own ones by default: a schedule that is chosen is the published one.
    rate: float = key(
        0.0,
        "slope of the schedule; 0: its own, 0.001 of linear_capped, 0.0075 of delayed_linear",
        "1/step, [0, 1000]",
        "paper",
    )
    cap: float = key(
        0.0,
        "largest decay of the schedule; 0: its own, 0.95 of linear_capped, 0.999 of delayed_linear, which takes "
        "another only with a rate beside it",
        "[0, 1)",
        "paper",
    )
    # DiffusionNFT's schedule of this shape; MARBLE does not use it.
    delay: int = key(75, "steps before 'delayed_linear' leaves zero", "steps, >= 0", "NFT")


@dataclasses.dataclass(frozen=True)
class EmaSettings:
    """The averaged policy."""

    decay: float = key(
        0.9, "decay of the averaged adapter that is evaluated and exported", "[0, 1)", "paper"
    )
