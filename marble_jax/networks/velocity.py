"""A transformer's velocity with an adapter beside its weights, whatever the family."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.networks.lora_dense import COLLECTION, check_adapter
from marble_jax.types import Adapter, Params


def adapted_velocity(
    model: Any,
    params: Params,
    adapter: Adapter | None,
    *inputs: jax.Array,
    not_gathered: tuple[str, ...] = ("block",),
) -> jax.Array:
    """Output of a transformer in float32.

    Args:
      model: module with a field `gather`, which puts parameters together from the devices they are split over.
      params: base weights.
      adapter: LoRA leaves, possibly for some layers only; None is the base model.
      *inputs: arguments of the module.
      not_gathered: beginnings of the names of modules that put their own parameters together, as blocks do one by one.

    Raises:
      InputError: adapter leaves that no layer reads or that do not fit.
    """
    if model.gather is not None:
        outside = {}
        for name, part in params.items():
            if not name.startswith(not_gathered):
                outside[name] = part
        params = {**params, **model.gather((), outside)}
    variables = {"params": params}
    if adapter is not None:
        check_adapter(params, adapter)
        variables[COLLECTION] = adapter
    output: Any = model.apply(variables, *inputs)
    return output.astype(jnp.float32)
