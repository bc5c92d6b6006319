"""Rollouts with noise along the way, from a run's settings: their solver, and the steps that are trained on."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from marble_jax.config import Settings
from marble_jax.config.data import RolloutSettings
from marble_jax.errors import InputError
from marble_jax.families.base import Networks
from marble_jax.flow.levels import truncated
from marble_jax.flow.stochastic import StochasticTable, check_window, stochastic_table
from marble_jax.objectives.base import Kept
from marble_jax.objectives.registry import make_objective
from marble_jax.training.batch_sizes import Sizes, is_stochastic, window_of
from marble_jax.training.recipe import Timesteps


def trains_on_steps(settings: Settings) -> bool:
    """Whether the run's objective trains on steps of its rollouts, and not on clean latents noised anew."""
    return make_objective(settings).keeps is Kept.TRANSITIONS


def trains_guided(settings: Settings) -> bool:
    """Whether the policy that is trained is the guided one: steps are those of the policy that sampled them."""
    return settings.rollout.guided and trains_on_steps(settings)


def check_noisy_rollouts(settings: Settings) -> None:
    """Raises InputError unless rollouts, objective, rollout policy, window and strength of noise fit each other."""
    rollout, name = settings.rollout, settings.objective.name
    on_steps = trains_on_steps(settings)
    if on_steps and not is_stochastic(rollout):
        raise InputError(
            f"rollout.solver: expected flow_sde, dance_sde or cps with objective.name={name}, which trains on steps "
            f"with noise; received {rollout.solver!r}, which keeps none"
        )
    if is_stochastic(rollout) and not on_steps:
        raise InputError(
            f"rollout.solver: expected a solver of the ODE, such as dpm2, with objective.name={name}, which noises "
            f"clean latents anew; received {rollout.solver!r}"
        )
    if not on_steps:
        return
    schedule = settings.rollout_policy.schedule
    if schedule != "copy":
        raise InputError(
            f"rollout_policy.schedule: expected 'copy' with objective.name={name}, whose ratios are to the policy of "
            f"the last step; received {schedule!r}"
        )
    # Which windows and strengths there can be is the same on all grids from noise to a clean image, the model's too.
    evenly = np.linspace(1.0, 0.0, rollout.num_steps + 1)
    check_window(window_of(rollout), stochastic_table(rollout.solver, evenly, rollout.noise_level))


def check_objective_mode(settings: Settings) -> None:
    """Raises InputError for upstream's step with anything but what upstream trains, one update a rollout."""
    if not settings.harmonize.is_upstream:
        return
    name, updates = settings.objective.name, settings.training.updates_per_rollout
    if name != "nft":
        raise InputError(
            f"objective.name: expected 'nft' with harmonize.mode=upstream; received {name!r} "
            "(modes exact and amortized take every objective)"
        )
    if updates != 1:
        raise InputError(
            f"training.updates_per_rollout: expected 1 with harmonize.mode=upstream; received {updates}"
        )


def network_levels_of(
    rollout: RolloutSettings, networks: Networks, latent_shape: tuple[int, ...]
) -> Float[np.ndarray, " steps"] | None:
    """Levels that the network is told in rollouts; None for those of the solver."""
    found = networks.network_levels(rollout.num_steps, latent_shape)
    if found is None and rollout.integer_timesteps:
        levels = networks.levels(rollout.num_steps, latent_shape)
        return truncated(levels[:-1])
    return found


def stochastic_of(
    rollout: RolloutSettings, networks: Networks, latent_shape: tuple[int, ...]
) -> StochasticTable:
    """The table of a stochastic rollout solver, with noise at every step.

    Raises:
      InputError: a strength out of range, or a window that does not fit the steps.
    """
    levels = networks.levels(rollout.num_steps, latent_shape)
    table = stochastic_table(rollout.solver, levels, rollout.noise_level)
    check_window(window_of(rollout), table)
    return table


def timesteps_of(
    rollout: RolloutSettings, sizes: Sizes, networks: Networks, latent_shape: tuple[int, ...]
) -> Timesteps:
    """Noise levels that a run's images are trained at.

    Raises:
      InputError: see `stochastic_of`.
    """
    levels = networks.levels(rollout.num_steps, latent_shape)
    # The last level is clean: nothing is trained there.
    trained = levels[:-1]
    if not is_stochastic(rollout):
        return Timesteps(tuple(map(float, trained)), sizes.timesteps, parts=sizes.timestep_parts)
    told = network_levels_of(rollout, networks, latent_shape)
    if told is not None:
        # A step is trained with what the network was told when it was sampled.
        trained = told
    return Timesteps(
        tuple(map(float, trained)),
        sizes.timesteps,
        stochastic_of(rollout, networks, latent_shape),
        window_of(rollout).size,
    )
