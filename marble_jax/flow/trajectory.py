"""Sampling with noise along the way, and what is kept of it: the states that a policy gradient is taken at."""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from marble_jax.flow.path import clean_estimate, expand, sample_mean
from marble_jax.flow.sampler import VelocityFn
from marble_jax.flow.stochastic import StochasticTable


@flax.struct.dataclass
class Transitions:
    """States of n samples at W steps with noise; neighbours share a state, so that each is kept once.

    Attributes:
      states: float32 [n, W + 1, *latent], the state before each of the steps and behind the last.
      start: int32 [n], step that the first state is before.
      log_prob: float32 [n, W], log-probability of each step under the policy that sampled it.
    """

    states: jax.Array
    start: jax.Array
    log_prob: jax.Array


@flax.struct.dataclass
class Transition:
    """One step with noise of each of n samples.

    Attributes:
      before: float32 [n, *latent], the state before it.
      after: float32 [n, *latent], the state behind it.
      log_prob: float32 [n], its log-probability under the policy that sampled it.
    """

    before: jax.Array
    after: jax.Array
    log_prob: jax.Array


def transition_at(
    kept: Transitions, samples: tuple[jax.Array, ...], step: Int[Array, " n"]
) -> Transition:
    """One step of each of n samples, of whose window nothing else is read.

    Args:
      kept: windows of steps; its leaves may have any number of axes in front.
      samples: int32 [n] for each of these axes, where a sample is.
      step: of each of them, within its window.
    """
    place = step - kept.start[samples]
    return Transition(
        before=kept.states[(*samples, place)],
        after=kept.states[(*samples, place + 1)],
        log_prob=kept.log_prob[(*samples, place)],
    )


def step_mean(
    x: Float[Array, " n *latent"],
    velocity: Float[Array, " n *latent"],
    sigma: Float[Array, " n"] | Float[Array, ""],
    state: Float[Array, " n"] | Float[Array, ""],
    current: Float[Array, " n"] | Float[Array, ""],
) -> Float[Array, " n *latent"]:
    """Mean of a step: `state x + current (x - sigma v)`, in the order of operations of the sampler.

    Args:
      x: states.
      velocity: of the policy at them.
      sigma: noise levels, one a sample or one for all; so are the others.
      state: coefficient of the state.
      current: coefficient of the clean estimate.
    """
    estimate = clean_estimate(x, velocity, sigma)
    return expand(state, x) * x + expand(current, x) * estimate


def log_density(
    error: Float[Array, " n *latent"],
    std: Float[Array, " n"] | Float[Array, ""],
    has_density: bool,
) -> Float[Array, " n"]:
    """Log-probability of a step, averaged over the elements of a sample and not summed.

    Args:
      error: next state minus the step's mean.
      std: standard deviation of the step's noise, > 0.
      has_density: whether scale and constants belong to it; without them it is the negative mean square of the error.

    Source: Flow-GRPO (arXiv 2505.05470) for the mean over elements; arXiv 2509.05952 for the form without constants.
    """
    square = sample_mean(jnp.square(error))
    if not has_density:
        return -square
    scaled = square / (2.0 * jnp.square(std))
    return -scaled - jnp.log(std) - 0.5 * math.log(2.0 * math.pi)


def table_rows(table: StochasticTable) -> Float[np.ndarray, "steps 3"]:
    """Returns state, current and noise of every step in float32: what a compiled run takes as an argument."""
    columns = np.stack([table.state, table.current, table.noise], axis=1)
    return columns.astype(np.float32)


def sample_transitions(
    velocity_fn: VelocityFn,
    noise: Float[Array, " n *latent"],
    sigmas: Float[np.ndarray, " levels"],
    rows: Float[Array, "steps 3"],
    key: jax.Array,
    start: Int[Array, ""] | int,
    size: int,
    has_density: bool,
    network_sigmas: Float[np.ndarray, " steps"] | None = None,
) -> tuple[Float[Array, " n *latent"], Transitions]:
    """Integrates noise down to the last level, with noise along the way, and keeps the states of a window.

    Where the window begins is an argument of the compiled program, so that a moving window is one program.

    Args:
      velocity_fn: velocity of a batch at one noise level.
      noise: [n, ...] standard normal.
      sigmas: [N + 1] noise levels.
      rows: from `table_rows`, without noise outside the window.
      key: PRNG key of the batch's noise along the way.
      start: first step of the window.
      size: W, its steps.
      has_density: see `log_density`.
      network_sigmas: [N] levels handed to the network where they differ from `sigmas[:-1]`.

    Returns:
      float32 [n, ...] clean latents, and the transitions of the window.
    """
    levels = np.asarray(sigmas[:-1], np.float32)
    network_levels = levels
    if network_sigmas is not None:
        network_levels = np.asarray(network_sigmas, np.float32)
    num_samples = noise.shape[0]

    def step(carry: Any, row: Any) -> tuple[Any, None]:
        x, states, log_probs = carry
        number, sigma, network_sigma, (state, current, std) = row
        velocity = velocity_fn(x, network_sigma).astype(jnp.float32)
        mean = step_mean(x, velocity, sigma, state, current)
        fresh = jax.random.normal(jax.random.fold_in(key, number), x.shape)
        after = mean + std * fresh
        place = number - start
        # Of steps outside the window nothing is kept. They get the first place that neither array has, so that `drop`
        # leaves out what they write; a place below 0 would count from the end.
        beyond = size + 1
        slot = jnp.where((place >= 0) & (place < size), place, beyond)
        states = states.at[slot].set(x, mode="drop")
        states = states.at[slot + 1].set(after, mode="drop")
        # Steps without noise have no density, and are not kept either.
        log_prob = log_density(after - mean, jnp.where(std > 0, std, 1.0), has_density)
        log_probs = log_probs.at[slot].set(log_prob, mode="drop")
        return (after, states, log_probs), None

    x = noise.astype(jnp.float32)
    states = jnp.zeros((size + 1, *x.shape), jnp.float32)
    log_probs = jnp.zeros((size, num_samples), jnp.float32)
    numbers = np.arange(len(levels), dtype=np.int32)
    (x, states, log_probs), _ = jax.lax.scan(
        step, (x, states, log_probs), (numbers, levels, network_levels, jnp.asarray(rows))
    )
    # Samples are the first axis of whatever is kept of them.
    transitions = Transitions(
        states=jnp.moveaxis(states, 0, 1),
        start=jnp.full(num_samples, start, jnp.int32),
        log_prob=log_probs.T,
    )
    return x, transitions
