"""The optimiser: clipping in front of AdamW, and its learning rate over steps."""

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.config import TrainingSettings
from marble_jax.training.optimizer import make_optimizer


def first_moves(**changes) -> list[float]:
    """Sizes of AdamW's moves over three steps of a constant gradient: the learning rate, without weight decay."""
    training = TrainingSettings(num_steps=2, learning_rate=0.5, weight_decay=0.0, **changes)
    optimizer = make_optimizer(training)
    params, moves = jnp.zeros(2), []
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(jnp.array([3.0, 4.0]), state, params)
        moves.append(float(-updates[0]))
    return moves


def test_the_optimizer_follows_its_schedule():
    np.testing.assert_allclose(first_moves(), [0.5, 0.5, 0.5], rtol=1e-4)
    cosine = first_moves(learning_rate_schedule="cosine", min_learning_rate_ratio=0.1)
    np.testing.assert_allclose(cosine, [0.5, 0.275, 0.05], rtol=1e-4)


def test_the_gradient_is_clipped_before_adam():
    optimizer = make_optimizer(TrainingSettings(clip_norm=1.0))
    _, state = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.zeros(2)), jnp.zeros(2))
    mu = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "shape", None) == (2,)][0]
    np.testing.assert_allclose(mu, 0.1 * np.array([0.6, 0.8]), rtol=1e-6)
