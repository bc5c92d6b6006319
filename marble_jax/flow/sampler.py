"""The sampling loop: one `lax.scan` over a table of solver coefficients, one network call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.flow.path import clean_estimate
from marble_jax.flow.solvers import SolverTable

VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]
"""velocity_fn(x [n, ...] float32, sigma scalar) -> [n, ...] in any float dtype."""


def sample(
    velocity_fn: VelocityFn,
    noise: jax.Array,
    sigmas: np.ndarray,
    table: SolverTable,
    network_sigmas: np.ndarray | None = None,
) -> jax.Array:
    """Integrates noise down to the last noise level.

    The state is float32 throughout, whatever the dtype of the noise or of the velocity.

    Args:
      velocity_fn: velocity of a batch at one noise level; casts its input to the compute dtype itself.
      noise: [n, ...] standard normal.
      sigmas: [N + 1] noise levels, the ones `table` was made from.
      table: coefficients of the solver.
      network_sigmas: [N] levels handed to the network where they differ from `sigmas[:-1]` (`schedule.truncated`).

    Returns:
      float32 [n, ...], clean latents when the last level is 0.

    Raises:
      InputError: the table and the levels differ in length.
    """
    if len(sigmas) != table.num_steps + 1:
        raise InputError(
            f"noise levels: expected {table.num_steps + 1} for a solver table of {table.num_steps} steps; "
            f"received {len(sigmas)}"
        )
    levels = np.asarray(sigmas[:-1], np.float32)
    seen = levels if network_sigmas is None else np.asarray(network_sigmas, np.float32)
    columns = [np.asarray(c, np.float32) for c in (table.state, table.current, table.previous)]

    def step(
        carry: tuple[jax.Array, ...], row: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...], None]:
        x, before = carry
        sigma, sigma_seen, a, b, c = row
        estimate = clean_estimate(x, velocity_fn(x, sigma_seen).astype(jnp.float32), sigma)
        return (a * x + b * estimate + c * before, estimate), None

    x = noise.astype(jnp.float32)
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), (levels, seen, *columns))
    return x


def guided(
    velocity: Callable[[jax.Array, jax.Array, Any], jax.Array],
    cond: Any,
    negative: Any,
    guidance_scale: float,
) -> VelocityFn:
    """Classifier-free guidance as a velocity function: `v_neg + guidance_scale (v_cond - v_neg)`.

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
    both = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), negative, cond)

    def velocity_fn(x: jax.Array, sigma: jax.Array) -> jax.Array:
        away, towards = jnp.split(
            velocity(jnp.concatenate([x, x]), sigma, both).astype(jnp.float32), 2
        )
        return away + guidance_scale * (towards - away)

    return velocity_fn
