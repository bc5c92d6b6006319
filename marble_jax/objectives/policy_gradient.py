"""Policy gradients at the noisy steps of a rollout, of every reward from one pull-back.

A rollout with a stochastic solver takes steps with a density. The loss of reward k at a step is a function of its
advantage and of one number that all rewards share, the logarithm of the ratio of the trained policy's density to that
of the policy that sampled the step. Its derivative in the velocity is therefore one cotangent a sample, times a weight
for every reward: clip and masks change the weights, and the K gradients stay exact.

Two forms of the ratio:

* `ppo`: the log-probabilities' difference, means over elements. Source: Flow-GRPO (arXiv 2505.05470); without the
  constants for `cps` (arXiv 2509.05952).
* `guard`: `mean(eps (m - m_rollout))`, with the noise eps that was drawn and the means m of both policies, and the loss
  divided by the length of the step. It has mean 0 wherever the policies are, and all steps weigh about the same.
  Source: GRPO-Guard (arXiv 2510.22319), for each sample by itself.

With one update for each rollout the trained policy is the one that sampled: samples weigh as at a ratio of 1, nothing
can be clipped, and the rollout policy is not asked. In the first of several updates samples weigh in the same way.
Whether training and sampling then agree shows in the ratio on record, which is measured: where the trained policy is
the one that sampled, it is that of a step's density now to that when it was sampled, whatever the form and the weights.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.config import Settings
from marble_jax.errors import InputError
from marble_jax.flow.path import expand, sample_mean
from marble_jax.flow.trajectory import Transition, log_density, step_mean
from marble_jax.objectives.advantage_shape import ADVANTAGE_CLIP
from marble_jax.objectives.base import (
    Directions,
    Divergence,
    Draws,
    FlowBatch,
    FrozenPolicies,
    Kept,
    Objective,
    SolverSteps,
)
from marble_jax.objectives.registry import register_objective
from marble_jax.objectives.velocity_distance import wide


@flax.struct.dataclass
class StepBatch(FlowBatch):
    """Steps of rollouts: `xt` is the state before a step.

    Attributes:
      after: float32 [n, *latent] the state behind the step.
      steps: coefficients of the steps.
      sampled_log_prob: float32 [n] log-probability of the step when it was sampled.
      is_sampler: bool [n], whether the trained policy is the one that sampled; the same for all samples.
      v_rollout: [n, *latent] velocity of the rollout policy at `xt`; None where it is not needed.
      v_base: [n, *latent] velocity of the base model at `xt`; None leaves the divergence out.
    """

    after: jax.Array
    steps: SolverSteps
    sampled_log_prob: jax.Array
    is_sampler: jax.Array
    v_rollout: jax.Array | None = None
    v_base: jax.Array | None = None


@flax.struct.dataclass
class StepStatistics:
    """Numbers of n steps, [n] each.

    Attributes:
      log_ratio: logarithm of the ratio that samples weigh by, trained policy over rollout policy; 0 where they are one.
      measured: the same as it is measured, rounding included; on policy the change of the log-probability.
      recorded: of the ratio on record: the change of the log-probability where the policies are one, `measured`
        elsewhere.
      scale: factor of the loss.
      log_prob_change: the step's log-probability minus that when it was sampled.
      step_kl: divergence of the step from the rollout policy's, or an estimate of it, in nats an element; None on
        policy, where it is 0.
    """

    log_ratio: jax.Array
    measured: jax.Array
    recorded: jax.Array
    scale: jax.Array
    log_prob_change: jax.Array
    step_kl: jax.Array | None = None


def step_batch(draws: Draws, policies: FrozenPolicies) -> StepBatch:
    """The step that each sample draws, without other velocities at it."""
    kept: Transition = draws.kept
    assert draws.steps is not None
    return StepBatch(
        xt=kept.before,
        sigma=draws.sigma,
        cond=draws.cond,
        after=kept.after,
        steps=draws.steps,
        sampled_log_prob=kept.log_prob,
        is_sampler=jnp.broadcast_to(policies.is_trained, draws.sigma.shape),
    )


def _mean_of(velocity: Float[Array, " n *latent"], batch: StepBatch) -> Float[Array, " n *latent"]:
    """Mean of every step under the policy with this velocity."""
    steps = batch.steps
    return step_mean(batch.xt, wide(velocity), steps.sigma, steps.state, steps.current)


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Objective):
    """Clipped policy gradient `mean_n scale max(-A rho, -A clip(rho, 1 +- clip_range)) + kl_weight KL`.

    Attributes:
      form: of the ratio: "ppo" or "guard".
      has_density: whether log-probabilities have scale and constants; not those of the solver "cps".
      on_policy: whether every rollout has one update, so that samples weigh as at a ratio of 1.
      clip_range: the ratio counts within 1 +- clip_range, > 0; 0 clips nothing.
      advantage_clip: the largest advantage that counts, > 0 (`A_max`).
      kl_weight: weight of the divergence of a step's mean from the base model's, >= 0.
    """

    form: str = "ppo"
    has_density: bool = True
    on_policy: bool = True
    clip_range: float = 0.0
    advantage_clip: float = ADVANTAGE_CLIP
    kl_weight: float = 0.0

    keeps: ClassVar[Kept] = Kept.TRANSITIONS

    @property
    def _asks_rollout_policy(self) -> bool:
        return self.form == "guard" and not self.on_policy

    @property
    def num_anchors(self) -> int:
        """See `Objective.num_anchors`."""
        return 0

    @property
    def rollout_passes(self) -> int:
        """See `Objective.rollout_passes`."""
        return int(self._asks_rollout_policy)

    @property
    def reports(self) -> tuple[str, ...]:
        """See `Objective.reports`."""
        always = ("ratio", "outside_clip_range", "log_prob_gap")
        return always if self.on_policy else (*always, "step_kl")

    @property
    def first_reports(self) -> tuple[str, ...]:
        """See `Objective.first_reports`: there the policy is the one that sampled, and the ratio 1."""
        return ("ratio", "log_prob_gap")

    @property
    def clips(self) -> bool:
        """See `Objective.clips`."""
        return self.clip_range > 0

    def prepare(self, draws: Draws, policies: FrozenPolicies, divergence: bool) -> StepBatch:
        """The steps of a rollout; see `Objective.prepare`."""
        batch = step_batch(draws, policies)
        at = (batch.xt, batch.sigma, batch.cond)
        if self._asks_rollout_policy:
            batch = dataclasses.replace(batch, v_rollout=policies.rollout(*at))
        if divergence and self.kl_weight > 0:
            batch = dataclasses.replace(batch, v_base=policies.base(*at))
        return batch

    def directions(self, prediction: Float[Array, " n *latent"], batch: StepBatch) -> Directions:
        """The log-ratio's cotangent as the one signal; see `Objective.directions`."""
        steps = batch.steps
        mean = _mean_of(prediction, batch)
        error = batch.after - mean
        log_prob = log_density(error, steps.noise, self.has_density)
        change = log_prob - batch.sampled_log_prob
        # How the mean follows the velocity, over the elements that a log-ratio averages over.
        slope = -steps.current * steps.sigma / prediction[0].size
        if self.form == "guard":
            signal, log_ratio = self._guarded(mean, error, slope, batch)
            scale = 1.0 / steps.length
        else:
            signal = expand(self._density_slope(slope, steps), error) * error
            log_ratio = change
            scale = jnp.ones_like(log_prob)
        step_kl = None
        # The policy that samples is the one that is trained; what rounding makes of that, the record tells.
        if self.on_policy:
            measured, recorded, log_ratio = change, change, jnp.zeros_like(log_ratio)
        else:
            # So it is in the first of several updates, where rounding alone would bring some ratios to the clip.
            measured, log_ratio = log_ratio, jnp.where(batch.is_sampler, 0.0, log_ratio)
            # Guard's own compares two velocities of training: of one policy it is 1, however the step was sampled.
            recorded = jnp.where(batch.is_sampler, change, measured)
            step_kl = self._step_kl(mean, change, batch)
        return Directions(
            signals=(signal,),
            anchors=(),
            statistics=StepStatistics(log_ratio, measured, recorded, scale, change, step_kl),
            kl=_divergence(mean, slope, batch),
        )

    def _step_kl(
        self, mean: Float[Array, " n *latent"], change: Float[Array, " n"], batch: StepBatch
    ) -> Float[Array, " n"]:
        """Divergence of the rollout policy's step from that of the trained policy, in nats an element.

        It is `mean |m - m_rollout|^2 / (2 s^2)` where the rollout policy is asked. Elsewhere it is minus the mean
        log-ratio, whose expectation that is over the steps of the rollout policy; one sample's may be below 0.
        """
        variance = jnp.square(batch.steps.noise)
        if batch.v_rollout is not None:
            away = mean - _mean_of(batch.v_rollout, batch)
            return sample_mean(jnp.square(away)) / (2.0 * variance)
        if self.has_density:
            return -change
        # Without a scale, log-probabilities are not in nats.
        return -change / (2.0 * variance)

    def _density_slope(self, slope: Float[Array, " n"], steps: SolverSteps) -> Float[Array, " n"]:
        """Derivative of the log-probability in the velocity, for each unit of the step's error."""
        if self.has_density:
            return slope / jnp.square(steps.noise)
        return 2.0 * slope

    def _guarded(
        self,
        mean: Float[Array, " n *latent"],
        error: Float[Array, " n *latent"],
        slope: Float[Array, " n"],
        batch: StepBatch,
    ) -> tuple[Float[Array, " n *latent"], Float[Array, " n"]]:
        """Cotangent and value of `mean(eps (m - m_rollout))`, eps being what was drawn."""
        std = expand(batch.steps.noise, mean)
        if batch.v_rollout is None:
            return expand(slope, mean) * error / std, jnp.zeros(len(mean))
        mean_of_rollout = _mean_of(batch.v_rollout, batch)
        drawn = (batch.after - mean_of_rollout) / std
        return expand(slope, mean) * drawn, sample_mean(drawn * (mean - mean_of_rollout))

    def mix(
        self, advantages: Float[Array, "n k"], statistics: StepStatistics, valid: Bool[Array, "n k"]
    ) -> Float[Array, "n k 1"]:
        """`-A rho scale`, 0 where the clip holds the ratio; see `Objective.mix`."""
        clipped = self._clipped(advantages)
        ratio = jnp.exp(statistics.log_ratio)[:, None]
        weights = -clipped * ratio * statistics.scale[:, None]
        if self.clips:
            weights = jnp.where(self.held_by_clip(advantages, statistics), 0.0, weights)
        return weights[..., None]

    def held_by_clip(
        self, advantages: Float[Array, "n k"], statistics: StepStatistics
    ) -> Bool[Array, "n k"]:
        """A ratio that has gone the way its advantage asks for, far enough, is asked no further."""
        ratio = jnp.exp(statistics.log_ratio)[:, None]
        above = (advantages > 0) & (ratio > 1.0 + self.clip_range)
        below = (advantages < 0) & (ratio < 1.0 - self.clip_range)
        return above | below

    def losses(
        self, advantages: Float[Array, "n k"], statistics: StepStatistics
    ) -> Float[Array, "n k"]:
        """The clipped loss of every sample; see `Objective.losses`."""
        clipped = self._clipped(advantages)
        ratio = jnp.exp(statistics.log_ratio)[:, None]
        loss = -clipped * ratio
        if self.clips:
            held = jnp.clip(ratio, 1.0 - self.clip_range, 1.0 + self.clip_range)
            loss = jnp.maximum(loss, -clipped * held)
        return loss * statistics.scale[:, None]

    def reported(self, statistics: StepStatistics) -> dict[str, Float[Array, " n"]]:
        """Ratio, whether it is outside the clip's range, log-probability gap and divergence from the rollout policy."""
        # Measured also where nothing is weighed by it; the clip's range is in units of the form's own ratio.
        measured = jnp.exp(statistics.measured)
        outside = jnp.zeros_like(measured)
        if self.clips:
            outside = (jnp.abs(measured - 1.0) > self.clip_range).astype(measured.dtype)
        figures = {
            "ratio": jnp.exp(statistics.recorded),
            "outside_clip_range": outside,
            "log_prob_gap": jnp.abs(statistics.log_prob_change),
        }
        if statistics.step_kl is not None:
            figures["step_kl"] = statistics.step_kl
        return figures

    def _clipped(self, advantages: Float[Array, "n k"]) -> Float[Array, "n k"]:
        return jnp.clip(advantages, -self.advantage_clip, self.advantage_clip)


def _divergence(
    mean: Float[Array, " n *latent"], slope: Float[Array, " n"], batch: StepBatch
) -> Divergence | None:
    """Divergence of the steps' means from the base model's, `mean |m - m_base|^2 / (2 diffusion^2)`.

    Source: Flow-GRPO (arXiv 2505.05470), which divides by the diffusion and not by the noise of the step.
    """
    if batch.v_base is None:
        return None
    away = mean - _mean_of(batch.v_base, batch)
    variance = jnp.square(batch.steps.diffusion)
    cotangent = expand(slope / variance, away) * away
    return Divergence(cotangent, sample_mean(jnp.square(away)) / (2.0 * variance))


def from_settings(settings: Settings) -> PolicyGradient:
    """The objective of a run: its own section, the clip of advantages, and how its rollouts are made.

    Raises:
      InputError: a clip that can never hold, as every rollout has one update.
    """
    section = settings.policy_gradient
    updates = settings.training.updates_per_rollout
    if section.clip_range > 0 and updates == 1:
        raise InputError(
            "policy_gradient.clip_range: expected 0 with training.updates_per_rollout=1, as the policy that is "
            f"trained is the one that sampled and no ratio leaves 1; received {section.clip_range:g}"
        )
    return PolicyGradient(
        form=section.form,
        has_density=settings.rollout.solver != "cps",
        on_policy=updates == 1,
        clip_range=section.clip_range,
        advantage_clip=settings.advantages.clip,
        kl_weight=section.kl_weight,
    )


register_objective("policy_gradient", from_settings)
