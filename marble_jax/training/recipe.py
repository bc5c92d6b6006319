"""What an optimiser step does, fixed for a run: one small record for each concern, and the objects that act."""

from __future__ import annotations

import dataclasses

from marble_jax.config import (
    AdvantageSettings,
    EmaSettings,
    HarmonizeSettings,
    RolloutPolicySettings,
)
from marble_jax.distributed.device_mesh import SINGLE_DEVICE, Shards
from marble_jax.flow.stochastic import StochasticTable
from marble_jax.harmonize.balancers import Balancer
from marble_jax.objectives.base import Objective
from marble_jax.trainable.averaging import Decay, rollout_decay_of


@dataclasses.dataclass(frozen=True)
class Timesteps:
    """Noise levels that images are trained at.

    Attributes:
      sigmas: the rollout solver's noise levels without the trailing zero.
      num_trained: how many of them every image is trained at.
      stochastic: coefficients of a rollout solver with noise at every step; None for a solver of the ODE.
      window: steps with noise that a rollout keeps, out of which images are trained at; 0 for a solver of the ODE.
      parts: bounds of the parts out of each of which an image is trained at one timestep, see
        `batch_sizes.Sizes.timestep_parts`; empty where it is trained at any.
    """

    sigmas: tuple[float, ...]
    num_trained: int
    stochastic: StochasticTable | None = dataclasses.field(default=None, compare=False)
    window: int = 0
    parts: tuple[int, ...] = ()

    @property
    def num_choices(self) -> int:
        """Timesteps out of which an image's are drawn."""
        return self.window or len(self.sigmas)


@dataclasses.dataclass(frozen=True)
class MicroBatching:
    """How the samples of a step are cut up.

    Attributes:
      size: samples (image, timestep) a micro-batch, over all devices.
      chunk_size: samples whose per-sample gradients are held at once, over all devices.
      shards: the devices that share the samples of a micro-batch.
    """

    size: int
    chunk_size: int
    shards: Shards = SINGLE_DEVICE


@dataclasses.dataclass(frozen=True)
class Harmonization:
    """How K gradients become one update.

    Attributes:
      balancer: from Gram matrix to weights.
      num_rewards: K.
      scalarized: whether a single advantage, objective K, is trained on instead of the K rewards'.
      rho: weight of the old alpha in its running average.
      smooth: whether a solve's update uses the running average instead of the fresh alpha.
      cleaned: whether alpha is solved for on cosines that pairs of steps cleaned of noise.
      window: about how many solves those pairs reach back.
      shrinkage: weight of the step's own cosines among them, in [0, 1].
      unit_signals: whether a cleaned solve takes gradients to be as long as their signals.
      anchor_every: one micro-batch in so many has the terms that do not depend on advantages, at least.
      anchor_error: relative error of the update that more of them are taken for; 0 for no more.
    """

    balancer: Balancer
    num_rewards: int
    scalarized: bool = False
    rho: float = 0.7
    smooth: bool = False
    cleaned: bool = False
    window: float = 10.0
    shrinkage: float = 0.5
    unit_signals: bool = False
    anchor_every: int = 1
    anchor_error: float = 0.0

    @property
    def num_objectives(self) -> int:
        """Columns of advantages: the rewards, and the scalarized one if there is one."""
        return self.num_rewards + self.scalarized


def harmonization_of(
    harmonize: HarmonizeSettings,
    advantages: AdvantageSettings,
    balancer: Balancer,
    num_rewards: int,
) -> Harmonization:
    """How the gradients of a run become one update."""
    return Harmonization(
        balancer=balancer,
        num_rewards=num_rewards,
        scalarized=advantages.scalarized,
        rho=harmonize.rho,
        # Amortized steps reuse the running average, so a solve between them takes the fresh alpha.
        smooth=harmonize.mode == "exact" and harmonize.smooth_exact,
        cleaned=harmonize.gram == "cleaned",
        window=harmonize.window,
        shrinkage=harmonize.shrinkage,
        unit_signals=harmonize.unit == "signal",
        anchor_every=harmonize.anchor_every,
        anchor_error=harmonize.anchor_error,
    )


@dataclasses.dataclass(frozen=True)
class PolicyAverages:
    """How the other policies follow the trained one.

    Attributes:
      rollout_decay: decay of the rollout policy as a function of the optimiser step.
      ema_decay: decay of the averaged adapter, in [0, 1).
    """

    rollout_decay: Decay
    ema_decay: float


def averages_of(rollout_policy: RolloutPolicySettings, ema: EmaSettings) -> PolicyAverages:
    """How the policies of a run follow the trained one."""
    return PolicyAverages(rollout_decay_of(rollout_policy), ema.decay)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an optimiser step does.

    Attributes:
      objective: what samples are trained towards.
      timesteps: at which noise levels.
      micro_batching: in which portions.
      harmonization: how rewards share the update.
      averages: how the other policies follow.
      updates: updates that share a rollout, each on a part of its images.
      ends_step: whether no other of these updates follows.
      alike_below: mean squared distance of the velocities of rollout and trained policy, over their mean square, below
        which micro-batches without anchors do without the rollout policy; 0: none does.
    """

    objective: Objective
    timesteps: Timesteps
    micro_batching: MicroBatching
    harmonization: Harmonization
    averages: PolicyAverages
    updates: int = 1
    ends_step: bool = True
    alike_below: float = 0.0
