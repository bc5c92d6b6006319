"""One update from the gradients of several objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax import tree
from marble_jax.balancing.leaves import num_objectives
from marble_jax.errors import InputError, one_of
from marble_jax.harmonize import diagnostics
from marble_jax.harmonize.balancers import Balancer
from marble_jax.harmonize.registry import BALANCERS, make_balancer, plain_numbers
from marble_jax.tree import Tree, gram
from marble_jax.validation import validated

BALANCER_NAMES = (*BALANCERS, "min_norm")
"""Names of balancers; "min_norm" is MGDA, "marble" the same on unit gradients."""
_WEIGHTS = {"marble": "reward_weights", "weighted_sum": "reward_weights", "fixed": "alpha"}
"""What a balancer calls the weights of objectives, where it has any."""


@flax.struct.dataclass
class BalanceInfo:
    """What an update was made of, and what it does to every objective.

    Attributes:
      weights: float32 [K] of the update on the raw gradients.
      alpha: float32 [K] shares of the objectives, summing to 1 unless no gradient was usable.
      norms: float32 [K] lengths of the gradients; 0 where one was not used.
      used: bool [K] objectives that took part: valid, with a gradient that is finite and not zero.
      gram: float32 [K, K] inner products of the gradients.
      cos_update: float32 [K] cosines of the update with the gradients. A step along the negative update lowers an
        objective's loss to first order where the cosine is above 0.
      cos_pair: float32 [K, K] cosines of the gradients with each other.
      worst_cos: float32 scalar, smallest of `cos_update`.
      conflict: float32 scalar, 1 where the update opposes an objective, else 0.
      imbalance: float32 scalar, longest over shortest gradient.
      update_norm: float32 scalar, length of the update.
      min_norm: float32 scalar, length of the shortest convex combination, where the balancer solves for it.
      kkt_residual: float32 scalar, how far that solve is from optimal, relative to the longest vector squared.
      status: int32 scalar, index into STATUS_NAMES; "inaccurate" also where a rule broke down and gave way to equal
        shares.
      state: the balancer's state, for its next call; empty for those that come with the package.
    """

    weights: jax.Array
    alpha: jax.Array
    norms: jax.Array
    used: jax.Array
    gram: jax.Array
    cos_update: jax.Array
    cos_pair: jax.Array
    worst_cos: jax.Array
    conflict: jax.Array
    imbalance: jax.Array
    update_norm: jax.Array
    min_norm: jax.Array
    kkt_residual: jax.Array
    status: jax.Array
    state: Any


def select_balancer(
    balancer: str | Balancer, weights: Sequence[float] | None = None, **settings: Any
) -> Balancer:
    """A balancer by name.

    Args:
      balancer: one of BALANCER_NAMES; a Balancer is returned as it is.
      weights: one number an objective, for "marble" and "min_norm" (factors on the vectors of the hull), "weighted_sum"
        and "fixed" (shares that sum to 1).
      **settings: attributes of the balancer's class, such as `c` of "cagrad" or `normalize`.

    Raises:
      InputError: an unknown name or setting, weights for a balancer that has none, or numbers that are not finite, out
        of their range, or traced: a balancer is chosen before a program is compiled.
    """
    if isinstance(balancer, Balancer):
        if weights is not None or settings:
            raise InputError(
                f"balancer: expected a name beside weights and settings; received the object {balancer}"
            )
        return balancer
    one_of("balancer", balancer, BALANCER_NAMES)
    name = balancer
    if balancer == "min_norm":
        name = "marble"
        if settings.get("normalize", False):
            raise InputError(
                "normalize of the balancer 'min_norm': expected False ('marble' solves on unit gradients); received "
                f"{settings['normalize']!r}"
            )
        settings = {**settings, "normalize": False}
    if weights is not None:
        if name not in _WEIGHTS:
            raise InputError(
                f"weights: expected with one of {', '.join((*_WEIGHTS, 'min_norm'))}; received them "
                f"with {balancer!r}"
            )
        numbers = validated(tuple[float, ...], plain_numbers("weights", weights), "weights")
        if not numbers:
            raise InputError("weights: expected one number an objective, or None; received none")
        settings = {**settings, _WEIGHTS[name]: numbers}
    return make_balancer(name, **settings)


def balance(
    gradients: Tree,
    balancer: str | Balancer = "marble",
    weights: Sequence[float] | None = None,
    valid: jax.Array | Sequence[bool] | None = None,
    state: Any = None,
    **settings: Any,
) -> tuple[Tree, BalanceInfo]:
    """One update from the gradients of K objectives.

    Only the inner products of the gradients enter the choice, so that gradients may be sharded in any way. A gradient
    that is zero or not finite leaves the combination; with one left the update is that gradient, with none it is zero.

    Args:
      gradients: tree with leaves [K, ...], as from `losses_and_gradients`.
      balancer: one of BALANCER_NAMES, or a Balancer.
      weights: one number an objective, see `select_balancer`.
      valid: bool [K], objectives that take part; all when None.
      state: `info.state` of the previous call, for a balancer that has a state.
      **settings: attributes of the balancer's class.

    Returns:
      The update, a tree like the parameters, to be descended like a gradient; and BalanceInfo.

    Raises:
      InputError: trees without such leaves, or see `select_balancer`.
    """
    rule = select_balancer(balancer, weights, **settings)
    count = num_objectives(gradients)
    mask = jnp.ones(count, bool)
    if valid is not None:
        mask = jnp.asarray(valid, bool)
    if mask.shape != (count,):
        raise InputError(
            f"valid: expected one switch for each of {count} objectives; received shape "
            f"{list(mask.shape)}"
        )
    if state is None:
        state = rule.init(count)
    info = solve(rule, gram(gradients).astype(jnp.float32), mask, state)
    return tree.weighted_sum(info.weights, gradients), info


def solve(
    rule: Balancer, products: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any
) -> BalanceInfo:
    """Returns what a balancer makes of a Gram matrix."""
    if type(rule).__hash__ is None:
        # A balancer of the user's that cannot name a compiled program.
        return _solved(rule, products, valid, state)
    return _compiled_solve(rule, products, valid, state)


def _solved(
    rule: Balancer, products: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any
) -> BalanceInfo:
    solution = rule(products, valid, state)
    effect = diagnostics.from_gram(products, solution.weights, valid)
    return BalanceInfo(
        weights=solution.weights,
        alpha=solution.alpha,
        norms=solution.norms,
        used=solution.used,
        gram=products,
        cos_update=effect["harmonize/cos_update"],
        cos_pair=effect["harmonize/cos_pair"],
        worst_cos=effect["harmonize/worst_cos"],
        conflict=effect["harmonize/conflict"],
        imbalance=effect["harmonize/imbalance"],
        update_norm=effect["harmonize/update_norm"],
        min_norm=solution.min_norm,
        kkt_residual=solution.kkt_residual,
        status=solution.status,
        state=solution.state,
    )


# A solve is hundreds of small operations, slow one by one where the caller compiles nothing.
_compiled_solve = jax.jit(_solved, static_argnums=0)
