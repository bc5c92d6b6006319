"""Multi-reward reinforcement learning of diffusion models in JAX.

The names below are imported when they are first used, so that `import marble_jax` stays quick; it does set what XLA
must know before JAX opens a backend (`marble_jax.platform`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from marble_jax import platform as _platform

if TYPE_CHECKING:
    from marble_jax.api.loras import read_lora
    from marble_jax.api.runs import Interrupted, Run, train
    from marble_jax.api.sampling import sample
    from marble_jax.api.settings import load_settings, presets
    from marble_jax.balancing import (
        BalanceInfo,
        balance,
        balanced,
        losses_and_gradients,
        min_norm,
        per_objective_gradients,
        weighted_sample_gradients,
    )
    from marble_jax.config import Settings
    from marble_jax.errors import InputError

_platform.prepare()

__version__ = "0.1.0"

__all__ = [
    "BalanceInfo",
    "InputError",
    "Interrupted",
    "Run",
    "Settings",
    "balance",
    "balanced",
    "load_settings",
    "losses_and_gradients",
    "min_norm",
    "per_objective_gradients",
    "presets",
    "read_lora",
    "sample",
    "train",
    "weighted_sample_gradients",
]

_HOMES = {
    "BalanceInfo": "balancing",
    "InputError": "errors",
    "Interrupted": "api.runs",
    "Run": "api.runs",
    "Settings": "config",
    "balance": "balancing",
    "balanced": "balancing",
    "load_settings": "api.settings",
    "losses_and_gradients": "balancing",
    "min_norm": "balancing",
    "per_objective_gradients": "balancing",
    "presets": "api.settings",
    "read_lora": "api.loras",
    "sample": "api.sampling",
    "train": "api.runs",
    "weighted_sample_gradients": "balancing",
}
"""Public names, and the modules that they are imported from."""


def __getattr__(name: str) -> Any:
    """Imports a public name on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'marble_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"marble_jax.{_HOMES[name]}"), name)
    # Found without this function from now on.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
