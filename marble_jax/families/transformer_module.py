"""What every family's transformer module is made of: options by name, and shapes in place of weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marble_jax.families.descriptions import NetworkOptions
from marble_jax.types import Params


def module_fields(options: NetworkOptions, takes_guidance: bool = False) -> dict[str, Any]:
    """Fields of a transformer module that options stand for: every option goes by the same name in it.

    Args:
      options: of the networks.
      takes_guidance: the module has a guidance embedding; others have no field for its scale, which
        `Networks.check_guidance` refuses for them.
    """
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if not takes_guidance:
        del fields["embedded_guidance"]
    return fields


def plainly_compiled(model: nn.Module) -> nn.Module:
    """Returns a transformer module with the same parameters, traced in the quickest way.

    Attention has no parameters, and a fused one cannot be traced everywhere; what is recomputed or unrolled changes no
    parameter either.
    """
    return model.clone(attention="xla", remat="none", unroll=1)


def shapes_in(params: Params, dtype: Any) -> Params:
    """Shapes of parameters in the dtype that they have in memory."""
    dtype = jnp.dtype(dtype)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
