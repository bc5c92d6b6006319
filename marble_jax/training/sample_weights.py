"""Weights of samples' gradients from an earlier solve for alpha, or of the single advantage that is trained on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from marble_jax.harmonize import alpha_state
from marble_jax.harmonize.reward_gradients import per_sample
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState


def remembered_weights(
    recipe: Recipe, state: TrainState, batch: RolloutBatch
) -> tuple[jax.Array, int]:
    """Returns the remembered weights on the rewards' gradients, each over its number of valid samples.

    Beside them the number of all samples. Every image is a sample at each of its timesteps, valid at all of them or at
    none.
    """
    rewards = recipe.harmonization.num_rewards
    counts = jnp.sum(batch.valid, axis=0) * recipe.timesteps.num_trained
    num_samples = len(batch.prompt) * recipe.timesteps.num_trained
    weights = alpha_state.active_weights(state.alpha, counts[:rewards] > 0)
    if recipe.harmonization.scalarized:
        weights = scalarized_weights(rewards)
    return per_sample(weights, counts), num_samples


def scalarized_weights(num_rewards: int) -> jax.Array:
    """Returns all weight on the last objective, the single advantage; the rewards are only watched."""
    return jnp.concatenate([jnp.zeros(num_rewards), jnp.ones(1)])
