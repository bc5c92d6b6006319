"""Everything a run needs to go on: one pytree that is checkpointed whole."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from marble_jax.harmonize import alpha_state, history
from marble_jax.types import Adapter


@flax.struct.dataclass
class TrainState:
    """The whole state of training after `step` optimiser steps.

    Prompts, noise and timesteps are functions of (`key`, `step`) alone, so `step` is also the sampler's position.

    Attributes:
      step: int32 scalar, optimiser steps done.
      key: uint32 key data of the run's random key: that of the seed, until a rollback changes it.
      current: the adapter that is trained.
      rollout: the adapter that samples rollouts.
      ema: the averaged adapter that is evaluated and exported.
      opt_state: state of the optimiser.
      alpha: the remembered alpha and its age.
      balancer: state of the balancer, possibly empty.
      history: earlier steps' gradients and update, which this step's are compared with.
      best_score: float32 scalar, best score of an evaluation (`evaluation.best_by`); -inf before the first.
      best_step: int32 scalar, the step of that evaluation.
      best: the averaged adapter at that evaluation.
      anchor_spread: float32 scalar, what `training.anchor_spacing` remembers of the anchors; None where their spacing
        is fixed.
    """

    step: jax.Array
    key: jax.Array
    current: Adapter
    rollout: Adapter
    ema: Adapter
    opt_state: optax.OptState
    alpha: alpha_state.AlphaState
    balancer: Any
    history: history.History
    best_score: jax.Array
    best_step: jax.Array
    best: Adapter
    anchor_spread: jax.Array | None = None

    @property
    def last_spread(self) -> jax.Array:
        """`anchor_spread` where it is there.

        Raises:
          ValueError: the state was made for a fixed spacing.
        """
        if self.anchor_spread is None:
            raise ValueError("state: expected one of adaptive anchors; received a fixed spacing's")
        return self.anchor_spread

    @property
    def seed(self) -> int:
        """The key as one number, for prompts; at first the seed that it was made of."""
        # Big-endian words, so that the key of a small seed is that seed on every machine.
        words = np.asarray(self.key).astype(">u4")
        return int.from_bytes(words.tobytes(), "big")


@flax.struct.dataclass
class GapState(TrainState):
    """The state of a run in which steps depend on how far rollout and trained policy are apart.

    A class of its own, so that checkpoints of other runs are what they were before there was one.

    Attributes:
      rollout_gap: float32 scalar, distance of their velocities that the last step saw; see `Recipe.alike_below`. Before
        the first step the two policies are one.
    """

    rollout_gap: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros((), jnp.float32))


def initial_state(
    adapter: Adapter,
    optimizer: optax.GradientTransformation,
    num_rewards: int,
    balancer_state: Any,
    seed: int,
    adaptive_anchors: bool = False,
    skips_alike: bool = False,
) -> TrainState:
    """The state before the first step: all three policies are the same new adapter.

    Every leaf has a buffer of its own, because steps are given the whole state to overwrite.
    """
    no_score = jnp.asarray(-jnp.inf, jnp.float32)
    kind = GapState if skips_alike else TrainState
    state = kind(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
        current=adapter,
        rollout=adapter,
        ema=adapter,
        opt_state=optimizer.init(adapter),
        alpha=alpha_state.init(num_rewards),
        balancer=balancer_state,
        history=history.init(adapter, num_rewards),
        best_score=no_score,
        best_step=jnp.zeros((), jnp.int32),
        best=adapter,
        anchor_spread=jnp.zeros((), jnp.float32) if adaptive_anchors else None,
    )
    # Three policies that share a buffer could not be donated.
    return jax.tree.map(jnp.copy, state)
