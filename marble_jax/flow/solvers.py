"""Deterministic solvers as tables of coefficients.

With `m_i = x_i - sigma_i v_i`, the clean estimate of step i, every deterministic step of interest is linear:

    x_{i+1} = a_i x_i + b_i m_i + c_i m_{i-1}

The tables are made on the host in float64, so the loop needs no branch on the step and no infinite logarithms: the
half-log-SNR at sigma = 1 is minus infinity, and its steps simply get the first-order coefficients.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from marble_jax.errors import InputError, one_of


@dataclasses.dataclass(frozen=True)
class SolverTable:
    """Coefficients of an N-step run, float64 [N] each: x' = state x + current m + previous m_before."""

    state: np.ndarray
    current: np.ndarray
    previous: np.ndarray

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.state)


def _checked(sigmas: np.ndarray) -> np.ndarray:
    sigmas = np.asarray(sigmas, np.float64)
    decreasing = sigmas.ndim == 1 and sigmas.size >= 2 and bool(np.all(np.diff(sigmas) < 0))
    if not decreasing or sigmas[0] > 1 or sigmas[-1] < 0:
        raise InputError(
            "noise levels: expected [N + 1] strictly decreasing values within [0, 1]; "
            f"received {np.array2string(sigmas, precision=4, threshold=6)}"
        )
    return sigmas


def first_order(sigmas: np.ndarray) -> SolverTable:
    """Euler, which for deterministic runs is also DDIM and first-order DPM-Solver: all equal `x + (tau - sigma) v`.

    Args:
      sigmas: [N + 1] strictly decreasing noise levels in [0, 1].

    Raises:
      InputError: the levels are not strictly decreasing within [0, 1].
    """
    sigmas = _checked(sigmas)
    ratio = sigmas[1:] / sigmas[:-1]
    return SolverTable(ratio, 1.0 - ratio, np.zeros_like(ratio))


def correction_weights(sigmas: np.ndarray) -> np.ndarray:
    """Second-order weight `h_i / (2 h_{i-1})` of every step, 0 where the step is first order.

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
    first = 2 if sigmas[0] == 1.0 else 1
    for i in range(first, num_steps - 1):
        before, here, after = (np.log1p(-s) - np.log(s) for s in sigmas[i - 1 : i + 2])
        weights[i] = (after - here) / (2.0 * (here - before))
    return weights


def dpm2(sigmas: np.ndarray) -> SolverTable:
    """Second-order multistep DPM-Solver++ in data prediction, one network call per step.

    Source: DPM-Solver++ (arXiv 2211.01095), as used for DiffusionNFT's rollouts. Their option to lower the order of
    the second-last step of short runs never takes effect there and is absent here.
    """
    base, weights = first_order(sigmas), correction_weights(sigmas)
    return SolverTable(base.state, base.current * (1.0 + weights), -base.current * weights)


SOLVERS = {"euler": first_order, "ddim": first_order, "dpm1": first_order, "dpm2": dpm2}


def solver_table(name: str, sigmas: np.ndarray) -> SolverTable:
    """The table of a solver by name.

    Args:
      name: "euler", "ddim", "dpm1" (the same deterministic step) or "dpm2".
      sigmas: [N + 1] strictly decreasing noise levels in [0, 1].

    Raises:
      InputError: unknown name or unusable levels.
    """
    one_of("solver", name, SOLVERS)
    return SOLVERS[name](sigmas)
