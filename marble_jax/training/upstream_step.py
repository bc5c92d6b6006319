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
decodes alike are equal, here those alike but for case and spaces. Rewards: red and blue are swapped there in what the
OCR reader and GenEval's detector see; that detector is mmdetection's own training of Mask2Former, here its authors'
weights as transformers runs them; the reader is PaddleOCR, here RapidOCR unless an entry of `rewards.json` asks for
that; a quoted text of nothing but spaces divides by zero there and is missing here; CLIPScore's images are rounded to
float16 behind their normalisation. Evaluation: noise that differs from one to the next, and a last batch that is
dropped; its script beside the training encodes 256 tokens and scores JPEG files. Resume: there from averaged weights,
with other random numbers and no best score. Switches that both of its configurations leave off: scores divided by their
running mean, which changes what a weighted sum weighs, and an advantage by its epsilon alone; a warm-up rate of the
average; an offset of the rollout policy's decay; weights and caps of prompt sources; one image a prompt.

Source: the released code of MARBLE (arXiv 2605.06507).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.harmonize import alpha_state, diagnostics, history
from marble_jax.harmonize.balancers import Fixed
from marble_jax.harmonize.reward_sums import mean_gradients
from marble_jax.training.micro_batches import MicroBatch, RolloutBatch
from marble_jax.training.policy_update import Metrics, apply_update
from marble_jax.training.recipe import Recipe
from marble_jax.training.staged_step import Bounds, Carry, Earlier, Loop, StagedStep, SumLoop
from marble_jax.training.state import TrainState
from marble_jax.training.step_gradients import MicroBatches, num_micro_batches
from marble_jax.training.train_step import beside_history, solution_metrics
from marble_jax.training.upstream_rules import PLAIN_RULES, UpstreamRules, WeightedSamples
from marble_jax.types import Adapter, Params, PolicyVelocity


def upstream_step(
    recipe: Recipe,
    velocity: PolicyVelocity,
    optimizer: optax.GradientTransformation,
    solved: str,
    rules: UpstreamRules = PLAIN_RULES,
) -> StagedStep:
    """One optimiser step as upstream takes it.

    Args:
      recipe: what a step does; `harmonization.smooth` is ignored.
      velocity: the policy.
      optimizer: of the adapter.
      solved: which micro-batches solve for alpha: "all", "first" or "none"; none unless the recipe `solves`.
      rules: what is done to the samples of a micro-batch.
    """
    if not solves(recipe):
        solved = "none"
    # Without a weight for every sample, the objective stays as it is.
    if rules.ranks > 1:
        objective = recipe.objective
        weighted = WeightedSamples(objective, objective.kl_weight)
        recipe = dataclasses.replace(recipe, objective=weighted)

    def num_solves(num: int) -> int:
        return {"all": num, "first": 1, "none": 0}[solved]

    def open_step(state: TrainState, params: Params, batch: RolloutBatch) -> _Sampled:
        parts = MicroBatches(recipe, velocity, state, params, batch)
        return _Sampled(recipe, parts, rules)

    def loops(num: int) -> tuple[Loop, ...]:
        chosen: list[Loop] = []
        if num_solves(num):
            chosen.append(_SolvingLoop(recipe, num_solves(num)))
        if num_solves(num) < num:
            chosen.append(_combined_loop(recipe, num_solves(num), num))
        return tuple(chosen)

    def finish(sampled: _Sampled, carries: Earlier) -> tuple[TrainState, Metrics]:
        count = sampled.parts.count
        solves_here = num_solves(count) > 0
        solved = _of_solves(recipe, sampled, carries[0] if solves_here else None)
        combined = _CombinedOutcome()
        gradient = solved.gradient
        if num_solves(count) < count:
            combined = _of_combined(sampled, carries[-1])
            gradient = tree.add(gradient, combined.gradient)
        state, update_metrics = apply_update(
            recipe.averages,
            optimizer,
            sampled.state,
            gradient,
            solved.alpha,
            history=solved.past,
        )
        metrics = {
            **combined.metrics,
            # The numbers of a solve are the fuller ones where both are there.
            **solved.metrics,
            **update_metrics,
            **solved.comparison,
            **sampled.metrics(sampled.parts.batch),
            # Of the step, and not of its last solve.
            "harmonize/alpha": solved.alpha.alpha,
            "harmonize/alpha_age": solved.alpha.age,
            "harmonize/refreshed": jnp.asarray(float(solves_here)),
        }
        return state, metrics

    return StagedStep(open_step, partial(num_micro_batches, recipe), loops, finish)


def solves(recipe: Recipe) -> bool:
    """Whether alpha is solved for at all: not under a scalarized advantage, nor where it is fixed."""
    harmonization = recipe.harmonization
    return not harmonization.scalarized and not isinstance(harmonization.balancer, Fixed)


def _first_alpha(recipe: Recipe, state: TrainState) -> alpha_state.AlphaState:
    """The alpha that a step begins with."""
    balancer = recipe.harmonization.balancer
    if isinstance(balancer, Fixed):
        return _fixed_alpha(balancer, state.alpha)
    return state.alpha


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
      rules: what is done to their samples.

    Attributes:
      parts: as given.
      state: before the step.
    """

    def __init__(self, recipe: Recipe, parts: MicroBatches, rules: UpstreamRules):
        self.parts, self.state = parts, parts.state
        self._rules = rules
        self._rewards = recipe.harmonization.num_rewards
        self._scalarized = recipe.harmonization.scalarized
        self._num_timesteps = recipe.timesteps.num_trained
        self._num_slices = parts.count // self._num_timesteps
        self._key, self._step = jax.random.wrap_key_data(self.state.key), self.state.step

    def in_order(self, count: int) -> jax.Array:
        """The first `count` micro-batches: all timesteps of a slice of images, then the next slice."""
        turn = jnp.arange(count, dtype=jnp.int32)
        part, time = turn // self._num_timesteps, turn % self._num_timesteps
        return time * self._num_slices + part

    def at(self, index: jax.Array) -> MicroBatch:
        """Micro-batch `index` of the rewards alone, without what dropout takes away; advantages are not shaped."""
        part = self.parts.at(index)
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
            part = self.parts.at(index)
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


@flax.struct.dataclass
class _Solves:
    """What the solves of a step have come to.

    Attributes:
      gradient: adapter tree, sum of the micro-batches' updates, each over the number of all micro-batches.
      alpha: after the last solve.
      gradients: adapter tree, leaves [K, ...]: every reward's gradient at the last solve, for the history.
      gram: float32 [K, K], their inner products.
      active: bool [K], rewards with a valid sample there.
      metrics: numbers of the last solve.
    """

    gradient: Adapter
    alpha: alpha_state.AlphaState
    gradients: Adapter
    gram: jax.Array
    active: jax.Array
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class _SolveOutcome:
    """What the solves of a step leave, or what it begins with where there is none.

    Attributes:
      gradient: adapter tree, their part of the update.
      alpha: after them.
      metrics: numbers of the last one.
      past: the history with its gradients; None without a solve.
      comparison: how these compare with what the history held before.
    """

    gradient: Adapter
    alpha: alpha_state.AlphaState
    metrics: Metrics = dataclasses.field(default_factory=dict)
    past: history.History | None = None
    comparison: Metrics = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _CombinedOutcome:
    """What the micro-batches under the combined advantage come to; nothing where there is none.

    Attributes:
      gradient: adapter tree, their part of the update.
      metrics: their numbers.
    """

    gradient: Adapter | None = None
    metrics: Metrics = dataclasses.field(default_factory=dict)


def _of_solves(recipe: Recipe, sampled: _Sampled, last: _Solves | None) -> _SolveOutcome:
    """The outcome of a step's solves; None for a step without one."""
    state = sampled.state
    if last is None:
        return _SolveOutcome(tree.zeros_like(state.current), _first_alpha(recipe, state))
    past, comparison = beside_history(
        recipe.harmonization, state, last.gradients, last.gram, last.active
    )
    return _SolveOutcome(last.gradient, last.alpha, last.metrics, past, comparison)


def _of_combined(sampled: _Sampled, carry: Carry) -> _CombinedOutcome:
    """The outcome of the micro-batches under the combined advantage, summed over devices."""
    gradient, losses = sampled.parts.all_reduce(carry)
    metrics = {
        "objective/loss": losses["policy_loss"],
        "objective/kl": losses["kl"],
        **losses["records"].metrics(),
    }
    return _CombinedOutcome(gradient, metrics)


@dataclasses.dataclass(frozen=True)
class _SolvingLoop:
    """The first micro-batches, each with an alpha of its own; see `staged_step.Loop`.

    Attributes:
      recipe: what the step does.
      num: how many they are.
      per_device: nothing is: alpha is solved on all devices' samples.
    """

    recipe: Recipe
    num: int
    per_device: Any = False

    def bounds(self, sampled: _Sampled) -> Bounds:
        """See `Loop.bounds`."""
        return 0, self.num

    def start(self, sampled: _Sampled) -> _Solves:
        """See `Loop.start`."""
        gradient, first = tree.zeros_like(sampled.state.current), jnp.zeros((), jnp.int32)
        alpha = _first_alpha(self.recipe, sampled.state)
        shapes = jax.eval_shape(lambda: self._solve(sampled, gradient, alpha, first))
        # A loop wants its carry whole from the start; what the last turn leaves stays.
        empty: _Solves = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return dataclasses.replace(empty, alpha=alpha)

    def turns(self, sampled: _Sampled, earlier: Earlier, carry: Carry, bounds: Bounds) -> Carry:
        """See `Loop.turns`."""
        order = sampled.in_order(self.num)

        def turn(place: jax.Array, solves: _Solves) -> _Solves:
            return self._solve(sampled, solves.gradient, solves.alpha, order[place])

        return jax.lax.fori_loop(*bounds, turn, carry)

    def whole(self, sampled: _Sampled, earlier: Earlier) -> Carry:
        """See `Loop.whole`."""
        return self.turns(sampled, earlier, self.start(sampled), self.bounds(sampled))

    def _solve(
        self, sampled: _Sampled, total: Adapter, alpha: alpha_state.AlphaState, index: jax.Array
    ) -> _Solves:
        """What the solves have come to after one on micro-batch `index`, from the sum and the alpha before it."""
        recipe, parts, harmonization = self.recipe, sampled.parts, self.recipe.harmonization
        part = sampled.solving_at(index)
        # Reduced here and not after the loop: alpha is solved on this micro-batch alone.
        sums = parts.all_reduce(parts.reward_sums(part))
        mean = mean_gradients(sums)
        gram = tree.gram(mean.gradients)
        active = sums.counts > 0
        solution = harmonization.balancer(gram, active, sampled.state.balancer)
        alpha = alpha_state.refresh(alpha, solution.alpha, solution.scale, harmonization.rho)
        update = tree.weighted_sum(solution.weights, mean.gradients)
        combined = tree.add(update, tree.scale(mean.kl_gradient, recipe.objective.kl_weight))
        everything = jnp.ones(harmonization.num_rewards, bool)
        metrics = diagnostics.from_gram(gram, solution.weights, everything, alpha.alpha)
        metrics |= solution_metrics(solution)
        metrics |= {
            "objective/loss": jnp.sum(solution.weights * mean.losses),
            "objective/kl": mean.kl,
            **sums.records.metrics(),
        }
        # Upstream adds up the gradients of micro-batches, each divided by their number.
        total = tree.add(total, tree.scale(combined, 1.0 / parts.count))
        return _Solves(total, alpha, mean.gradients, gram, active, metrics)


def _combined_loop(recipe: Recipe, first: int, num: int) -> SumLoop:
    """The micro-batches from `first` on, of `num`, with one combined advantage for all rewards."""
    num_samples = num * recipe.micro_batching.size

    def gradients(
        sampled: _Sampled, earlier: Earlier
    ) -> Callable[[jax.Array], tuple[Adapter, dict[str, Any]]]:
        # The solves before it, where there are any, have moved alpha.
        alpha = earlier[0].alpha if earlier else _first_alpha(recipe, sampled.state)

        def gradient(index: jax.Array) -> tuple[Adapter, dict[str, Any]]:
            combined = sampled.combined_at(index, alpha.alpha)
            share = jnp.full(1, 1.0 / num_samples)
            return sampled.parts.combined_gradient(combined, share, num_samples)

        return gradient

    return SumLoop(
        order=lambda _: jnp.arange(num, dtype=jnp.int32),
        places=lambda _: (first, num),
        part=gradients,
    )
