"""MARBLE on cosines that pairs of steps cleaned of noise, step after step, with the package's own solve and history."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from marble_jax import tree
from marble_jax.config import HarmonizeSettings
from marble_jax.harmonize import alpha_state, history
from marble_jax.harmonize.balancers import Balancer, usable
from marble_jax.harmonize.cleaned_solve import cleaned_solve
from tools.harmony.steps import Steps


def cleaned_weights(
    steps: Steps, balancer: Balancer, settings: HarmonizeSettings
) -> Float[np.ndarray, "t k"]:
    """Weights of every step in order, as training with `harmonize.gram=cleaned` would choose them.

    Args:
      steps: what happens, one after the other.
      balancer: that the cleaned matrix is given to.
      settings: of which window, shrinkage, rho and smooth_exact are read.
    """
    num_rewards = steps.num_rewards
    # History adds gradients up; short vectors with the same inner products do as well.
    vectors = jnp.asarray(steps.vectors()[:, :num_rewards], jnp.float32)

    @jax.jit
    def one(
        past: history.History,
        alpha: alpha_state.AlphaState,
        gradients: jax.Array,
        active: jax.Array,
    ) -> tuple[history.History, alpha_state.AlphaState, jax.Array]:
        stacked = {"all": gradients}
        gram = tree.gram(stacked)
        _, norms, used = usable(gram, active)
        new = history.new_step(past, stacked, norms, used)
        past = history.observe(past, new, settings.window)
        solution = cleaned_solve(balancer, gram, active, (), past, alpha, settings.shrinkage)
        alpha = alpha_state.refresh(
            alpha, solution.alpha, solution.scale, settings.rho, solution.used
        )
        weights = solution.weights
        if settings.smooth_exact:
            weights = alpha_state.active_alpha(alpha, solution.used) * solution.scale
        return past, alpha, weights

    past = history.init({"all": vectors[0, 0]}, num_rewards)
    alpha = alpha_state.init(num_rewards)
    chosen = []
    for gradients, active in zip(vectors, steps.active[:, :num_rewards], strict=True):
        past, alpha, weights = one(past, alpha, gradients, jnp.asarray(active))
        chosen.append(np.asarray(weights, np.float64))
    return np.stack(chosen)
