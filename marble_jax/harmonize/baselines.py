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

from marble_jax.errors import InputError
from marble_jax.harmonize import qp
from marble_jax.harmonize.balancers import (
    Balancer,
    Solution,
    closed_form_status,
    inverse,
    mean_over,
    usable,
)

_HIGHEST = jax.lax.Precision.HIGHEST


def _product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.dot(matrix, vector, precision=_HIGHEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(Balancer):
    """A balancer given by a function of the usable gradients' scaled Gram matrix.

    Attributes:
      normalize: feed unit gradients at the mean gradient norm instead of the raw ones.
    """

    normalize: bool = False

    @abc.abstractmethod
    def combine(self, gram: jax.Array, used: jax.Array) -> jax.Array:
        """Weights [K] on the scaled vectors, whose Gram matrix is 0 outside `used`."""

    def __call__(self, gram: jax.Array, valid: jax.Array, state: Any = ()) -> Solution:
        gram, norms, used = usable(gram, valid)
        length = mean_over(norms, used)
        factor = inverse(norms) if self.normalize else jnp.where(used, inverse(length), 0.0)
        weights = jnp.where(used, self.combine(gram * factor[:, None] * factor[None], used), 0.0)
        weights = jnp.where(
            jnp.all(jnp.isfinite(weights)), weights, used / jnp.maximum(jnp.sum(used), 1)
        )
        weights = jnp.where(jnp.sum(used) == 1, used.astype(jnp.float32), weights)
        raw = weights * factor * length
        total = jnp.sum(raw)
        safe = jnp.abs(total) > 1e-30
        alpha = jnp.where(safe, raw / jnp.where(safe, total, 1.0), 0.0)
        return Solution(
            weights=raw,
            alpha=alpha,
            scale=jnp.where(used, total, 0.0),
            used=used,
            norms=norms,
            min_norm=jnp.zeros(()),
            kkt_residual=jnp.zeros(()),
            status=closed_form_status(used),
            state=state,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UPGrad(Rule):
    """The mean of the gradients' projections onto the cone of directions that conflict with none of them.

    Source: UPGrad, "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232).

    Attributes:
      regularisation: added to the diagonal of the scaled Gram matrix.
      num_sweeps: sweeps of coordinate descent on the K dual problems.
    """

    regularisation: float = 1e-4
    num_sweeps: int = 200

    def combine(self, gram: jax.Array, used: jax.Array) -> jax.Array:
        size = gram.shape[0]
        matrix = gram + self.regularisation * jnp.eye(size)
        lower = jnp.eye(size) * used

        def update(index: jax.Array, weights: jax.Array) -> jax.Array:
            # Row i of `weights` solves: minimise w^T G w subject to w >= e_i. One coordinate of all rows at once.
            j = index % size
            rest = _product(weights, matrix[:, j]) - weights[:, j] * matrix[j, j]
            return weights.at[:, j].set(
                jnp.maximum(lower[:, j], jnp.where(used[j], -rest / matrix[j, j], 0.0))
            )

        weights = jax.lax.fori_loop(0, self.num_sweeps * size, update, lower)
        return jnp.sum(weights, axis=0) / jnp.maximum(jnp.sum(used), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCGrad(Rule):
    """Every gradient with its conflicting parts along the others projected out, averaged.

    Source: PCGrad (arXiv 2001.06782). Deviations: the others are visited in their fixed order starting after the
    gradient itself, where the paper draws it; the projections are averaged, where the paper sums them.
    """

    def combine(self, gram: jax.Array, used: jax.Array) -> jax.Array:
        size = gram.shape[0]
        square = jnp.diagonal(gram)

        def project(first: jax.Array) -> jax.Array:
            def visit(offset: jax.Array, weights: jax.Array) -> jax.Array:
                j = (first + offset) % size
                inner = _product(weights, gram[:, j])
                conflicting = used[j] & (inner < 0)
                return weights.at[j].add(
                    jnp.where(conflicting, -inner / jnp.where(used[j], square[j], 1.0), 0.0)
                )

            return jax.lax.fori_loop(1, size, visit, jax.nn.one_hot(first, size))

        weights = jax.vmap(project)(jnp.arange(size))
        return jnp.sum(jnp.where(used[:, None], weights, 0.0), axis=0) / jnp.maximum(
            jnp.sum(used), 1
        )


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

    def combine(self, gram: jax.Array, used: jax.Array) -> jax.Array:
        even = used / jnp.maximum(jnp.sum(used), 1)
        towards = _product(gram, even)
        radius = self.c * jnp.sqrt(jnp.maximum(jnp.dot(even, towards), 0.0))

        def dual(w: jax.Array) -> jax.Array:
            return jnp.dot(w, towards) + radius * jnp.sqrt(jnp.dot(w, _product(gram, w)) + 1e-12)

        w = qp.minimise_on_simplex(dual, used)
        length = jnp.sqrt(jnp.maximum(jnp.dot(w, _product(gram, w)), 1e-12))
        return even + radius / length * w


@dataclasses.dataclass(frozen=True, kw_only=True)
class IMTLG(Rule):
    """The combination with equal projections onto all unit gradients; weights sum to 1 and may be negative.

    Source: IMTL-G, "Towards Impartial Multi-task Learning" (ICLR 2021), solved with a pseudo-inverse as G w = norms.
    """

    def combine(self, gram: jax.Array, used: jax.Array) -> jax.Array:
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
        weights = _product(jnp.linalg.pinv(gram, rtol=1e-6, hermitian=True), norms)
        total = jnp.sum(weights)
        even = used / jnp.maximum(jnp.sum(used), 1)
        return jnp.where(
            jnp.abs(total) > 1e-6, weights / jnp.where(jnp.abs(total) > 1e-6, total, 1.0), even
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NashMTL(Rule):
    """The Nash bargaining solution: positive weights with `G alpha = 1 / alpha`.

    It is the stationary point of the strictly convex `alpha^T G alpha / 2 - sum log alpha`, found by damped Newton.

    Source: Nash-MTL (arXiv 2202.01017). Deviations: solved anew and to the end at every call, where the paper reuses
    old weights and a few rounds of a concave-convex approximation; the update is scaled to the mean gradient norm,
    where the paper's has length sqrt(K) before clipping.

    Attributes:
      regularisation: added to the diagonal of the unit Gram matrix, so that opposed gradients keep weights finite.
      num_steps: Newton steps.
    """

    regularisation: float = 1e-6
    num_steps: int = 50

    def combine(self, gram: jax.Array, used: jax.Array) -> jax.Array:
        size = gram.shape[0]
        # Rescaling a gradient rescales its weight inversely, so unit gradients lose nothing and condition best.
        shorten = inverse(jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0)))
        unit = gram * shorten[:, None] * shorten[None]
        matrix = jnp.where(
            used[:, None] & used[None], unit + self.regularisation * jnp.eye(size), jnp.eye(size)
        )

        def newton(_: jax.Array, alpha: jax.Array) -> jax.Array:
            slope = _product(matrix, alpha) - 1.0 / alpha
            # In units of alpha the Hessian is D G D + I: no worse than the problem, however far alpha has spread.
            step = alpha * jnp.linalg.solve(
                matrix * alpha[:, None] * alpha[None] + jnp.eye(size), alpha * slope
            )
            decrement = jnp.sqrt(jnp.maximum(jnp.dot(slope, step), 0.0))
            return alpha - step / (1.0 + jnp.where(decrement > 0.25, decrement, 0.0))

        alpha = jax.lax.fori_loop(0, self.num_steps, newton, jnp.full(size, 1.0 / size**0.5))
        alpha = jnp.where(used, alpha, 0.0) * shorten
        length = jnp.sqrt(jnp.maximum(jnp.dot(alpha, _product(gram, alpha)), 1e-12))
        return alpha / length
