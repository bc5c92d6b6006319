"""Flow matching: the noise schedule, the straight path, solver coefficients and the sampling loop."""
