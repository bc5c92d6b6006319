"""Deterministic solvers as tables of coefficients.

With `m_i = x_i - sigma_i v_i`, the clean estimate of step i, every deterministic step of interest is linear:

    x_{i+1} = a_i x_i + b_i m_i + c_i m_{i-1}

The tables are made on the host in float64, so the loop needs no branch on the step and no infinite logarithms: the
half-log-SNR at sigma = 1 is minus infinity, and its steps simply get the first-order coefficients.
"""

from __future__ import annotations

import dataclasses

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
    """

    state: Float[np.ndarray, " steps"]
    current: Float[np.ndarray, " steps"]
    previous: Float[np.ndarray, " steps"]

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.state)


def _checked(sigmas: np.ndarray) -> np.ndarray:
    """Returns levels in float64. Raises InputError unless they decrease strictly within [0, 1]."""
    sigmas = np.asarray(sigmas, np.float64)
    enough = sigmas.ndim == 1 and sigmas.size >= 2
    # Written so that a level that is not a number fails too.
    decreasing = enough and bool(np.all(np.diff(sigmas) < 0))
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
        step_before = _half_log_snr(sigmas[i]) - _half_log_snr(sigmas[i - 1])
        step = _half_log_snr(sigmas[i + 1]) - _half_log_snr(sigmas[i])
        weights[i] = step / (2.0 * step_before)
    return weights


def _half_log_snr(sigma: np.float64) -> np.float64:
    """Half the logarithm of the signal-to-noise ratio, `log((1 - sigma) / sigma)`, of a level inside (0, 1)."""
    return np.log1p(-sigma) - np.log(sigma)


def dpm2(sigmas: Float[np.ndarray, " levels"]) -> SolverTable:
    """Returns the table of second-order multistep DPM-Solver++ in data prediction, one network call per step.

    Source: DPM-Solver++ (arXiv 2211.01095), as used for DiffusionNFT's rollouts. Their option to lower the order of
    the second-last step of short runs never takes effect there and is absent here.
    """
    base = first_order(sigmas)
    weights = correction_weights(sigmas)
    return SolverTable(
        state=base.state,
        current=base.current * (1.0 + weights),
        previous=-base.current * weights,
    )


SOLVERS = {"euler": first_order, "ddim": first_order, "dpm1": first_order, "dpm2": dpm2}
"""Tables by the solver's name, each made from noise levels."""


def solver_table(name: str, sigmas: Float[np.ndarray, " levels"]) -> SolverTable:
    """Returns the table of a solver by name.

    Args:
      name: "euler", "ddim", "dpm1" (the same deterministic step) or "dpm2".
      sigmas: [N + 1] strictly decreasing noise levels in [0, 1].

    Raises:
      InputError: unknown name or unusable levels.
    """
    one_of("solver", name, SOLVERS)
    return SOLVERS[name](sigmas)
