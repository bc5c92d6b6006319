"""Gradient balancers from the literature, behind the same interface as MARBLE's.

All act on the raw gradients, as in their papers, and all are written on the Gram matrix. `normalize` feeds them unit
gradients at the mean gradient norm instead, which answers whether MARBLE's gain is the normalisation or the rule.
Inside a rule the vectors are scaled to a mean squared norm of order 1, so no constant depends on the loss scale.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.errors import InputError
from marble_jax.harmonize import qp
from marble_jax.harmonize.balancers import (
    MOST,
    Balancer,
    Solution,
    closed_form,
    usable,
)
from marble_jax.harmonize.gram import (
    count_or_one,
    divide,
    even_shares,
    inverse,
    lengths,
    mean_over,
    pairs,
    product,
    rescaled,
)
from marble_jax.validation import short

Combined = tuple[Float[Array, " k"], Bool[Array, ""] | bool]
"""Weights [K], and whether they are those of the rule: where not, equal shares take their place."""


def _check_steps(what: str, steps: Any) -> None:
    """Raises InputError unless an iteration has a whole number of at least one step."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"{what}: expected a whole number of at least 1; received {short(steps)}")


def _check_regularisation(what: str, regularisation: float) -> None:
    """Raises InputError for what would make a Gram matrix indefinite, or nothing of it."""
    if not 0 <= regularisation <= MOST:
        raise InputError(f"{what}: expected a number of at least 0; received {regularisation}")


def _length(gram: Float[Array, "k k"], weights: Float[Array, " k"]) -> Float[Array, ""]:
    """Length of the weighted sum, floored: it is divided by."""
    square = jnp.dot(weights, product(gram, weights))
    return jnp.sqrt(jnp.maximum(square, 1e-12))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(Balancer):
    """A balancer given by a function of the usable gradients' scaled Gram matrix.

    Attributes:
      normalize: feed unit gradients at the mean gradient norm instead of the raw ones.
    """

    normalize: bool = False

    @abc.abstractmethod
    def combine(self, gram: Float[Array, "k k"], used: Bool[Array, " k"]) -> Combined:
        """Weights on the scaled vectors, whose Gram matrix is 0 outside `used`, and whether they mean anything."""

    def __call__(
        self, gram: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any = ()
    ) -> Solution:
        """See `Balancer.__call__`."""
        gram, norms, used = usable(gram, valid)
        length = mean_over(norms, used)
        if self.normalize:
            factor = inverse(norms)
        else:
            factor = jnp.where(used, inverse(length), 0.0)
        combined, sound = self.combine(rescaled(gram, factor), used)
        weights = jnp.where(used, combined, 0.0)
        # A rule that breaks down on rounding falls back on equal shares, and its status says so.
        sound = sound & jnp.all(jnp.isfinite(weights))
        weights = jnp.where(sound, weights, even_shares(used))
        # A single usable gradient is taken as it is, whatever the rule makes of it.
        alone = jnp.sum(used) == 1
        weights = jnp.where(alone, used.astype(jnp.float32), weights)
        raw = weights * factor * length
        total = jnp.sum(raw)
        # Weights of either sign can cancel: then there are no shares of their sum.
        alpha = divide(raw, total, jnp.abs(total) > 1e-30)
        scale = jnp.where(used, total, 0.0)
        return closed_form(raw, alpha, scale, used, norms, state, failed=~sound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UPGrad(Rule):
    """The mean of the gradients' projections onto the cone of directions that conflict with none of them.

    Source: UPGrad, "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232).

    Attributes:
      regularisation: added to the diagonal of the scaled Gram matrix, >= 0.
      num_sweeps: sweeps of coordinate descent on the K dual problems, >= 1.
    """

    regularisation: float = 1e-4
    num_sweeps: int = 200

    def __post_init__(self) -> None:
        _check_regularisation("UPGrad regularisation", self.regularisation)
        _check_steps("UPGrad sweeps", self.num_sweeps)

    def combine(self, gram: Float[Array, "k k"], used: Bool[Array, " k"]) -> Combined:
        """See `Rule.combine`."""
        size = gram.shape[0]
        matrix = gram + self.regularisation * jnp.eye(size)
        lower = jnp.eye(size) * used

        def update(index: jax.Array, weights: jax.Array) -> jax.Array:
            # Row i of `weights` solves: minimise w^T G w subject to w >= e_i. One coordinate of all rows at once.
            j = index % size
            diagonal = matrix[j, j]
            whole_slope = product(weights, matrix[:, j])
            slope = whole_slope - weights[:, j] * diagonal
            # The column of a reward that is not used has only the regularisation in it.
            minimiser = jnp.where(used[j], -slope / diagonal, 0.0)
            column = jnp.maximum(lower[:, j], minimiser)
            return weights.at[:, j].set(column)

        weights = jax.lax.fori_loop(0, self.num_sweeps * size, update, lower)
        return jnp.sum(weights, axis=0) / count_or_one(used), True


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCGrad(Rule):
    """Every gradient with its conflicting parts along the others projected out, averaged.

    Source: PCGrad (arXiv 2001.06782). Deviations: the others are visited in their fixed order starting after the
    gradient itself, where the paper draws it; the projections are averaged, where the paper sums them.
    """

    def combine(self, gram: Float[Array, "k k"], used: Bool[Array, " k"]) -> Combined:
        """See `Rule.combine`."""
        size = gram.shape[0]
        # The divisor is 1 for a reward that is not used: its square is 0.
        square = jnp.where(used, jnp.diagonal(gram), 1.0)

        def project(first: jax.Array) -> jax.Array:
            def visit(offset: jax.Array, weights: jax.Array) -> jax.Array:
                j = (first + offset) % size
                inner = product(weights, gram[:, j])
                conflicting = used[j] & (inner < 0)
                step = jnp.where(conflicting, -inner / square[j], 0.0)
                return weights.at[j].add(step)

            start = jax.nn.one_hot(first, size)
            return jax.lax.fori_loop(1, size, visit, start)

        projections = jax.vmap(project)(jnp.arange(size))
        # A reward that is not used has a row all the same: it starts as its own unit vector.
        projections = jnp.where(used[:, None], projections, 0.0)
        return jnp.sum(projections, axis=0) / count_or_one(used), True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CAGrad(Rule):
    """The direction within `c |g0|` of the mean gradient g0 that helps the worst-off reward most.

    Source: CAGrad (arXiv 2110.14048), dual form; without its final division by 1 + c^2.

    Attributes:
      c: radius relative to the length of the mean gradient, in [0, 1); 0 is the mean gradient.
    """

    c: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.c < 1.0:
            raise InputError(f"CAGrad radius c: expected a number in [0, 1); received {self.c}")

    def combine(self, gram: Float[Array, "k k"], used: Bool[Array, " k"]) -> Combined:
        """See `Rule.combine`."""
        even = even_shares(used)
        towards = product(gram, even)
        mean_square = jnp.maximum(jnp.dot(even, towards), 0.0)
        radius = self.c * jnp.sqrt(mean_square)

        def dual(w: jax.Array) -> jax.Array:
            # The root has no slope at 0; the constant keeps its gradient finite.
            square = jnp.dot(w, product(gram, w))
            length = jnp.sqrt(square + 1e-12)
            return jnp.dot(w, towards) + radius * length

        w = qp.minimise_on_simplex(dual, used)
        factor = radius / _length(gram, w)
        return even + factor * w, True


@dataclasses.dataclass(frozen=True, kw_only=True)
class IMTLG(Rule):
    """The combination with equal projections onto all unit gradients; weights sum to 1 and may be negative.

    Source: IMTL-G, "Towards Impartial Multi-task Learning" (ICLR 2021), solved with a pseudo-inverse as G w = norms.
    """

    def combine(self, gram: Float[Array, "k k"], used: Bool[Array, " k"]) -> Combined:
        """See `Rule.combine`."""
        pseudo_inverse = jnp.linalg.pinv(gram, rtol=1e-6, hermitian=True)
        weights = product(pseudo_inverse, lengths(gram))
        total = jnp.sum(weights)
        # Weights that nearly cancel say nothing.
        safe = jnp.abs(total) > 1e-6
        return divide(weights, total, safe), safe


@dataclasses.dataclass(frozen=True, kw_only=True)
class NashMTL(Rule):
    """The Nash bargaining solution: positive weights with `G alpha = 1 / alpha`.

    It is the stationary point of the strictly convex `alpha^T G alpha / 2 - sum log alpha`, found by damped Newton.

    Source: Nash-MTL (arXiv 2202.01017). Deviations: solved anew and to the end at every call, where the paper reuses
    old weights and a few rounds of a concave-convex approximation; the update is scaled to the mean gradient norm,
    where the paper's has length sqrt(K) before clipping.

    Attributes:
      regularisation: added to the diagonal of the unit Gram matrix, so that opposed gradients keep weights finite,
        >= 0.
      num_steps: Newton steps, >= 1.
    """

    regularisation: float = 1e-6
    num_steps: int = 50

    def __post_init__(self) -> None:
        _check_regularisation("NashMTL regularisation", self.regularisation)
        _check_steps("NashMTL steps", self.num_steps)

    def combine(self, gram: Float[Array, "k k"], used: Bool[Array, " k"]) -> Combined:
        """See `Rule.combine`."""
        size = gram.shape[0]
        # Rescaling a gradient rescales its weight inversely, so unit gradients lose nothing and condition best.
        shorten = inverse(lengths(gram))
        identity = jnp.eye(size)
        regular = rescaled(gram, shorten) + self.regularisation * identity
        # Rewards that are not used get a problem of their own, 1 = 1 / alpha, apart from the others.
        matrix = jnp.where(pairs(used), regular, identity)

        def newton(_: jax.Array, alpha: jax.Array) -> jax.Array:
            slope = product(matrix, alpha) - 1.0 / alpha
            # In units of alpha the Hessian is D G D + I: no worse than the problem, however far alpha has spread.
            hessian = rescaled(matrix, alpha) + identity
            solved = jnp.linalg.solve(hessian, alpha * slope)
            step = alpha * solved
            square = jnp.dot(slope, step)
            decrement = jnp.sqrt(jnp.maximum(square, 0.0))
            # Full steps near the solution, where they converge quadratically; damped ones keep alpha positive.
            damping = jnp.where(decrement > 0.25, decrement, 0.0)
            return alpha - step / (1.0 + damping)

        start = jnp.full(size, 1.0 / size**0.5)
        alpha = jax.lax.fori_loop(0, self.num_steps, newton, start)
        alpha = jnp.where(used, alpha, 0.0) * shorten
        return alpha / _length(gram, alpha), True
