"""Advantage-weighted matching: the flow-matching loss as a stand-in for a sample's log-probability.

The clean latents of a rollout are noised anew, and minus the weighted error of the predicted velocity takes the place
of the log-probability in a policy gradient with one update a rollout. Rollouts may use any solver, and nothing but
clean latents is kept. Samples are not weighed by a ratio: they are to be those of the policy that is trained, or of one
that a pull keeps it near.

Source: advantage-weighted matching (arXiv 2509.25050), whose released code weighs errors as `weighted_error` does.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.config import Settings
from marble_jax.errors import InputError
from marble_jax.flow.path import expand, interpolate, sample_mean
from marble_jax.objectives.advantage_shape import ADVANTAGE_CLIP
from marble_jax.objectives.base import (
    Directions,
    Draws,
    FlowBatch,
    FrozenPolicies,
    Objective,
)
from marble_jax.objectives.registry import register_objective
from marble_jax.objectives.velocity_distance import sample_kl, velocity_divergence, wide

ROOT_FLOOR = 1e-10
"""Added to an error before a root is taken of it."""


@flax.struct.dataclass
class MatchingBatch(FlowBatch):
    """Noised rollout latents.

    Attributes:
      target: [n, *latent] velocity of the straight path, noise minus clean latents.
      v_rollout: [n, *latent] velocity of the rollout policy at `xt`; None without a pull towards it.
      v_base: [n, *latent] velocity of the base model at `xt`; None leaves the divergence out.
    """

    target: jax.Array
    v_rollout: jax.Array | None = None
    v_base: jax.Array | None = None


@flax.struct.dataclass
class MatchingStatistics:
    """Numbers of n samples, [n] each.

    Attributes:
      error: weighted mean squared error, which stands in for minus the log-probability.
      gap: mean squared distance from the rollout policy's velocity; None without a pull towards it.
    """

    error: jax.Array
    gap: jax.Array | None = None


ROOT_WEIGHTINGS = ("huber", "sigma_huber")
"""Weightings that take a power of the error."""


def weighted_error(
    error: Float[Array, " n"], sigma: Float[Array, " n"], weighting: str, power: float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """A sample's weighted mean squared error, and its derivative in that error.

    Args:
      error: mean squared error, >= 0.
      sigma: noise level, in (0, 1].
      weighting: "uniform"; "sigma" and "sigma_squared", times the level or its square; "huber", the power of the error
        over the power; "sigma_huber", times the level as well.
      power: of the last two, in (0, 1].
    """
    factor = {
        "uniform": jnp.ones_like(sigma),
        "sigma": sigma,
        "sigma_squared": jnp.square(sigma),
        "huber": jnp.ones_like(sigma),
        "sigma_huber": sigma,
    }[weighting]
    if weighting not in ROOT_WEIGHTINGS:
        return factor * error, factor
    base = error + ROOT_FLOOR
    value = (base**power - ROOT_FLOOR**power) / power
    return factor * value, factor * base ** (power - 1.0)


@dataclasses.dataclass(frozen=True)
class AdvantageWeightedMatching(Objective):
    """`mean_n A / A_max w(|v - target|^2) + rollout_weight |v - v_rollout|^2 + kl_weight |v - v_base|^2`.

    Attributes:
      weighting: of a sample's error; see `weighted_error`.
      power: of the huber weightings, in (0, 1].
      advantage_clip: the largest advantage that counts, > 0 (`A_max`).
      rollout_weight: weight of the squared distance to the rollout policy's velocity, >= 0.
      kl_weight: weight of the squared distance to the base model's velocity, >= 0.
    """

    weighting: str = "sigma_huber"
    power: float = 0.25
    advantage_clip: float = ADVANTAGE_CLIP
    rollout_weight: float = 0.0
    kl_weight: float = 0.0

    @property
    def num_anchors(self) -> int:
        """See `Objective.num_anchors`."""
        return int(self.rollout_weight > 0)

    @property
    def rollout_passes(self) -> int:
        """See `Objective.rollout_passes`."""
        return int(self.rollout_weight > 0)

    def prepare(self, draws: Draws, policies: FrozenPolicies, divergence: bool) -> MatchingBatch:
        """Noises clean latents; see `Objective.prepare`."""
        x0, sigma = draws.kept, draws.sigma
        noise = jax.random.normal(draws.key, x0.shape)
        batch = MatchingBatch(interpolate(x0, noise, sigma), sigma, draws.cond, noise - x0)
        at = (batch.xt, batch.sigma, batch.cond)
        if self.rollout_weight > 0:
            batch = dataclasses.replace(batch, v_rollout=policies.rollout(*at))
        if divergence and self.kl_weight > 0:
            batch = dataclasses.replace(batch, v_base=policies.base(*at))
        return batch

    def directions(
        self, prediction: Float[Array, " n *latent"], batch: MatchingBatch
    ) -> Directions:
        """The weighted error's cotangent as the signal; the pull to the rollout policy as an anchor."""
        away = wide(prediction) - batch.target
        error = sample_mean(jnp.square(away))
        value, slope = weighted_error(error, batch.sigma, self.weighting, self.power)
        # Derivative of a mean of squares over the elements.
        per_element = 2.0 / prediction[0].size
        signal = expand(per_element * slope, away) * away
        anchors: tuple[jax.Array, ...] = ()
        gap = None
        if batch.v_rollout is not None:
            apart = wide(prediction) - batch.v_rollout
            anchors = (self.rollout_weight * per_element * apart,)
            gap = sample_kl(prediction, batch.v_rollout)
        divergence = velocity_divergence(prediction, batch.v_base)
        return Directions(
            signals=(signal,),
            anchors=anchors,
            statistics=MatchingStatistics(value, gap),
            kl=divergence,
            gap=gap,
        )

    def mix(
        self,
        advantages: Float[Array, "n k"],
        statistics: MatchingStatistics,
        valid: Bool[Array, "n k"],
    ) -> Float[Array, "n k j"]:
        """`A / A_max` of the signal and 1 of the anchor, if there is one; see `Objective.mix`."""
        signal = self._weights(advantages)
        if statistics.gap is None:
            return signal[..., None]
        return jnp.stack([signal, jnp.ones_like(signal)], axis=-1)

    def losses(
        self, advantages: Float[Array, "n k"], statistics: MatchingStatistics
    ) -> Float[Array, "n k"]:
        """The loss of every sample without the divergence; see `Objective.losses`."""
        loss = self._weights(advantages) * statistics.error[:, None]
        if statistics.gap is not None:
            loss = loss + self.rollout_weight * statistics.gap[:, None]
        return loss

    def _weights(self, advantages: Float[Array, "n k"]) -> Float[Array, "n k"]:
        clipped = jnp.clip(advantages, -self.advantage_clip, self.advantage_clip)
        return clipped / self.advantage_clip


def from_settings(settings: Settings) -> AdvantageWeightedMatching:
    """Advantage-weighted matching of a run: its own section, and the clip of advantages.

    Raises:
      InputError: several updates a rollout, of which the later ones would need a ratio; a rollout policy that lags
        behind without a pull towards it, or a pull towards one that does not.
    """
    section = settings.awm
    updates = settings.training.updates_per_rollout
    schedule = settings.rollout_policy.schedule
    if updates != 1:
        raise InputError(
            "training.updates_per_rollout: expected 1 with objective.name=awm, which has no ratio to the policy that "
            f"sampled; received {updates}"
        )
    if section.rollout_weight == 0 and schedule != "copy":
        raise InputError(
            "rollout_policy.schedule: expected 'copy' with objective.name=awm, which has no ratio to a policy some "
            f"steps old (awm.rollout_weight above 0 pulls towards it instead); received {schedule!r}"
        )
    if section.rollout_weight > 0 and schedule == "copy":
        raise InputError(
            "awm.rollout_weight: expected 0 with rollout_policy.schedule=copy, whose policy is the trained one, so "
            f"that nothing pulls; received {section.rollout_weight}"
        )
    return AdvantageWeightedMatching(
        weighting=section.weighting,
        power=section.power,
        advantage_clip=settings.advantages.clip,
        rollout_weight=section.rollout_weight,
        kl_weight=section.kl_weight,
    )


register_objective("awm", from_settings)
