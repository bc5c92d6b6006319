"""Upstream's update, reproduced for comparison. All that it does otherwise than ours, in one place.

In this step (`harmonize.mode=upstream`):

1. alpha is solved on single micro-batches: on every one of the first optimiser step, on the first of a refresh step.
2. The other micro-batches train on one combined advantage `sum_k alpha_k A_k`: alpha acts on losses, not on unit
   gradients, so the factor `mean|g| / |g_k|` is lost, and a missing reward counts as advantage 0.
3. A solved micro-batch uses the fresh alpha, the others its running average. The average takes every solve at face
   value: a reward without a valid sample in a micro-batch enters it as 0, and with no gradient at all so do all.
4. The first step solves on all timesteps of a slice of images before it comes to the next slice, so that what the
   average remembers are the last images.
5. Each device averages a reward over its own valid samples, then devices are averaged: samples of a device with few of
   them weigh more, and a device without one counts as gradient 0 (`harmonize.upstream_ranks`, 16 there).
6. Rewards in a group enter as the mean over all members, one without a valid sample as gradient 0, and the group's
   alpha is split evenly among all (`Marble.every_member`).
7. Equal and fixed alpha, and a scalarized advantage, never solve: every micro-batch trains on the combined advantage,
   all samples included.
8. Reward dropout is drawn for every timestep, not once a step.
9. `advantages.mode` and `advantages.r_normalize_mean` act on the combined advantage, the latter over each device's
   samples of a micro-batch, missing ones included.

Beside it (the `upstream` presets, `config.upstream`):

10. Rollouts and evaluations see integer timesteps (`rollout.` and `evaluation.integer_timesteps`).
11. Prompts are drawn anew for every rollout batch, so that one may come twice in a step (`rollout.prompt_draws`), and
    images of equal prompts are one group (`advantages.groups`).
12. OCR and GenEval are scored by other rules (`rewards.upstream_scoring`).
13. The best policy has the highest mean of raw scores, the base model included (`evaluation.best_by`, `.best`).
14. No reward weights: those of the other embedded presets are this project's.

Not reproduced. Numbers: float16 with a loss scaler (its divergence term rounds to 0, which `nft.kl_weight=0` has, too;
gradient elements that overflow are set to 0, and a skipped step still moves averages), images decoded in float16,
latents and text embeddings kept in it, sums in float64, SLSQP instead of an exact solve of the same quadratic program.
Draws: other random numbers; a micro-batch has 9 images of each device's own 72, here any; prompts that CLIP's tokenizer
decodes alike are equal, here those alike but for case and spaces. Evaluation: noise that differs from one to the next,
and a last batch that is dropped; its script beside the training encodes 256 tokens and scores JPEG files. Resume: there
from averaged weights, with other random numbers and no best score. Switches that both of its configurations leave off:
scores divided by their running mean, which changes what a weighted sum weighs, and an advantage by its epsilon alone; a
warm-up rate of the average; an offset of the rollout policy's decay; weights and caps of prompt sources; one image a
prompt.

Source: the released code of MARBLE (arXiv 2605.06507).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.harmonize import alpha_state, diagnostics
from marble_jax.harmonize.balancers import Fixed
from marble_jax.harmonize.reward_sums import mean_gradients
from marble_jax.training.micro_batches import MicroBatch, RolloutBatch, sum_over
from marble_jax.training.policy_update import Metrics, Step, apply_update
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import MicroBatches, solution_metrics
from marble_jax.training.upstream_rules import PLAIN_RULES, UpstreamRules, WeightedSamples
from marble_jax.types import Adapter, Params, PolicyVelocity

Carry = tuple[Adapter, alpha_state.AlphaState, Metrics]
"""Gradient so far, alpha, and the numbers of the last solve."""


def upstream_step(
    recipe: Recipe,
    velocity: PolicyVelocity,
    optimizer: optax.GradientTransformation,
    solved: str,
    rules: UpstreamRules = PLAIN_RULES,
) -> Step:
    """One optimiser step as upstream takes it.

    Args:
      recipe: what a step does; `harmonization.smooth` is ignored.
      velocity: the policy.
      optimizer: of the adapter.
      solved: which micro-batches solve for alpha: "all", "first" or "none"; none unless the recipe `solves`.
      rules: what is done to the samples of a micro-batch.
    """
    balancer = recipe.harmonization.balancer
    if not solves(recipe):
        solved = "none"
    # Without a weight for every sample, the objective stays as it is.
    if rules.ranks > 1:
        objective = recipe.objective
        weighted = WeightedSamples(objective, objective.kl_weight)
        recipe = dataclasses.replace(recipe, objective=weighted)

    def step(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        parts = MicroBatches(recipe, velocity, state, params, batch)
        num_solves = {"all": parts.count, "first": 1, "none": 0}[solved]
        gradient, alpha = tree.zeros_like(state.current), state.alpha
        if isinstance(balancer, Fixed):
            alpha = _fixed_alpha(balancer, alpha)
        sampled = _Sampled(recipe, parts, state, rules)
        metrics: Metrics = {}
        if num_solves:
            gradient, alpha, metrics = _solved_part(recipe, parts, sampled, state, num_solves)
        if num_solves < parts.count:
            combined, losses = _combined_part(recipe, parts, sampled, alpha.alpha, num_solves)
            gradient = tree.add(gradient, combined)
            # The numbers of a solve are the fuller ones where both are there.
            metrics = {
                "objective/loss": losses["policy_loss"],
                "objective/kl": losses["kl"],
                **losses["records"].metrics(),
            } | metrics
        state, update_metrics = apply_update(recipe.averages, optimizer, state, gradient, alpha)
        return state, metrics | update_metrics | sampled.metrics(batch) | {
            "harmonize/alpha": alpha.alpha,
            "harmonize/alpha_age": alpha.age,
            "harmonize/refreshed": jnp.asarray(float(num_solves > 0)),
        }

    return step


def solves(recipe: Recipe) -> bool:
    """Whether alpha is solved for at all: not under a scalarized advantage, nor where it is fixed."""
    harmonization = recipe.harmonization
    return not harmonization.scalarized and not isinstance(harmonization.balancer, Fixed)


def _fixed_alpha(balancer: Fixed, alpha: alpha_state.AlphaState) -> alpha_state.AlphaState:
    """The state of an alpha that never changes: a reward without a valid sample keeps its share, too."""
    num_rewards = len(alpha.alpha)
    shares = jnp.asarray(balancer.alpha or (1.0 / num_rewards,) * num_rewards, jnp.float32)
    return dataclasses.replace(
        alpha, alpha=shares, scale=jnp.ones_like(shares), solved=jnp.ones_like(alpha.solved)
    )


class _Sampled:
    """Micro-batches of the step under upstream's rules, in the order in which it takes them.

    Args:
      recipe: what the step does.
      parts: its micro-batches.
      state: before the step.
      rules: what is done to their samples.
    """

    def __init__(
        self, recipe: Recipe, parts: MicroBatches, state: TrainState, rules: UpstreamRules
    ):
        self._parts, self._rules = parts, rules
        self._rewards = recipe.harmonization.num_rewards
        self._scalarized = recipe.harmonization.scalarized
        self._num_timesteps = recipe.timesteps.num_trained
        self._num_slices = parts.count // self._num_timesteps
        self._key, self._step = jax.random.wrap_key_data(state.key), state.step

    def in_order(self, count: int) -> jax.Array:
        """The first `count` micro-batches: all timesteps of a slice of images, then the next slice."""
        turn = jnp.arange(count, dtype=jnp.int32)
        part, time = turn // self._num_timesteps, turn % self._num_timesteps
        return time * self._num_slices + part

    def at(self, index: jax.Array) -> MicroBatch:
        """Micro-batch `index` of the rewards alone, without what dropout takes away; advantages are not shaped."""
        part = self._parts.at(index)
        # What lies behind the rewards, a scalarized advantage, is not one of them.
        valid = self._kept(part.valid, index // self._num_slices)
        advantages = jnp.where(valid, part.advantages[:, : self._rewards], 0.0)
        return MicroBatch(part.samples, advantages, valid)

    def solving_at(self, index: jax.Array) -> MicroBatch:
        """Micro-batch `index` as every reward's own loss sees it."""
        part = self.at(index)
        samples = part.samples
        if self._rules.ranks > 1:
            samples = samples.replace(weights=self._rules.rank_weights(part.valid))
        shaped = self._rules.shaped(part.advantages, part.valid)
        return MicroBatch(samples, shaped, part.valid)

    def combined_at(self, index: jax.Array, alpha: jax.Array) -> MicroBatch:
        """Micro-batch `index` with one advantage, combined or scalarized, under which every sample is valid."""
        # A missing advantage is 0 and counts: every sample is valid under the combined one.
        if self._scalarized:
            part = self._parts.at(index)
            combined = part.advantages[:, self._rewards :]
        else:
            part = self.at(index)
            combined = (part.advantages @ alpha)[:, None]
        everything = jnp.ones(combined.shape, bool)
        return MicroBatch(part.samples, self._rules.shaped(combined, everything), everything)

    def metrics(self, batch: RolloutBatch) -> Metrics:
        """Share of each reward's scores that dropout takes away, over the step; empty without dropout."""
        if self._rules.dropout is None:
            return {}
        timesteps = jnp.arange(self._num_timesteps, dtype=jnp.int32)
        valid = batch.valid[:, : self._rewards]
        kept = jax.vmap(lambda timestep: self._kept(batch.valid, timestep))(timesteps)
        ignored = jnp.mean(jnp.sum(valid & ~kept, axis=1), axis=0)
        return {"advantages/ignored_share": ignored / jnp.maximum(jnp.sum(valid, axis=0), 1)}

    def _kept(self, valid: jax.Array, timestep: jax.Array) -> jax.Array:
        """[n, K] scores that are trained on at a timestep."""
        return self._rules.kept(valid[:, : self._rewards], self._key, self._step, timestep)


def _solved_part(
    recipe: Recipe, parts: MicroBatches, sampled: _Sampled, state: TrainState, num_solves: int
) -> Carry:
    """The first micro-batches, each with an alpha of its own."""
    harmonization, rewards = recipe.harmonization, recipe.harmonization.num_rewards

    def solve(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        total, alpha, _ = carry
        part = sampled.solving_at(index)
        # Reduced here and not after the loop: alpha is solved on this micro-batch alone.
        sums = parts.all_reduce(parts.reward_sums(part))
        mean = mean_gradients(sums)
        gram = tree.gram(mean.gradients)
        solution = harmonization.balancer(gram, sums.counts > 0, state.balancer)
        alpha = alpha_state.refresh(alpha, solution.alpha, solution.scale, harmonization.rho)
        update = tree.weighted_sum(solution.weights, mean.gradients)
        combined = tree.add(update, tree.scale(mean.kl_gradient, recipe.objective.kl_weight))
        everything = jnp.ones(rewards, bool)
        metrics = diagnostics.from_gram(gram, solution.weights, everything, alpha.alpha)
        metrics |= solution_metrics(solution)
        metrics |= {
            "objective/loss": jnp.sum(solution.weights * mean.losses),
            "objective/kl": mean.kl,
            **sums.records.metrics(),
        }
        # Upstream adds up the gradients of micro-batches, each divided by their number.
        total = tree.add(total, tree.scale(combined, 1.0 / parts.count))
        return (total, alpha, metrics), None

    gradient = tree.zeros_like(state.current)
    first = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: solve((gradient, state.alpha, {}), first)[0][2])
    # A scan wants its carry whole from the start; the numbers of the last turn stay.
    no_metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry, _ = jax.lax.scan(
        solve, (gradient, state.alpha, no_metrics), sampled.in_order(num_solves)
    )
    return carry


def _combined_part(
    recipe: Recipe, parts: MicroBatches, sampled: _Sampled, alpha: jax.Array, first: int
) -> tuple[Adapter, dict[str, Any]]:
    """The micro-batches from `first` on, with one combined advantage for all rewards."""
    num_samples = parts.count * recipe.micro_batching.size

    def gradient_at(index: jax.Array) -> tuple[Adapter, dict[str, Any]]:
        combined = sampled.combined_at(index, alpha)
        share = jnp.full(1, 1.0 / num_samples)
        return parts.combined_gradient(combined, share, num_samples)

    return parts.all_reduce(sum_over(gradient_at, range(first, parts.count)))
