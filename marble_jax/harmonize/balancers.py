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
from jaxtyping import Array, Bool, Float, Int

from marble_jax.errors import InputError
from marble_jax.harmonize import qp
from marble_jax.harmonize.gram import divide, inverse, lengths, mean_over, pairs, rescaled
from marble_jax.tree import HIGHEST

GRADIENT_EPSILON = 1e-12
MOST = float(jnp.finfo(jnp.float32).max)
"""Largest number of a balancer's own; comparisons with it are written so that NaN fails them."""


@flax.struct.dataclass
class Solution:
    """Weights of one update.

    Attributes:
      weights: float32 [K] on the raw gradients; 0 where not `used`. Equal to `alpha * scale`.
      alpha: float32 [K] shares of the rewards, summing to 1 unless no reward was usable; smoothed and logged.
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


def closed_form(
    weights: Float[Array, " k"],
    alpha: Float[Array, " k"],
    scale: Float[Array, " k"],
    used: Bool[Array, " k"],
    norms: Float[Array, " k"],
    state: Any,
    failed: Bool[Array, ""] | bool = False,
) -> Solution:
    """The solution of a rule without an optimality condition; `failed` where it gave way to equal shares."""
    status = _closed_form_status(used)
    # With one reward or none there is nothing to fail at.
    status = jnp.where(failed & (status == qp.SOLVED), qp.INACCURATE, status)
    return Solution(
        weights=weights,
        alpha=alpha,
        scale=scale,
        used=used,
        norms=norms,
        min_norm=jnp.zeros(()),
        kkt_residual=jnp.zeros(()),
        status=status,
        state=state,
    )


def _closed_form_status(used: Bool[Array, " k"]) -> Int[Array, ""]:
    """Status by the number of usable rewards, which is all that tells cases apart."""
    count = jnp.sum(used)
    several_or_one = jnp.where(count == 1, qp.ONE_VALID, qp.SOLVED)
    status = jnp.where(count == 0, qp.NONE_VALID, several_or_one)
    return status.astype(jnp.int32)


def usable(
    gram: Float[Array, "k k"], valid: Bool[Array, " k"]
) -> tuple[Float[Array, "k k"], Float[Array, " k"], Bool[Array, " k"]]:
    """Screens the rewards.

    A reward is usable when it is valid and its squared norm is finite and its norm above 1e-12.

    Returns:
      float32 Gram matrix zeroed outside the usable rewards, norms likewise, and which rewards are usable.
    """
    gram = gram.astype(jnp.float32)
    norms = lengths(gram)
    used = valid & jnp.isfinite(norms) & (norms > GRADIENT_EPSILON)
    # Zeroed and not multiplied by 0: a row that is not finite must go.
    clean = jnp.where(pairs(used), gram, 0.0)
    # So must its norm, which means over all would take in.
    return clean, jnp.where(used, norms, 0.0), used


class Balancer(abc.ABC):
    """Interface: `init(K) -> state` and `balancer(gram, valid, state) -> Solution`, both pure and jit-able."""

    def init(self, num_rewards: int) -> Any:
        """State before the first call; empty for most."""
        return ()

    @abc.abstractmethod
    def __call__(
        self, gram: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any = ()
    ) -> Solution:
        """Weights for one update.

        Args:
          gram: inner products of the raw gradients; rows of rewards that are not valid may hold anything.
          valid: rewards that may take part.
          state: from `init` or the previous call.
        """


def _one_each(name: str, values: tuple[float, ...], count: int) -> Float[Array, " k"]:
    """The values as an array, all 1 when there is none.

    Raises:
      InputError: another number of them than of rewards.
    """
    if not values:
        return jnp.ones(count)
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
      every_member: a group's mean runs over all of its members, one that is not usable as gradient 0, and all of them
        share its alpha, as in the released code.

    Source: MARBLE (arXiv 2605.06507). Deviation: without `every_member`, a group's mean runs over the usable ones.
    """

    normalize: bool = True
    reward_weights: tuple[float, ...] = ()
    alpha_floor: float = 0.0
    groups: tuple[int, ...] = ()
    every_member: bool = False

    def __post_init__(self) -> None:
        if not all(0 < weight <= MOST for weight in self.reward_weights):
            raise InputError(
                f"reward weights: expected numbers above 0 that float32 holds; received {self.reward_weights}"
            )
        if not 0 <= self.alpha_floor <= 1:
            raise InputError(
                f"alpha floor: expected a number in [0, 1 / K]; received {self.alpha_floor}"
            )

    def _membership(self, num_rewards: int) -> Float[Array, "g k"]:
        """1 where a reward belongs to a group; without groups every reward is one."""
        if not self.groups:
            return jnp.eye(num_rewards, dtype=jnp.float32)
        numbers = range(max(self.groups) + 1)
        if len(self.groups) != num_rewards or sorted(set(self.groups)) != list(numbers):
            raise InputError(
                f"reward groups: expected one index for each of {num_rewards} rewards, counting from 0 "
                f"without gaps; received {self.groups}"
            )
        group_of_reward = jnp.asarray(self.groups)
        group = jnp.arange(len(numbers))
        is_member = group[:, None] == group_of_reward[None]
        return is_member.astype(jnp.float32)

    def __call__(
        self, gram: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any = ()
    ) -> Solution:
        """See `Balancer.__call__`."""
        gram, norms, used = usable(gram, valid)
        members = self._members(used)
        share, grouped = _group_gram(gram, members)
        # A member that is not usable is a row of zeros: a group of such members alone is not usable either.
        grouped, group_norms, group_used = usable(grouped, jnp.any(members > 0, axis=1))
        factor = self._group_weights(share, group_used)
        if self.normalize:
            factor = factor * inverse(group_norms)
        solved = qp.min_norm(rescaled(grouped, factor), group_used, self.alpha_floor)
        if self.normalize:
            group_scale = factor * mean_over(group_norms, group_used)
        else:
            group_scale = factor
        alpha, scale, active = self._to_rewards(
            solved.alpha, group_scale, members, share, used, group_used
        )
        # Rounding can leave a square slightly below 0.
        min_norm = jnp.sqrt(jnp.maximum(solved.value, 0.0))
        return Solution(
            weights=alpha * scale,
            alpha=alpha,
            scale=scale,
            used=active,
            # A usable reward that left with its group has no part in the update.
            norms=jnp.where(active, norms, 0.0),
            min_norm=min_norm,
            kkt_residual=solved.kkt_residual,
            status=solved.status,
            state=state,
        )

    def _members(self, used: Bool[Array, " k"]) -> Float[Array, "g k"]:
        """1 where a reward is a member of a group that its mean runs over."""
        members = self._membership(len(used))
        return members if self.every_member else members * used

    def _to_rewards(
        self,
        group_alpha: Float[Array, " g"],
        group_scale: Float[Array, " g"],
        members: Float[Array, "g k"],
        share: Float[Array, "g k"],
        used: Bool[Array, " k"],
        group_used: Bool[Array, " g"],
    ) -> tuple[Float[Array, " k"], Float[Array, " k"], Bool[Array, " k"]]:
        """A group's alpha split evenly among its members, its scale for each of them, and the rewards that take part.

        Args:
          group_alpha: from the solve.
          group_scale: from alpha to weights on the groups' gradients.
          members: from `_members`.
          share: of each member in its group's mean.
          used: usable rewards.
          group_used: usable groups.
        """
        # A usable reward whose group's mean vanishes leaves with its group.
        num_groups = jnp.where(group_used, 1.0, 0.0) @ members
        active = used & (num_groups > 0)
        has_share = num_groups > 0 if self.every_member else active
        alpha = jnp.where(has_share, group_alpha @ share, 0.0)
        # A share on a reward without a gradient moves nothing; steps between solves read it.
        scale = jnp.where(active, group_scale @ (members > 0), 0.0)
        return alpha, scale, active

    def _group_weights(
        self, share: Float[Array, "g k"], group_used: Bool[Array, " g"]
    ) -> Float[Array, " g"]:
        """Mean reward weight of the members that share each group's alpha."""
        weights = _one_each("reward weights", self.reward_weights, share.shape[1])
        # A single usable gradient is taken as it is.
        alone = jnp.sum(group_used) == 1
        return jnp.where(alone, 1.0, share @ weights)


def _group_gram(
    gram: Float[Array, "k k"], members: Float[Array, "g k"]
) -> tuple[Float[Array, "g k"], Float[Array, "g g"]]:
    """Share of each member in its group's mean, and the Gram matrix of the means."""
    # A group without a member has no share to give out; its divisor is 1.
    size = jnp.sum(members, axis=1, keepdims=True)
    share = members / jnp.maximum(size, 1.0)
    return share, jnp.einsum("gk,kl,hl->gh", share, gram, share, precision=HIGHEST)


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
        if not self.alpha:
            return
        # Shares are written with a few digits, and three thirds must pass.
        off = abs(sum(self.alpha) - 1.0)
        if not off <= 1e-6 or not all(share >= 0 for share in self.alpha):
            raise InputError(
                f"fixed alpha: expected numbers of at least 0 that sum to 1; received {self.alpha}"
            )

    def __call__(
        self, gram: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any = ()
    ) -> Solution:
        """See `Balancer.__call__`."""
        _, norms, used = usable(gram, valid)
        shares = _one_each("fixed alpha", self.alpha, gram.shape[0])
        # What the others hold is shared out among the usable ones.
        shares = jnp.where(used, shares, 0.0)
        total = jnp.sum(shares)
        has_share = total > 0
        # One usable reward is that gradient even if its own share is 0.
        is_alone = jnp.sum(used) == 1
        alone = jnp.where(is_alone, used, 0.0)
        alpha = jnp.where(has_share, divide(shares, total, has_share), alone)
        unmasked = jnp.ones_like(norms)
        if self.normalize:
            unmasked = mean_over(norms, used) * inverse(norms)
        # Factors on gradients that are not usable would read as those of rewards that took part.
        scale = jnp.where(used, unmasked, 0.0)
        return closed_form(alpha * scale, alpha, scale, used, norms, state)


@dataclasses.dataclass(frozen=True)
class WeightedSum(Balancer):
    """Weights on the raw gradients as they are, not renormalised when a reward drops out.

    Attributes:
      reward_weights: one weight of at least 0 a reward; empty for all 1.
    """

    reward_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not all(0 <= weight <= MOST for weight in self.reward_weights):
            raise InputError(
                f"reward weights: expected numbers of at least 0 that float32 holds; received {self.reward_weights}"
            )

    def __call__(
        self, gram: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any = ()
    ) -> Solution:
        """See `Balancer.__call__`."""
        _, norms, used = usable(gram, valid)
        weights = _one_each("reward weights", self.reward_weights, gram.shape[0])
        # Of rewards that drop out; their weight goes to nobody.
        weights = jnp.where(used, weights, 0.0)
        total = jnp.sum(weights)
        # Weights of 0 alone have no shares.
        alpha = divide(weights, total, total > 0)
        # One scale for all, but 0 tells that a reward had no part.
        scale = jnp.where(used, total, 0.0)
        return closed_form(weights, alpha, scale, used, norms, state)
