"""What an objective is to the rest of the package: directions at a sample, and how rewards weigh them.

The loss of reward k at sample n may depend on the advantage in any way, as long as it depends on the network through a
few cotangents that all rewards share. An objective names these directions (`directions`) and the weight of each for
every reward (`mix`); `harmonize` pulls a sample's directions back through the network once and has the gradients of
all K rewards as a product of matrices:

    g_k = (1 / n_k) sum_n sum_j mix[n, k, j] J_n^T direction_j[n]

DiffusionNFT has two directions (signal and anchor), a policy gradient has one, the score of its log-probability. The
K gradients then cost what one or two backward passes cost. Steps between two solves pull back one weighted sum of the
directions a sample, which is the same gradient whether or not the loss is affine in the advantage.

A micro-batch runs through `prepare` (everything that no gradient flows through), `predict`, `directions`, then `mix`
and `losses`. All of them are pure, work on any number of samples, and know latents of any rank: [n, *latent].
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.types import Adapter

Velocity = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""velocity(xt [n, *latent], sigma [n], cond) -> [n, *latent] of one policy, with no interaction between samples."""

AdapterVelocity = Callable[[Adapter, jax.Array, jax.Array, Any], jax.Array]
"""velocity(adapter, xt [n, *latent], sigma [n], cond) -> [n, *latent]: the same with the adapter left open."""

Batch = Any
"""An objective's own micro-batch: a pytree of leaves [n, ...] that `prepare` makes."""

Statistics = Any
"""An objective's own numbers of n samples: a pytree of leaves [n]."""


class Kept(enum.Enum):
    """What a rollout keeps of every image for the objective to train on."""

    CLEAN_LATENTS = "clean latents"
    TRANSITIONS = "states at steps with noise"


@flax.struct.dataclass
class SolverSteps:
    """Coefficients of the rollout's stochastic solver at n samples, float32 [n] each; see `flow.stochastic`.

    Attributes:
      sigma: noise level before the step.
      state: of the state in the step's mean.
      current: of the clean estimate in it.
      noise: standard deviation of the step.
      diffusion: what a difference of means is measured in by the divergence from the base model.
      length: noise level before the step minus that behind it.
    """

    sigma: jax.Array
    state: jax.Array
    current: jax.Array
    noise: jax.Array
    diffusion: jax.Array
    length: jax.Array


@flax.struct.dataclass
class Draws:
    """What an optimiser step draws for a micro-batch: n images, each at one of its timesteps.

    Attributes:
      kept: pytree of leaves [n, ...], what the rollout kept of the images (`Objective.keeps`): for clean latents one
        float32 array [n, *latent], for transitions `flow.trajectory.Transition`, the step at `timestep`.
      timestep: int32 [n], index of the noise level among those of the rollout's solver.
      sigma: float32 [n], that noise level, in (0, 1].
      cond: pytree of conditioning, leaves [n, ...].
      key: PRNG key of the micro-batch.
      steps: of the rollout's solver at these timesteps; None for a solver without noise.
    """

    kept: Any
    timestep: jax.Array
    sigma: jax.Array
    cond: Any
    key: jax.Array
    steps: SolverSteps | None = None


@dataclasses.dataclass(frozen=True)
class FrozenPolicies:
    """Velocities of the policies that a step does not train; no gradient flows through them.

    Attributes:
      rollout: the policy that sampled the images.
      base: the base model, without an adapter.
      alike: whether rollout and trained policy agree to within rounding here, so that an objective with `skips_alike`
        leaves `rollout` alone and takes the prediction in its place.
      is_trained: bool scalar, whether `rollout` is the trained policy to the last bit, so that every ratio of their
        densities is 1.
    """

    rollout: Velocity
    base: Velocity
    alike: bool = False
    is_trained: jax.Array | bool = False


@flax.struct.dataclass
class FlowBatch:
    """Points at which a policy's velocity is taken; objectives add fields of their own.

    Attributes:
      xt: [n, *latent] noised latents.
      sigma: [n] noise level in (0, 1].
      cond: pytree of conditioning, leaves [n, ...].
    """

    xt: jax.Array
    sigma: jax.Array
    cond: Any


@flax.struct.dataclass
class Divergence:
    """Divergence of n samples from the base model.

    Attributes:
      cotangent: [n, *latent] of the prediction, for each sample's own divergence.
      divergence: [n] >= 0.
    """

    cotangent: jax.Array
    divergence: jax.Array


@flax.struct.dataclass
class Directions:
    """Cotangents of the prediction at n samples, shared by all rewards.

    Attributes:
      signals: S arrays [n, *latent], whose weights depend on the advantage.
      anchors: A arrays [n, *latent], whose weights do not. They may be taken at a part of the micro-batches, so much
        stronger there, without bias.
      statistics: what `mix` and `losses` read.
      kl: divergence from the base model, a term of its own beside the rewards; None leaves it out.
      gap: [n] mean squared distance of the prediction from the rollout policy's, for the records; None where the
        objective does not know it.
    """

    signals: tuple[jax.Array, ...]
    anchors: tuple[jax.Array, ...]
    statistics: Statistics
    kl: Divergence | None = None
    gap: jax.Array | None = None


class Objective(abc.ABC):
    """Interface of training objectives; a frozen dataclass of constants, found by name in `registry`.

    Attributes:
      keeps: what a rollout must keep.
      skips_alike: whether signals can be had without the rollout policy where it is the trained one to within rounding.
      kl_weight: weight of the divergence from the base model, a term of its own that no reward scales; 0 for none.
    """

    keeps: ClassVar[Kept] = Kept.CLEAN_LATENTS
    skips_alike: ClassVar[bool] = False
    kl_weight: float = 0.0

    @property
    def reports(self) -> tuple[str, ...]:
        """Names of the objective's own numbers in the records, which `reported` gives."""
        return ()

    @property
    def first_reports(self) -> tuple[str, ...]:
        """Those of `reports` that are on record of the first of several updates too, as `NAME_first`."""
        return ()

    @property
    def num_anchors(self) -> int:
        """Anchors among the directions at a sample, beside its one signal."""
        return 1

    @property
    def num_directions(self) -> int:
        """Cotangents pulled back at a sample: its signal, the anchors, and the divergence where there is one."""
        return 1 + self.num_anchors + int(self.kl_weight > 0)

    @property
    def rollout_passes(self) -> int:
        """Calls of the rollout policy at a sample, beside that of the trained policy."""
        return 1

    @property
    def clips(self) -> bool:
        """Whether a clip may set weights to 0; records then hold the share of them."""
        return False

    @abc.abstractmethod
    def prepare(self, draws: Draws, policies: FrozenPolicies, divergence: bool) -> Batch:
        """The micro-batch, with everything that no gradient flows through.

        Args:
          draws: images and noise levels.
          policies: the other policies; each call is a forward pass of the network.
          divergence: whether the divergence from the base model is taken at this micro-batch; what only it needs can be
            left out.
        """

    def predict(self, velocity: Velocity, batch: Batch) -> Float[Array, " n *latent"]:
        """Output of the trained policy that directions are cotangents of: its velocity at the batch's points.

        An objective with guidance in training combines several calls of `velocity` here.
        """
        return velocity(batch.xt, batch.sigma, batch.cond)

    @abc.abstractmethod
    def directions(self, prediction: Float[Array, " n *latent"], batch: Batch) -> Directions:
        """Cotangents at n samples and the numbers that their weights follow from."""

    @abc.abstractmethod
    def mix(
        self,
        advantages: Float[Array, "n k"],
        statistics: Statistics,
        valid: Bool[Array, "n k"],
    ) -> Float[Array, "n k j"]:
        """Weights of the directions in every reward's gradient, summed over its samples.

        Args:
          advantages: of every sample under every reward.
          statistics: from `directions`.
          valid: False where a reward does not apply; the caller leaves these weights out whatever they are.

        Returns:
          Weights in the order of signals, then anchors: j runs over S + A.
        """

    def held_by_clip(
        self, advantages: Float[Array, "n k"], statistics: Statistics
    ) -> Bool[Array, "n k"]:
        """Which weights of `mix` the clip sets to 0; arguments as there."""
        return jnp.zeros(advantages.shape, bool)

    @abc.abstractmethod
    def losses(
        self, advantages: Float[Array, "n k"], statistics: Statistics
    ) -> Float[Array, "n k"]:
        """Loss of every sample under every reward, for the records; a reward's loss is their mean."""

    def reported(self, statistics: Statistics) -> dict[str, Float[Array, " n"]]:
        """The objective's own numbers of n samples by the names in `reports`; records hold their means."""
        return {}
