"""Upstream's update, reproduced for comparison. Where it differs from ours, in one place:

1. alpha is solved on single micro-steps: on every one of the first optimiser step, on the first one of a refresh step.
2. The other micro-steps train on one combined advantage `sum_k alpha_k A_k`: alpha acts on losses, not on unit
   gradients, so the factor `mean|g| / |g_k|` is lost, and a missing reward counts as advantage 0.
3. A solved micro-step uses the fresh alpha, the others its running average.
4. Rollouts see integer timesteps (config key `rollout.integer_timesteps`).

Not reproduced, because it is a loss of information only: float16 compute with a loss scaler, and resume that restores
weights alone.

Source: the released code of MARBLE (arXiv 2605.06507).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.flow.policy_sampler import PolicyVelocity
from marble_jax.harmonize import alpha_state, diagnostics, reward_gradients
from marble_jax.objectives.nft import optimality
from marble_jax.training.micro_batches import (
    RolloutBatch,
    micro_step,
    num_micro_steps,
    schedule,
    sum_over,
)
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import Metrics, Recipe, Step, finish
from marble_jax.types import Params


def upstream_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation, solved: str
) -> Step:
    """One optimiser step as upstream takes it.

    Args:
      recipe: see `Recipe`; `smooth` is ignored.
      velocity: the policy.
      optimizer: of the adapter.
      solved: which micro-steps solve for alpha: "all", "first" or "none".
    """
    rewards = recipe.num_rewards

    def step(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        key = jax.random.wrap_key_data(state.key)
        plan = schedule(
            batch,
            key,
            state.step,
            recipe.sigmas,
            recipe.num_timesteps,
            recipe.micro_batch,
            recipe.shards,
        )
        units = num_micro_steps(plan)
        solves = {"all": units, "first": 1, "none": 0}[solved]

        def prepared(index: jax.Array) -> tuple[reward_gradients.FlowBatch, jax.Array, jax.Array]:
            return micro_step(
                velocity, params, state.old, batch, plan, index, recipe.kl_weight > 0, recipe.shards
            )

        def solve(
            carry: tuple[Any, alpha_state.AlphaState, Metrics], index: jax.Array
        ) -> tuple[Any, None]:
            total, alpha, _ = carry
            flow, advantages, valid = prepared(index)
            sums = recipe.shards.map_shards(
                lambda flow, advantages, valid: reward_gradients.accumulate(
                    partial(velocity, params),
                    state.current,
                    flow,
                    optimality(advantages, recipe.clip),
                    valid,
                    nft_beta=recipe.nft_beta,
                    clip=recipe.clip,
                    chunk_size=recipe.chunk // recipe.shards.count,
                ),
                flow,
                advantages[:, :rewards],
                valid[:, :rewards],
            )
            # Reduced here and not after the loop: alpha is solved on this micro-step alone.
            sums = recipe.shards.all_reduce(sums)
            mean = reward_gradients.mean_gradients(sums)
            gram = tree.gram(mean.gradients)
            solution = recipe.balancer(gram, sums.counts > 0, state.balancer)
            alpha = alpha_state.refresh(alpha, solution.alpha, solution.scale, recipe.rho)
            combined = tree.add(
                tree.weighted_sum(solution.weights, mean.gradients),
                tree.scale(mean.kl_gradient, recipe.kl_weight),
            )
            look = diagnostics.from_gram(
                gram, solution.weights, jnp.ones(rewards, bool), alpha.alpha
            )
            look |= {
                "nft/loss": jnp.sum(solution.weights * mean.losses),
                "nft/kl": mean.kl,
                "harmonize/alpha_solved": solution.alpha,
                "harmonize/grad_norm": solution.norms,
                "harmonize/min_norm": solution.min_norm,
                "harmonize/kkt_residual": solution.kkt_residual,
            }
            return (tree.add(total, tree.scale(combined, 1.0 / units)), alpha, look), None

        def cached(alpha: jax.Array, index: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            flow, advantages, _ = prepared(index)
            r = optimality(advantages[:, :rewards] @ alpha, recipe.clip)
            share = 1.0 / (units * recipe.micro_batch)
            return recipe.shards.map_shards(
                lambda flow, p, q: reward_gradients.combined_gradient(
                    partial(velocity, params),
                    state.current,
                    flow,
                    p,
                    q,
                    nft_beta=recipe.nft_beta,
                    clip=recipe.clip,
                    kl_weight=recipe.kl_weight,
                    num_samples=units * recipe.micro_batch,
                ),
                flow,
                r * share,
                (1.0 - r) * share,
            )

        gradient, alpha, metrics = tree.zeros_like(state.current), state.alpha, {}
        if solves:
            zero = jnp.zeros((), jnp.int32)
            shapes = jax.eval_shape(lambda: solve((gradient, alpha, None), zero)[0][2])
            empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (gradient, alpha, metrics), _ = jax.lax.scan(
                solve, (gradient, alpha, empty), jnp.arange(solves, dtype=jnp.int32)
            )
        if solves < units:
            rest, parts = recipe.shards.all_reduce(
                sum_over(partial(cached, alpha.alpha), range(solves, units))
            )
            gradient = tree.add(gradient, rest)
            metrics = {"nft/loss": parts["policy_loss"], "nft/kl": parts["kl"]} | metrics
        state, more = finish(recipe, optimizer, state, gradient, alpha)
        return state, metrics | more | {
            "harmonize/alpha": alpha.alpha,
            "harmonize/alpha_age": alpha.age,
            "harmonize/refreshed": jnp.asarray(float(solves > 0)),
        }

    return step
