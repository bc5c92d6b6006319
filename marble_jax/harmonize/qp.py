"""The smallest vector in the convex hull of K gradients, from their Gram matrix alone.

    minimise alpha^T G alpha   subject to   sum(alpha) = 1, alpha >= floor

jaxopt's accelerated projected gradient finds the neighbourhood of the solution; a primal active-set iteration then
walks to the exact face, solving the equality-constrained problem on the support with a pseudo-inverse, so that
rank-deficient, duplicated and zero rows are no special cases. On unit Grams the first part alone leaves KKT residuals
of up to 2e-4 (60 iterations, K = 20) and still 7e-6 after 3000; the pair stays below 5e-7 and takes a third of a
millisecond on a CPU core.

This is the only module that imports jaxopt. The import warns that the package is archived; the warning is silenced
here. Everything runs in float32 at highest matrix precision, whatever the x64 setting.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.harmonize.gram import (
    count_or_one,
    divide,
    even_shares,
    pairs,
    product,
    rescaled,
)

SOLVED, NONE_VALID, ONE_VALID, INACCURATE = 0, 1, 2, 3
STATUS_NAMES = ("solved", "none_valid", "one_valid", "inaccurate")

KKT_TOLERANCE = 1e-6
_WARM_STEPS = 60
_RCOND = 1e-6
_ZERO = 1e-7
_SLOPE_ROUNDING = 2e-7


@flax.struct.dataclass
class MinNorm:
    """Solution of the min-norm problem.

    Attributes:
      alpha: float32 [K] on the simplex; 0 for rewards that are not valid, all 0 when none is.
      kkt_residual: float32 scalar, largest violation of the optimality conditions relative to the largest valid
        diagonal entry of the Gram matrix.
      value: float32 scalar, alpha^T G alpha in the units of the Gram matrix.
      status: int32 scalar, index into STATUS_NAMES.
    """

    alpha: jax.Array
    kkt_residual: jax.Array
    value: jax.Array
    status: jax.Array


@functools.cache
def _jaxopt() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxopt
    return jaxopt


def kkt_residual(
    gram: Float[Array, "k k"],
    alpha: Float[Array, " k"],
    valid: Bool[Array, " k"],
    floor: jax.Array | float = 0.0,
) -> Float[Array, ""]:
    """Violation of the optimality conditions of the min-norm problem, 0 at a solution.

    At a solution `(G alpha)_k` equals one multiplier where `alpha_k > floor` and is no smaller where it sits on the
    floor. The residual is the largest shortfall below the multiplier, the largest excess of a coordinate above it
    times that coordinate's distance from the floor, or the violation of the constraints, whichever is largest.

    Args:
      gram: inner products, scaled to a largest valid diagonal of 1 for a relative residual.
      alpha: weights.
      valid: rewards that take part; what the others hold is left out.
      floor: lower bound of the valid alphas.
    """
    # What rewards that are not valid hold may be anything, in the matrix and in alpha.
    gram = jnp.where(pairs(valid), gram, 0.0)
    alpha = jnp.where(valid, alpha, 0.0)
    slope = product(gram, alpha)
    # They have no floor to be above either.
    free = jnp.where(valid, alpha - floor, 0.0)
    total_free = jnp.sum(free)
    multiplier = jnp.sum(free * slope) / jnp.maximum(total_free, 1e-30)
    # With every alpha on the floor no slope is the multiplier: the smallest one serves.
    pinned = total_free <= 1e-6
    smallest = jnp.min(jnp.where(valid, slope, jnp.inf))
    multiplier = jnp.where(pinned, smallest, multiplier)
    # The slope of a reward that cannot move may be anything.
    gap = jnp.where(valid, slope - multiplier, 0.0)
    total = jnp.sum(alpha)
    off_the_simplex = jnp.abs(total - 1.0)
    infeasible = jnp.maximum(jnp.max(-free), off_the_simplex)
    violations = [jnp.max(-gap), jnp.max(gap * free), infeasible]
    return jnp.max(jnp.stack(violations))


def _normalised(gram: jax.Array, valid: jax.Array) -> jax.Array:
    """The valid block scaled to a largest diagonal of 1; a 1 on the diagonal elsewhere, where alpha is 0 anyway."""
    # Replaced and not multiplied by 0: what the other rows hold need not be finite.
    gram = jnp.where(pairs(valid), gram, 0.0)
    largest = jnp.max(jnp.diagonal(gram))
    # A block of zeros stays one.
    scaled = gram / jnp.where(largest > 0, largest, 1.0)
    # Rounding in the sums of a Gram matrix need not be symmetric.
    return 0.5 * (scaled + scaled.T)


def _project(b: jax.Array, valid: jax.Array) -> jax.Array:
    """Nearest point of the simplex on the valid coordinates."""
    # Far below every valid coordinate, an absent one is thresholded to exactly 0.
    lowered = jnp.where(valid, b, -1e6)
    projection = _jaxopt().projection
    return projection.projection_simplex(lowered)


def _projected_gradient(
    objective: Callable[[jax.Array], jax.Array], valid: jax.Array, **settings: Any
) -> jax.Array:
    """Minimiser over the simplex on the valid coordinates by jaxopt's projected gradient, from equal weights.

    Args:
      objective: smooth and convex.
      valid: coordinates that may be above 0.
      **settings: of the solver.
    """
    solver = _jaxopt().ProjectedGradient(
        fun=objective,
        projection=lambda b, _: _project(b, valid),
        tol=1e-7,
        # Nothing is differentiated through the solver.
        implicit_diff=False,
        jit=True,
        **settings,
    )
    start = even_shares(valid).astype(jnp.float32)
    solution = solver.run(start, None)
    # Without a valid coordinate the projection shares the whole out among the others.
    return jnp.where(valid, solution.params, 0.0)


def _warm_start(matrix: jax.Array, linear: jax.Array, valid: jax.Array) -> jax.Array:
    """Accelerated projected gradient on the simplex for 1/2 b^T matrix b + linear^T b."""

    def objective(b: jax.Array) -> jax.Array:
        quadratic = jnp.dot(b, product(matrix, b))
        return 0.5 * quadratic + jnp.dot(linear, b)

    # The largest row sum bounds the largest eigenvalue, and its inverse the step that still descends.
    row_sums = jnp.sum(jnp.abs(matrix), axis=1)
    bound = jnp.maximum(jnp.max(row_sums), 1e-30)
    return _projected_gradient(
        objective,
        valid,
        acceleration=True,
        stepsize=lambda _: 1.0 / bound,
        maxiter=_WARM_STEPS,
    )


def _equality_solution(matrix: jax.Array, linear: jax.Array, support: jax.Array) -> jax.Array:
    """Minimiser over the affine hull of a support: sum b = 1, b = 0 elsewhere; the shortest one when not unique."""
    size = matrix.shape[0]
    on = support.astype(matrix.dtype)
    # The last row and column hold the multiplier of the constraint sum b = 1.
    system = jnp.zeros((size + 1, size + 1), matrix.dtype)
    system = system.at[:size, :size].set(rescaled(matrix, on))
    system = system.at[size, :size].set(on)
    system = system.at[:size, size].set(on)
    target = jnp.append(-linear * on, 1.0)
    solve = _pseudo_inverse(system)
    x = solve(target)
    # One refinement: the eigenvectors of a nearly singular system are good to few digits.
    missed = target - product(system, x)
    x = x + solve(missed)
    # The last entry is the multiplier; those outside the support are 0 up to rounding.
    b = jnp.where(support, x[:size], 0.0)
    return _down_the_flat(matrix, linear, support, b)


def _pseudo_inverse(system: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The shortest solution of a symmetric system as a function of its right-hand side."""
    values, vectors = jnp.linalg.eigh(system)
    sizes = jnp.abs(values)
    largest = jnp.max(sizes)
    # Directions below the cut-off are left out.
    inverse = divide(jnp.ones_like(values), values, sizes > _RCOND * largest)

    def solve(target: jax.Array) -> jax.Array:
        coordinates = product(vectors.T, target)
        return product(vectors, inverse * coordinates)

    return solve


def _down_the_flat(
    matrix: jax.Array, linear: jax.Array, support: jax.Array, b: jax.Array
) -> jax.Array:
    """Follows what remains of the slope on a support after the directions that a pseudo-inverse leaves out.

    Such directions are nearly flat but can still slope (two almost equal gradients): an exact line search. The caller
    stops it at the boundary.
    """
    on = support.astype(matrix.dtype)
    slope = product(matrix, b) + linear
    size = jnp.maximum(jnp.sum(on), 1.0)
    mean = jnp.sum(slope * on) / size
    # Less its mean the slope keeps sum b = 1, and outside the support nothing may move.
    remainder = jnp.where(support, slope - mean, 0.0)
    square = jnp.dot(remainder, remainder)
    curvature = jnp.dot(remainder, product(matrix, remainder))
    length = square / jnp.maximum(curvature, 1e-9 * square + 1e-30)
    steepest = jnp.max(jnp.abs(remainder))
    return jnp.where(steepest > _SLOPE_ROUNDING, b - length * remainder, b)


class _Walk(NamedTuple):
    """State of the walk from face to face; `best` is the point of the least violation so far."""

    num_moves: jax.Array
    b: jax.Array
    support: jax.Array
    best: jax.Array
    best_violation: jax.Array
    done: jax.Array


def _simplex_qp(matrix: jax.Array, linear: jax.Array, valid: jax.Array) -> jax.Array:
    """Minimises 1/2 b^T matrix b + linear^T b over the simplex on `valid` coordinates."""
    size = matrix.shape[0]

    def violation(b: jax.Array) -> jax.Array:
        slope = product(matrix, b) + linear
        multiplier = jnp.dot(b, slope)
        # A coordinate that must stay 0 violates nothing.
        gap = jnp.where(valid, slope - multiplier, 0.0)
        return jnp.maximum(jnp.max(-gap), jnp.max(gap * b))

    def unfinished(walk: _Walk) -> jax.Array:
        # A walk visits few faces; rounding may have it go round in circles.
        has_time = walk.num_moves < 20 * size + 20
        return ~walk.done & has_time

    def move(walk: _Walk) -> _Walk:
        target = _equality_solution(matrix, linear, walk.support)
        moved, leaves, blocked = _step_towards(walk.b, target, walk.support)
        # On the face's minimiser: optimal unless a coordinate has a smaller slope than the multiplier.
        slope = product(matrix, moved) + linear
        multiplier = jnp.dot(moved, slope)
        # Nor may it be the one that enters.
        gap = jnp.where(valid, slope - multiplier, jnp.inf)
        optimal = jnp.min(gap) >= -_SLOPE_ROUNDING
        enters = _only(jnp.argmin(gap), ~blocked & ~optimal, walk.support)
        amount = violation(moved)
        better = amount < walk.best_violation
        return _Walk(
            num_moves=walk.num_moves + 1,
            b=moved,
            support=(walk.support & ~leaves) | enters,
            best=jnp.where(better, moved, walk.best),
            best_violation=jnp.where(better, amount, walk.best_violation),
            done=~blocked & optimal,
        )

    warm = _warm_start(matrix, linear, valid)
    start = _Walk(
        num_moves=jnp.zeros((), jnp.int32),
        b=warm,
        support=valid & (warm > 1e-4),
        best=warm,
        best_violation=violation(warm),
        done=jnp.zeros((), bool),
    )
    end = jax.lax.while_loop(unfinished, move, start)
    return end.best


def _step_towards(
    b: jax.Array, target: jax.Array, support: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Longest feasible step towards a face's minimiser.

    Returns:
      The new point, the coordinate that blocked the step and leaves the support (bool [K]), and whether one did.
    """
    heading_out = support & (target < -_ZERO)
    # Only coordinates that leave the simplex limit the step; the divisor is 1 for the others.
    distance = jnp.where(heading_out, b - target, 1.0)
    ratio = jnp.where(heading_out, b / distance, jnp.inf)
    blocked = jnp.any(heading_out)
    longest = jnp.clip(jnp.min(ratio), 0.0, 1.0)
    length = jnp.where(blocked, longest, 1.0)
    step = length * (target - b)
    moved = jnp.maximum(b + step, 0.0)
    total = jnp.maximum(jnp.sum(moved), 1e-30)
    leaves = _only(jnp.argmin(ratio), blocked, support)
    # Rounding may leave the blocking coordinate a little above 0.
    moved = jnp.where(leaves, 0.0, moved / total)
    return moved, leaves, blocked


def _only(index: jax.Array, value: jax.Array, like: jax.Array) -> jax.Array:
    """`value` at one index, False elsewhere."""
    nowhere = jnp.zeros_like(like)
    return nowhere.at[index].set(value)


@jax.jit
def min_norm(
    gram: Float[Array, "k k"], valid: Bool[Array, " k"], floor: jax.Array | float = 0.0
) -> MinNorm:
    """Convex weights of the shortest combination of K vectors.

    Args:
      gram: inner products in any scale between about 1e-30 and 1e30. Rows of rewards that are not valid may hold
        anything, non-finite numbers included.
      valid: rewards that take part.
      floor: smallest alpha of a valid reward, at least 0; taken as 1 / (number of valid rewards) where larger.

    Returns:
      MinNorm. With no valid reward alpha is all 0; with one it is 1 there. A non-finite valid block gives uniform
      weights over the valid rewards and the status "inaccurate".

    Source: the min-norm problem of MGDA (Desideri 2012), on the simplex with a floor.
    """
    gram = jnp.asarray(gram, jnp.float32)
    count = jnp.sum(valid)
    divisor = count_or_one(valid).astype(jnp.float32)
    share = 1.0 / divisor
    # The answer where there is nothing to solve, or nothing that could be solved.
    even = jnp.where(valid, share, 0.0)
    floor = jnp.clip(jnp.asarray(floor, jnp.float32), 0.0, share)
    matrix = _normalised(gram, valid)
    finite = jnp.all(jnp.isfinite(matrix))
    # The identity stands in for what is not finite; its solution is not used.
    identity = jnp.eye(len(gram), dtype=jnp.float32)
    matrix = jnp.where(finite, matrix, identity)
    centred = _spread_apart(matrix, valid)
    # alpha = floor + remainder * b moves the floor into a linear term and leaves b on the plain simplex.
    remainder = 1.0 - count * floor
    # A reward that is not valid has no floor.
    base = jnp.where(valid, floor, 0.0)
    b = _simplex_qp(remainder * centred, product(centred, base), valid)
    above = jnp.maximum(remainder, 0.0) * b
    # As `MinNorm` has it, whatever a walk leaves elsewhere.
    alpha = jnp.where(valid, base + above, 0.0)
    total = jnp.maximum(jnp.sum(alpha), 1e-30)
    alpha = jnp.where(finite, alpha / total, even)
    residual = kkt_residual(matrix, alpha, valid, floor)
    # With one reward or none there is nothing to solve.
    several = count > 1
    residual = jnp.where(several, residual, 0.0)
    alpha = jnp.where(several, alpha, even)
    # The value is in the units of the matrix that came, whose other rows may hold anything.
    clean = jnp.where(pairs(valid), gram, 0.0)
    value = jnp.dot(alpha, product(clean, alpha))
    accurate = finite & (residual <= KKT_TOLERANCE)
    return MinNorm(
        alpha=alpha,
        kkt_residual=residual,
        value=value,
        status=_status(count, accurate),
    )


def _spread_apart(matrix: jax.Array, valid: jax.Array) -> jax.Array:
    """The valid block less what all of its entries share, scaled to a largest diagonal of 1.

    A constant added to every entry adds a constant to the objective on the simplex. Taking it out spreads almost
    parallel gradients apart; the difference of close floats is exact.
    """
    smallest = jnp.min(jnp.where(pairs(valid), matrix, jnp.inf))
    shared = jnp.maximum(smallest, 0.0)
    # Without a valid reward the smallest of none is infinite.
    shared = jnp.where(jnp.any(valid), shared, 0.0)
    return _normalised(matrix - shared, valid)


def _status(count: jax.Array, accurate: jax.Array) -> jax.Array:
    """Index into STATUS_NAMES of a solve with `count` valid rewards."""
    status = jnp.where(accurate, SOLVED, INACCURATE)
    status = jnp.where(count == 1, ONE_VALID, status)
    status = jnp.where(count == 0, NONE_VALID, status)
    return status.astype(jnp.int32)


def minimise_on_simplex(
    objective: Callable[[jax.Array], jax.Array], valid: Bool[Array, " k"], num_steps: int = 300
) -> Float[Array, " k"]:
    """Minimiser of a smooth convex function over the simplex on the valid coordinates, by projected gradient.

    For balancers whose objective is not quadratic; accurate to a few digits, unlike `min_norm`.
    """
    return _projected_gradient(objective, valid, maxiter=num_steps)
