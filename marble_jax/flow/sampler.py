"""The sampling loop: one `lax.scan` over a table of solver coefficients, one network call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from marble_jax.errors import InputError
from marble_jax.flow.path import clean_estimate
from marble_jax.flow.solvers import SolverTable

VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]
"""velocity_fn(x [n, ...] float32, sigma scalar) -> [n, ...] in any float dtype."""


def sample(
    velocity_fn: VelocityFn,
    noise: Float[Array, " n *latent"],
    sigmas: Float[np.ndarray, " levels"],
    table: SolverTable,
    network_sigmas: Float[np.ndarray, " steps"] | None = None,
) -> Float[Array, " n *latent"]:
    """Integrates noise down to the last noise level.

    The state is float32 throughout, whatever the dtype of the noise or of the velocity.

    Args:
      velocity_fn: velocity of a batch at one noise level; casts its input to the compute dtype itself.
      noise: [n, ...] standard normal.
      sigmas: [N + 1] noise levels, the ones `table` was made from.
      table: coefficients of the solver.
      network_sigmas: [N] levels handed to the network where they differ from `sigmas[:-1]` (`levels.truncated`).

    Returns:
      float32 [n, ...], clean latents when the last level is 0.

    Raises:
      InputError: the table and the levels differ in length.
    """
    if len(sigmas) != table.num_steps + 1:
        raise InputError(
            f"noise levels: expected {table.num_steps + 1} for a solver table of {table.num_steps} "
            f"steps; received {len(sigmas)}"
        )
    levels = np.asarray(sigmas[:-1], np.float32)
    network_levels = levels
    if network_sigmas is not None:
        network_levels = np.asarray(network_sigmas, np.float32)
    if table.corrector is not None:
        return _sample_corrected(velocity_fn, noise, levels, network_levels, table)
    # Coefficients are made in float64 on the host; the state that they multiply is float32.
    columns = [np.asarray(c, np.float32) for c in (table.state, table.current, table.previous)]

    def step(
        carry: tuple[jax.Array, jax.Array], row: Any
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, previous = carry
        sigma, network_sigma, a, b, c = row
        velocity = velocity_fn(x, network_sigma).astype(jnp.float32)
        estimate = clean_estimate(x, velocity, sigma)
        x = a * x + b * estimate + c * previous
        return (x, estimate), None

    x = noise.astype(jnp.float32)
    # The first step has no estimate before it; its coefficient is zero.
    carry = (x, jnp.zeros_like(x))
    (x, _), _ = jax.lax.scan(step, carry, (levels, network_levels, *columns))
    return x


_Corrected = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Predicted and corrected state, and the last two clean estimates."""


def _sample_corrected(
    velocity_fn: VelocityFn,
    noise: Float[Array, " n *latent"],
    levels: np.ndarray,
    network_levels: np.ndarray,
    table: SolverTable,
) -> Float[Array, " n *latent"]:
    """`sample` with a predictor-corrector, whose state is corrected once the network was called at it."""
    columns = [
        np.asarray(c, np.float32)
        for c in (table.state, table.current, table.previous, table.corrector)
    ]

    def step(carry: _Corrected, row: Any) -> tuple[_Corrected, None]:
        predicted, corrected, previous, before = carry
        sigma, network_sigma, a, b, c, (p, q, r, s) = row
        velocity = velocity_fn(predicted, network_sigma).astype(jnp.float32)
        estimate = clean_estimate(predicted, velocity, sigma)
        corrected = p * corrected + q * previous + r * before + s * estimate
        predicted = a * corrected + b * estimate + c * previous
        return (predicted, corrected, estimate, previous), None

    x = noise.astype(jnp.float32)
    # The first steps have no estimates before them; their coefficients are zero.
    carry: _Corrected = (x, x, jnp.zeros_like(x), jnp.zeros_like(x))
    rows: Any = (levels, network_levels, *columns)
    last, _ = jax.lax.scan(step, carry, rows)
    return last[0]


def guided(
    velocity: Callable[[jax.Array, jax.Array, Any], jax.Array],
    cond: Any,
    negative: Any,
    guidance_scale: float,
) -> VelocityFn:
    """Builds the velocity function of classifier-free guidance: `v_neg + guidance_scale (v_cond - v_neg)`.

    Up to a scale of 1 guidance is off and the network runs once per step on `cond` alone; above it one call on the
    doubled batch serves both.

    Args:
      velocity: velocity(x [m, ...], sigma scalar, cond with leaves [m, ...]).
      cond: conditioning, a pytree with leaves [n, ...].
      negative: conditioning of the negative prompt, the same structure; may be None with guidance off.
      guidance_scale: 1 or less for no guidance.

    Source: classifier-free guidance (arXiv 2207.12598), with the switch at 1 of the diffusers pipelines.
    """
    if guidance_scale <= 1.0:
        return lambda x, sigma: velocity(x, sigma, cond)
    # The negative prompt first, as in diffusers' batches.
    both = jax.tree.map(_one_behind_another, negative, cond)

    def velocity_fn(x: jax.Array, sigma: jax.Array) -> jax.Array:
        doubled = jnp.concatenate([x, x])
        # float32 before the difference is scaled: in bfloat16 the scale would multiply its rounding error.
        velocities = velocity(doubled, sigma, both).astype(jnp.float32)
        away, towards = jnp.split(velocities, 2)
        return extrapolated(away, towards, guidance_scale)

    return velocity_fn


def extrapolated(
    away: Float[Array, " n *latent"], towards: Float[Array, " n *latent"], guidance_scale: float
) -> Float[Array, " n *latent"]:
    """Velocity of classifier-free guidance, from those of the negative prompt and of the prompt."""
    return away + guidance_scale * (towards - away)


def _one_behind_another(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first, second])
