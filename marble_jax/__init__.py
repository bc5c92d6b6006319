"""Multi-reward reinforcement learning of diffusion models in JAX."""

from marble_jax import platform as _platform

_platform.prepare()

__version__ = "0.1.0"
