"""The optimiser of the adapter."""

from __future__ import annotations

import optax

from marble_jax.config import TrainingSettings


def make_optimizer(training: TrainingSettings) -> optax.GradientTransformation:
    """AdamW behind clipping to a global norm."""
    rate: optax.ScalarOrSchedule = training.learning_rate
    if training.learning_rate_schedule == "cosine":
        rate = optax.cosine_decay_schedule(
            training.learning_rate,
            # The optimiser counts updates, of which a step may have several.
            training.num_steps * training.updates_per_rollout,
            training.min_learning_rate_ratio,
        )
    adamw = optax.adamw(
        rate,
        b1=training.beta1,
        b2=training.beta2,
        eps=training.epsilon,
        weight_decay=training.weight_decay,
    )
    # Clipped before AdamW, so that one wild step cannot inflate its second moments.
    return optax.chain(optax.clip_by_global_norm(training.clip_norm), adamw)
