"""Signal and noise of a run's per-reward gradients, measured over many steps at a fixed policy."""
