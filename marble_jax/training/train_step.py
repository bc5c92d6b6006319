"""One optimiser step: per-reward gradients, their common update, the three policies.

`exact` takes every reward's gradient over the whole batch and solves for alpha at every step. `amortized` does so every
`refresh_every` steps and in between runs one backward pass on `sum_k w_k loss_k`, with w_k = alpha_k mean|g| / |g_k|
from the last solve, which is the same update rule with older coefficients. `marble_jax.training.upstream_step` is upstream's
variant. Each is one compiled program for all steps.

The rows of the objective are the K rewards and, when advantages are scalarized, one more: the single advantage that is
trained on. Its per-reward companions then cost nothing and show what it does to each reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.distributed.device_mesh import SINGLE_DEVICE, Shards
from marble_jax.flow.policy_sampler import PolicyVelocity
from marble_jax.harmonize import alpha_state, diagnostics, reward_gradients
from marble_jax.harmonize.balancers import Balancer
from marble_jax.objectives.nft import optimality
from marble_jax.trainable import averaging
from marble_jax.training.micro_batches import (
    RolloutBatch,
    micro_step,
    num_micro_steps,
    schedule,
    sum_over,
)
from marble_jax.training.state import TrainState
from marble_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an optimiser step does, fixed for a run.

    Attributes:
      sigmas: the rollout solver's noise levels without the trailing zero.
      num_timesteps: timesteps trained on per image.
      micro_batch: samples a micro-step.
      chunk: samples whose per-sample gradients are held at once.
      anchor_every: exact steps take the terms that do not depend on advantages at every such micro-step.
      num_rewards: K.
      scalarized: whether row K is the single advantage that is trained on.
      nft_beta, kl_weight, clip: the objective's constants.
      balancer: from Gram matrix to weights.
      rho: weight of the old alpha in its running average.
      smooth: whether a solve's update uses the running average instead of the fresh alpha.
      old_schedule: decay of the rollout policy as a function of the step.
      ema_decay: decay of the averaged adapter.
      shards: the devices that share the samples of a micro-step.
    """

    sigmas: tuple[float, ...]
    num_timesteps: int
    micro_batch: int
    chunk: int
    anchor_every: int
    num_rewards: int
    scalarized: bool
    nft_beta: float
    kl_weight: float
    clip: float
    balancer: Balancer
    rho: float
    smooth: bool
    old_schedule: Callable[[jax.Array], jax.Array]
    ema_decay: float
    shards: Shards = SINGLE_DEVICE


Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Params, RolloutBatch], tuple[TrainState, Metrics]]


def finish(
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: Any,
    alpha: alpha_state.AlphaState,
    balancer: Any = None,
) -> tuple[TrainState, Metrics]:
    """Clips, steps the optimiser and moves the averaged and the rollout policy.

    A non-finite gradient leaves everything as it was and is reported; the step counts all the same.

    Args:
      recipe: constants.
      optimizer: steps `state.current`.
      state: before the step.
      gradient: of the whole step.
      alpha: after this step's solve, if there was one.
      balancer: the balancer's state after it; None leaves that as it is.
    """
    norm = tree.norm(gradient)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.current)
    step = state.step + 1

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    current = keep(optax.apply_updates(state.current, updates), state.current)
    ema_decay = averaging.ema_decay(step, recipe.ema_decay)
    old_decay = recipe.old_schedule(step)
    new = state.replace(
        step=step,
        current=current,
        opt_state=keep(opt_state, state.opt_state),
        alpha=alpha_state.advance(keep(alpha, state.alpha)),
        balancer=state.balancer if balancer is None else keep(balancer, state.balancer),
        ema=keep(averaging.soft_update(state.ema, current, ema_decay), state.ema),
        old=keep(averaging.soft_update(state.old, current, old_decay), state.old),
    )
    return new, {
        "training/grad_norm": norm,
        "training/skipped": 1.0 - finite,
        "ema/decay": ema_decay,
        "rollout_policy/decay": old_decay,
    }


def exact_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation
) -> Step:
    """The step that takes every reward's gradient over the whole batch and solves for alpha."""
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
        anchored = range(0, units, recipe.anchor_every)

        def body(anchors: bool, index: jax.Array) -> reward_gradients.RewardSums:
            flow, advantages, valid = micro_step(
                velocity,
                params,
                state.old,
                batch,
                plan,
                index,
                anchors and recipe.kl_weight > 0,
                recipe.shards,
            )
            return recipe.shards.map_shards(
                lambda flow, advantages, valid: reward_gradients.accumulate(
                    partial(velocity, params),
                    state.current,
                    flow,
                    optimality(advantages, recipe.clip),
                    valid,
                    nft_beta=recipe.nft_beta,
                    clip=recipe.clip,
                    chunk_size=recipe.chunk // recipe.shards.count,
                    anchors=anchors,
                    anchor_scale=units / len(anchored),
                ),
                flow,
                advantages,
                valid,
            )

        sums = sum_over(partial(body, True), anchored)
        if len(anchored) < units:
            sums = tree.add(
                sums, sum_over(partial(body, False), sorted(set(range(units)) - set(anchored)))
            )
        sums = recipe.shards.all_reduce(sums)
        mean = reward_gradients.mean_gradients(sums)
        gram = tree.gram(mean.gradients)
        own = gram[:rewards, :rewards]
        solution = recipe.balancer(own, sums.counts[:rewards] > 0, state.balancer)
        alpha = alpha_state.refresh(
            state.alpha, solution.alpha, solution.scale, recipe.rho, solution.used
        )
        weights = solution.weights
        if recipe.smooth:
            weights = alpha_state.present_alpha(alpha, solution.used) * solution.scale
        if recipe.scalarized:
            weights = jnp.concatenate([jnp.zeros(rewards), jnp.ones(1)])
        update = tree.weighted_sum(weights, mean.gradients)
        total = tree.add(update, tree.scale(mean.kl_gradient, recipe.kl_weight))
        state, metrics = finish(recipe, optimizer, state, total, alpha, solution.state)
        padded = jnp.pad(alpha.alpha, (0, len(gram) - rewards))
        look = diagnostics.from_gram(gram, weights, jnp.arange(len(gram)) < rewards, padded)
        look |= {
            "harmonize/cos_update": look["harmonize/cos_update"][:rewards],
            "harmonize/cos_pair": look["harmonize/cos_pair"][:rewards, :rewards],
        }
        metrics |= {
            "nft/loss": jnp.sum(jnp.where(weights != 0, weights * mean.losses, 0.0)),
            "nft/kl": mean.kl,
            "nft/loss_per_reward": mean.losses[:rewards],
            "harmonize/alpha": alpha.alpha,
            "harmonize/alpha_solved": solution.alpha,
            "harmonize/grad_norm": solution.norms,
            "harmonize/refreshed": jnp.ones(()),
            "harmonize/alpha_age": alpha.age,
            "harmonize/min_norm": solution.min_norm,
            "harmonize/kkt_residual": solution.kkt_residual,
        } | look
        return state, metrics

    return step


def amortized_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation
) -> Step:
    """The step in between solves: one backward pass with the cached coefficients."""
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
        counts = jnp.sum(batch.valid, axis=0) * recipe.num_timesteps
        total = batch.x0.shape[0] * recipe.num_timesteps
        weights = alpha_state.present_weights(state.alpha, counts[:rewards] > 0)
        if recipe.scalarized:
            weights = jnp.concatenate([jnp.zeros(rewards), jnp.ones(1)])

        def body(index: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            flow, advantages, valid = micro_step(
                velocity, params, state.old, batch, plan, index, recipe.kl_weight > 0, recipe.shards
            )
            positive, negative = reward_gradients.branch_weights(
                weights, optimality(advantages, recipe.clip), valid, counts
            )
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
                    num_samples=total,
                ),
                flow,
                positive,
                negative,
            )

        gradient, parts = recipe.shards.all_reduce(sum_over(body, range(num_micro_steps(plan))))
        state, metrics = finish(recipe, optimizer, state, gradient, state.alpha)
        return state, metrics | {
            "nft/loss": parts["policy_loss"],
            "nft/kl": parts["kl"],
            "harmonize/alpha": state.alpha.alpha,
            "harmonize/refreshed": jnp.zeros(()),
            "harmonize/alpha_age": state.alpha.age,
        }

    return step
