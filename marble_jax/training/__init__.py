"""The training procedure: rollout, scores, advantages, per-reward gradients, alpha, update."""
