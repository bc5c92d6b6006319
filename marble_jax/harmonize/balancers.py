"""From the Gram matrix of K gradients to the weights that combine them.

A balancer is a frozen set of hyperparameters with an explicit state. It sees inner products only and returns weights
to be applied to the *raw* gradients, so it is tiny, replicated, and blind to how the gradients are sharded:

    solution = balancer(gram, valid, state);  update = tree.weighted_sum(solution.weights, gradients)

Rewards that are not valid, or whose gradient is zero or not finite, leave the combination. With one left the update
is that gradient, with none it is zero.

Here are MARBLE's rule and the fixed combinations it is compared with; `baselines` has methods from the literature.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from marble_jax.errors import InputError
from marble_jax.harmonize import qp

GRADIENT_EPSILON = 1e-12


@flax.struct.dataclass
class Solution:
    """What a balancer returns.

    Attributes:
      weights: float32 [K] on the raw gradients; 0 where not `used`. Equal to `alpha * scale`.
      alpha: float32 [K] shares of the rewards, summing to 1 unless no reward was usable; what is smoothed and logged.
      scale: float32 [K] from alpha to weights, e.g. `mean |g| / |g_k|`; 0 where not `used`.
      used: bool [K], rewards that took part.
      norms: float32 [K] gradient norms, 0 where not `used`.
      min_norm: float32 scalar, norm of the shortest convex combination of the vectors solved on; 0 if not solved for.
      kkt_residual: float32 scalar, how far the solve is from optimal; 0 for closed forms.
      status: int32 scalar, index into `qp.STATUS_NAMES`.
      state: the balancer's next state.
    """

    weights: jax.Array
    alpha: jax.Array
    scale: jax.Array
    used: jax.Array
    norms: jax.Array
    min_norm: jax.Array
    kkt_residual: jax.Array
    status: jax.Array
    state: Any


def usable(gram: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Screens the rewards: float32 Gram matrix [K, K] zeroed outside the usable ones, norms [K], and usable [K].

    A reward is usable when it is valid and its squared norm is finite and its norm above 1e-12.
    """
    square = jnp.diagonal(gram).astype(jnp.float32)
    norms = jnp.sqrt(jnp.maximum(square, 0.0))
    used = valid & jnp.isfinite(square) & (norms > GRADIENT_EPSILON)
    both = used[:, None] & used[None]
    return jnp.where(both, gram.astype(jnp.float32), 0.0), jnp.where(used, norms, 0.0), used


def mean_over(values: jax.Array, used: jax.Array) -> jax.Array:
    """Mean of the used entries, 0 when there is none."""
    return jnp.sum(jnp.where(used, values, 0.0)) / jnp.maximum(jnp.sum(used), 1)


def inverse(norms: jax.Array) -> jax.Array:
    """1 / norm, and 0 for a norm of 0."""
    return jnp.where(norms > 0, 1.0 / jnp.where(norms > 0, norms, 1.0), 0.0)


def closed_form_status(used: jax.Array) -> jax.Array:
    """Status of a rule that cannot fail: only the number of usable rewards tells cases apart."""
    count = jnp.sum(used)
    return jnp.where(
        count == 0, qp.NONE_VALID, jnp.where(count == 1, qp.ONE_VALID, qp.SOLVED)
    ).astype(jnp.int32)


class Balancer(abc.ABC):
    """Interface: `init(K) -> state` and `balancer(gram, valid, state) -> Solution`, both pure and jit-able."""

    def init(self, num_rewards: int) -> Any:
        """State before the first call; empty for most."""
        return ()

    @abc.abstractmethod
    def __call__(self, gram: jax.Array, valid: jax.Array, state: Any = ()) -> Solution:
        """Weights for one update.

        Args:
          gram: [K, K] inner products of the raw gradients; rows of rewards that are not valid may hold anything.
          valid: bool [K].
          state: from `init` or the previous call.
        """


def _row(name: str, values: tuple[float, ...], count: int) -> jax.Array:
    if len(values) != count:
        raise InputError(
            f"{name}: expected one number for each of {count} rewards; received {len(values)}"
        )
    return jnp.asarray(values, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Marble(Balancer):
    """The shortest convex combination of the unit gradients, at the mean gradient norm.

    Attributes:
      normalize: solve on unit gradients; without it on the raw ones, which the paper reports to fail.
      reward_weights: factor on each unit gradient before the solve, which reshapes the hull; empty for all 1.
      alpha_floor: smallest alpha of a usable reward (or group), capped at 1 / their number.
      groups: index of the group of each reward, empty for no groups. A group enters the solve as the mean of its
        usable members' gradients, with the mean of their weights, and its alpha is shared evenly among them.

    Source: MARBLE (arXiv 2605.06507). Upstream counts an unusable member of a group as a zero gradient in the
    group's mean; here the mean runs over the usable ones.
    """

    normalize: bool = True
    reward_weights: tuple[float, ...] = ()
    alpha_floor: float = 0.0
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(not w > 0 for w in self.reward_weights):
            raise InputError(
                f"reward weights: expected numbers above 0; received {self.reward_weights}"
            )
        if self.alpha_floor < 0:
            raise InputError(
                f"alpha floor: expected a number in [0, 1 / K]; received {self.alpha_floor}"
            )

    def _membership(self, num_rewards: int) -> jax.Array:
        if not self.groups:
            return jnp.eye(num_rewards, dtype=jnp.float32)
        if len(self.groups) != num_rewards or sorted(set(self.groups)) != list(
            range(max(self.groups) + 1)
        ):
            raise InputError(
                f"reward groups: expected one index for each of {num_rewards} rewards, counting from 0 "
                f"without gaps; received {self.groups}"
            )
        return jnp.asarray(
            [[float(own == g) for own in self.groups] for g in range(max(self.groups) + 1)],
            jnp.float32,
        )

    def __call__(self, gram: jax.Array, valid: jax.Array, state: Any = ()) -> Solution:
        num_rewards = gram.shape[0]
        gram, norms, used = usable(gram, valid)
        members = self._membership(num_rewards) * used
        share = members / jnp.maximum(jnp.sum(members, axis=1, keepdims=True), 1.0)
        own_weights = (
            jnp.ones(num_rewards)
            if not self.reward_weights
            else _row("reward weights", self.reward_weights, num_rewards)
        )
        grouped = jnp.einsum(
            "gk,kl,hl->gh", share, gram, share, precision=jax.lax.Precision.HIGHEST
        )
        grouped, group_norms, group_used = usable(grouped, jnp.any(members > 0, axis=1))
        group_weights = share @ own_weights
        # A single usable gradient is taken as it is.
        group_weights = jnp.where(jnp.sum(group_used) == 1, 1.0, group_weights)
        factor = group_weights
        if self.normalize:
            factor = factor * inverse(group_norms)
        solved = qp.min_norm(grouped * factor[:, None] * factor[None], group_used, self.alpha_floor)
        scale = factor * mean_over(group_norms, group_used) if self.normalize else factor
        took_part = used & (jnp.where(group_used, 1.0, 0.0) @ members > 0)
        alpha = jnp.where(took_part, solved.alpha @ share, 0.0)
        scale = jnp.where(took_part, scale @ (members > 0), 0.0)
        return Solution(
            weights=alpha * scale,
            alpha=alpha,
            scale=scale,
            used=took_part,
            norms=jnp.where(took_part, norms, 0.0),
            min_norm=jnp.sqrt(jnp.maximum(solved.value, 0.0)),
            kkt_residual=solved.kkt_residual,
            status=solved.status,
            state=state,
        )


@dataclasses.dataclass(frozen=True)
class Fixed(Balancer):
    """The same alpha at every step, shared out among the usable rewards.

    Attributes:
      alpha: share of each reward, summing to 1 within 1e-6; empty for equal shares.
      normalize: apply alpha to unit gradients at the mean gradient norm instead of to the raw ones.
    """

    alpha: tuple[float, ...] = ()
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.alpha and (any(a < 0 for a in self.alpha) or abs(sum(self.alpha) - 1.0) > 1e-6):
            raise InputError(
                f"fixed alpha: expected numbers of at least 0 that sum to 1; received {self.alpha}"
            )

    def __call__(self, gram: jax.Array, valid: jax.Array, state: Any = ()) -> Solution:
        _, norms, used = usable(gram, valid)
        own = (
            _row("fixed alpha", self.alpha, gram.shape[0])
            if self.alpha
            else jnp.ones(gram.shape[0])
        )
        own = jnp.where(used, own, 0.0)
        total = jnp.sum(own)
        # One usable reward is that gradient even if its own share is 0.
        even = jnp.where(jnp.sum(used) == 1, used.astype(jnp.float32), 0.0)
        alpha = jnp.where(total > 0, own / jnp.where(total > 0, total, 1.0), even)
        scale = jnp.where(
            used, mean_over(norms, used) * inverse(norms) if self.normalize else 1.0, 0.0
        )
        return Solution(
            weights=alpha * scale,
            alpha=alpha,
            scale=scale,
            used=used,
            norms=norms,
            min_norm=jnp.zeros(()),
            kkt_residual=jnp.zeros(()),
            status=closed_form_status(used),
            state=state,
        )


@dataclasses.dataclass(frozen=True)
class WeightedSum(Balancer):
    """Weights on the raw gradients as they are, not renormalised when a reward drops out.

    Attributes:
      reward_weights: one weight of at least 0 a reward; empty for all 1.
    """

    reward_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(w < 0 for w in self.reward_weights):
            raise InputError(
                f"reward weights: expected numbers of at least 0; received {self.reward_weights}"
            )

    def __call__(self, gram: jax.Array, valid: jax.Array, state: Any = ()) -> Solution:
        _, norms, used = usable(gram, valid)
        count = gram.shape[0]
        own = (
            _row("reward weights", self.reward_weights, count)
            if self.reward_weights
            else jnp.ones(count)
        )
        weights = jnp.where(used, own, 0.0)
        total = jnp.sum(weights)
        return Solution(
            weights=weights,
            alpha=weights / jnp.where(total > 0, total, 1.0),
            scale=jnp.where(used, total, 0.0),
            used=used,
            norms=norms,
            min_norm=jnp.zeros(()),
            kkt_residual=jnp.zeros(()),
            status=closed_form_status(used),
            state=state,
        )
