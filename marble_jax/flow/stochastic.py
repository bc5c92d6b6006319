"""Stochastic solvers: steps whose mean is linear, as in `flow.solvers`, and which add noise of a known size.

With m the clean estimate `x - sigma v` at level sigma, a step to level sigma' draws

    x' = a x + b m + s eps,    eps standard normal,

so that a step has a density and a policy gradient can be taken of it. Everything here is made on the host in float64.

Three ways to choose the noise, each with a strength eta:

* `flow_sde`: the SDE with the same marginals, whose diffusion is `eta sqrt(sigma / (1 - sigma))`. Source: Flow-GRPO
  (arXiv 2505.05470). At sigma = 1 the next level stands in for sigma in the root, as in its released code.
* `dance_sde`: the same SDE with the constant diffusion eta. Source: DanceGRPO (arXiv 2505.07818).
* `cps`: noise in place of the predicted noise, so that every level keeps its amount of noise. Source:
  coefficients-preserving sampling (arXiv 2509.05952).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from marble_jax.errors import InputError, one_of
from marble_jax.flow.solvers import first_order

Rows = Float[np.ndarray, " steps"]
"""One number a step."""


@dataclasses.dataclass(frozen=True)
class StochasticTable:
    """Coefficients of an N-step run, float64.

    Attributes:
      sigmas: [N + 1] noise levels, decreasing.
      state: a, of the state.
      current: b, of the clean estimate.
      noise: s, standard deviation of a step; 0 for a step without noise, which then is Euler's.
      diffusion: what the divergence of two policies' means at a step is measured in: `|m - m'|^2 / (2 diffusion^2)`.
      has_density: whether a step's log-probability is that of the normal distribution; False for `cps`, which drops
        the scale and the constants.
    """

    sigmas: Float[np.ndarray, " levels"]
    state: Rows
    current: Rows
    noise: Rows
    diffusion: Rows
    has_density: bool

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.state)

    def in_window(self, start: int, size: int) -> StochasticTable:
        """Returns the table with noise at `size` steps from step `start` on, and Euler's steps elsewhere."""
        step = np.arange(self.num_steps)
        inside = (step >= start) & (step < start + size)
        euler = first_order(self.sigmas)
        # Without noise a step's mean is not Euler's: the coefficients change along with it.
        return dataclasses.replace(
            self,
            state=np.where(inside, self.state, euler.state),
            current=np.where(inside, self.current, euler.current),
            noise=np.where(inside, self.noise, 0.0),
        )


def stochastic_table(
    name: str, sigmas: Float[np.ndarray, " levels"], noise_level: float
) -> StochasticTable:
    """Returns the table of a stochastic solver by name, with noise at every step.

    Args:
      name: "flow_sde", "dance_sde" or "cps".
      sigmas: [N + 1] strictly decreasing noise levels in [0, 1].
      noise_level: eta, >= 0 (at most 1 for "cps"); 0 is Euler's method, to the last bit.

    Raises:
      InputError: an unknown name, unusable levels, or a strength out of range.
    """
    one_of("stochastic solver", name, STOCHASTIC_SOLVERS)
    if not 0 <= noise_level < np.inf or (name == "cps" and noise_level > 1):
        most = "1" if name == "cps" else "any finite number"
        raise InputError(
            f"rollout.noise_level: expected from 0 to {most} with rollout.solver={name}; received {noise_level}"
        )
    euler = first_order(sigmas)
    levels = np.asarray(sigmas, np.float64)
    if noise_level == 0:
        none = np.zeros(euler.num_steps)
        return StochasticTable(levels, euler.state, euler.current, none, none, name != "cps")
    return STOCHASTIC_SOLVERS[name](levels, noise_level)


def _sde(levels: np.ndarray, diffusion: np.ndarray) -> StochasticTable:
    """Euler-Maruyama steps of the SDE with the marginals of the flow and the given diffusion at every step.

    The drift is `v + diffusion^2 / (2 sigma) (x + (1 - sigma) v)`, the second part being half the squared diffusion
    times the negative score.
    """
    sigma, after = levels[:-1], levels[1:]
    step = sigma - after
    half_variance = np.square(diffusion) * step / 2.0
    # Of x and of v; the clean estimate is x - sigma v, so v = (x - m) / sigma.
    of_state = 1.0 - half_variance / sigma
    of_velocity = -step - half_variance * (1.0 - sigma) / sigma
    return StochasticTable(
        sigmas=levels,
        state=of_state + of_velocity / sigma,
        current=-of_velocity / sigma,
        noise=diffusion * np.sqrt(step),
        diffusion=diffusion,
        has_density=True,
    )


def _flow_sde(levels: np.ndarray, noise_level: float) -> StochasticTable:
    sigma = levels[:-1]
    # The diffusion is infinite at sigma = 1.
    below_one = np.where(sigma == 1.0, levels[1:], sigma)
    return _sde(levels, noise_level * np.sqrt(sigma / (1.0 - below_one)))


def _dance_sde(levels: np.ndarray, noise_level: float) -> StochasticTable:
    return _sde(levels, np.full(len(levels) - 1, noise_level))


def _cps(levels: np.ndarray, noise_level: float) -> StochasticTable:
    sigma, after = levels[:-1], levels[1:]
    angle = noise_level * np.pi / 2.0
    # Of the next level's noise, sin^2 is new and cos^2 is the predicted one.
    fresh = after * np.sin(angle)
    predicted = after * np.cos(angle)
    # The predicted noise is x + (1 - sigma) v = (x - (1 - sigma) m) / sigma.
    return StochasticTable(
        sigmas=levels,
        state=predicted / sigma,
        current=(1.0 - after) - predicted * (1.0 - sigma) / sigma,
        noise=fresh,
        diffusion=fresh,
        has_density=False,
    )


STOCHASTIC_SOLVERS: dict[str, Callable[[np.ndarray, float], StochasticTable]] = {
    "flow_sde": _flow_sde,
    "dance_sde": _dance_sde,
    "cps": _cps,
}
"""Makers of tables by the solver's name, from float64 levels and a strength above 0."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps of a rollout that have noise and are trained on.

    Attributes:
      size: how many there are.
      first: first step that a window may begin with.
      end: the step before which every window ends.
      schedule: "fixed" at `first`; "random", drawn anew for every optimiser step; or "sliding", which moves on by one
        step every `every` optimiser steps and begins again when it has come to the end.
      every: optimiser steps that a sliding window stays.
    """

    size: int
    first: int
    end: int
    schedule: str = "fixed"
    every: int = 1

    @property
    def num_starts(self) -> int:
        """Steps that a window may begin with."""
        return self.end - self.size - self.first + 1

    def start(self, step: int, generator: np.random.Generator) -> int:
        """Returns the first step of the window of an optimiser step.

        Args:
          step: optimiser steps done.
          generator: of the optimiser step; drawn from by the random schedule alone.
        """
        if self.schedule == "random":
            return self.first + int(generator.integers(self.num_starts))
        if self.schedule == "sliding":
            return self.first + (step // self.every) % self.num_starts
        return self.first


def check_window(window: Window, table: StochasticTable) -> None:
    """Raises InputError for a window outside the steps of a run, or over steps that cannot have noise.

    Args:
      window: the steps with noise.
      table: with noise at every step.
    """
    num_steps = table.num_steps
    within = 0 <= window.first and window.end <= num_steps
    if not within or window.size < 1 or window.num_starts < 1:
        raise InputError(
            f"rollout.window_size, rollout.window_range: expected {window.size} steps within those from {window.first} "
            f"to {window.end}, of a run of {num_steps} steps; received no room for them"
        )
    silent = [i for i in range(window.first, window.end) if table.noise[i] == 0]
    if silent:
        raise InputError(
            f"rollout.window_range: expected steps that have noise; received step {silent[0]} of {num_steps} "
            "(counted from 0), which has none: its solver ends in a clean image, or rollout.noise_level is 0"
        )
