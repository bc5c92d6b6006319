"""Deterministic solvers as tables of coefficients.

With `m_i = x_i - sigma_i v_i`, the clean estimate of step i, every deterministic step of interest is linear:

    x_{i+1} = a_i x_i + b_i m_i + c_i m_{i-1}

A predictor-corrector first replaces x_i, once m_i is known, by

    y_i = p_i y_{i-1} + q_i m_{i-1} + r_i m_{i-2} + s_i m_i

and steps on from y_i; the network is still called once a step, at x_i.

The tables are made on the host in float64, so the loop needs no branch on the step and no infinite logarithms: the
half-log-SNR at sigma = 1 is minus infinity, and its steps simply get the first-order coefficients.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from marble_jax.errors import InputError, one_of


@dataclasses.dataclass(frozen=True)
class SolverTable:
    """Coefficients of an N-step run, float64.

    Attributes:
      state: a_i, of x_i.
      current: b_i, of the clean estimate m_i.
      previous: c_i, of the clean estimate m_{i-1}.
      corrector: p_i, q_i, r_i, s_i of each step; None for a solver that corrects nothing.
    """

    state: Float[np.ndarray, " steps"]
    current: Float[np.ndarray, " steps"]
    previous: Float[np.ndarray, " steps"]
    corrector: Float[np.ndarray, "steps 4"] | None = None

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.state)


def _checked(sigmas: np.ndarray) -> np.ndarray:
    """Returns levels in float64. Raises InputError unless they decrease strictly within [0, 1]."""
    sigmas = np.asarray(sigmas, np.float64)
    enough = sigmas.ndim == 1 and sigmas.size >= 2
    # Written so that a level that is not a number fails too.
    steps = np.diff(sigmas)
    decreasing = enough and bool(np.all(steps < 0))
    if not decreasing or sigmas[0] > 1 or sigmas[-1] < 0:
        raise InputError(
            "noise levels: expected [N + 1] strictly decreasing values within [0, 1]; "
            f"received {np.array2string(sigmas, precision=4, threshold=6)}"
        )
    return sigmas


def first_order(sigmas: Float[np.ndarray, " levels"]) -> SolverTable:
    """Returns the table of Euler: a step from sigma to tau is `x + (tau - sigma) v`.

    Deterministic DDIM and the first-order DPM-Solver are the same step.

    Args:
      sigmas: [N + 1] strictly decreasing noise levels in [0, 1].

    Raises:
      InputError: the levels are not strictly decreasing within [0, 1].
    """
    sigmas = _checked(sigmas)
    ratio = sigmas[1:] / sigmas[:-1]
    return SolverTable(state=ratio, current=1.0 - ratio, previous=np.zeros_like(ratio))


def correction_weights(sigmas: Float[np.ndarray, " levels"]) -> Float[np.ndarray, " steps"]:
    """Returns the second-order weight `h_i / (2 h_{i-1})` of every step, 0 where the step is first order.

    `h_i` is the step in `lambda = log((1 - sigma) / sigma)`. Steps 0 and N - 1 are first order by design; step 1 is
    when the run starts at sigma = 1, because `h_0` is infinite there.

    Args:
      sigmas: [N + 1] strictly decreasing noise levels in [0, 1].

    Returns:
      float64 [N].
    """
    sigmas = _checked(sigmas)
    num_steps = len(sigmas) - 1
    weights = np.zeros(num_steps)
    first = 1
    if sigmas[0] == 1.0:
        # The step before would start at lambda = -infinity.
        first = 2
    for i in range(first, num_steps - 1):
        here = _half_log_snr(sigmas[i])
        step_before = here - _half_log_snr(sigmas[i - 1])
        step = _half_log_snr(sigmas[i + 1]) - here
        weights[i] = step / (2.0 * step_before)
    return weights


def _half_log_snr(sigma: Any) -> Any:
    """Half the logarithm of the signal-to-noise ratio, `log((1 - sigma) / sigma)`, of levels inside (0, 1)."""
    return np.log1p(-sigma) - np.log(sigma)


def dpm2(sigmas: Float[np.ndarray, " levels"]) -> SolverTable:
    """Returns the table of second-order multistep DPM-Solver++ in data prediction, one network call per step.

    Source: DPM-Solver++ (arXiv 2211.01095), as used for DiffusionNFT's rollouts. Their option to lower the order of
    the second-last step of short runs never takes effect there and is absent here.
    """
    base = first_order(sigmas)
    weights = correction_weights(sigmas)
    # Extrapolates the estimate: m + w (m - m_before) in place of m.
    current = base.current * (1.0 + weights)
    previous = -base.current * weights
    return SolverTable(base.state, current, previous)


_LARGEST = 1.0 - 1e-6
"""What UniPC takes a level of 1 for, whose half-log-SNR is infinite. Source: diffusers, as for `unipc`."""


def unipc(sigmas: Float[np.ndarray, " levels"]) -> SolverTable:
    """Returns the table of second-order UniPC with B(h) = e^h - 1 in data prediction, predictor and corrector.

    The first and the last predictor are first order, and so is what corrects the first.

    Source: Zhao et al. 2023 (arXiv 2302.04867), as in diffusers 0.42 `UniPCMultistepScheduler` with solver_order 2,
    solver_type "bh2", lower_order_final and flow sigmas.
    """
    sigmas = np.minimum(_checked(sigmas), _LARGEST)
    num_steps = len(sigmas) - 1
    # Only the last step, which is first order, may end at infinity.
    lambdas = np.full(num_steps + 1, np.inf)
    inside = sigmas > 0
    lambdas[inside] = _half_log_snr(sigmas[inside])
    state, current, previous = np.zeros((3, num_steps))
    corrector = np.zeros((num_steps, 4))
    # The first state is not corrected.
    corrector[0, 0] = 1.0
    for i in range(num_steps):
        step = lambdas[i + 1] - lambdas[i]
        # (1 - e^-h) of the data's share at the next level.
        grow = -(1.0 - sigmas[i + 1]) * np.expm1(-step)
        state[i] = sigmas[i + 1] / sigmas[i]
        # The step before, backwards, in units of this one; none for a first-order step.
        before: float | None = None
        weight = 0.0
        if 0 < i < num_steps - 1:
            before = float((lambdas[i - 1] - lambdas[i]) / step)
            weight = 0.5 / before
        # m_i + weight (m_{i-1} - m_i) in place of m_i.
        current[i] = grow * (1.0 - weight)
        previous[i] = grow * weight
        if i + 1 < num_steps:
            first, last = _corrector_weights(step, before)
            # m_i + first (m_{i-1} - m_i) + last (m_{i+1} - m_i) in place of m_i.
            new, old = grow * last, grow * first
            corrector[i + 1] = (state[i], grow - old - new, old, new)
    return SolverTable(state, current, previous, corrector)


def _corrector_weights(step: float, before: float | None) -> tuple[float, float]:
    """Weights of the differences to the estimate before a step and to that at its end.

    Args:
      step: h, in half-log-SNR.
      before: the step before it, backwards, in units of h; None for a first-order corrector.
    """
    if before is None:
        return 0.0, 0.5
    scale = np.expm1(-step)
    first_moment = scale / -step - 1.0
    second_moment = first_moment / -step - 0.5
    moments = np.asarray([first_moment, 2.0 * second_moment]) / scale
    at_before, at_end = np.linalg.solve([[1.0, 1.0], [before, 1.0]], moments)
    return float(at_before / before), float(at_end)


SOLVERS = {
    "euler": first_order,
    "ddim": first_order,
    "dpm1": first_order,
    "dpm2": dpm2,
    "unipc": unipc,
}
"""Tables by the solver's name, each made from noise levels."""


def solver_table(name: str, sigmas: Float[np.ndarray, " levels"]) -> SolverTable:
    """Returns the table of a solver by name.

    Args:
      name: "euler", "ddim", "dpm1" (the same deterministic step), "dpm2" or "unipc".
      sigmas: [N + 1] strictly decreasing noise levels in [0, 1].

    Raises:
      InputError: unknown name or unusable levels.
    """
    one_of("solver", name, SOLVERS)
    return SOLVERS[name](sigmas)
