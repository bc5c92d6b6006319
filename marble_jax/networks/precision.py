"""How exact the matrix products of the transformers are: as their type says, on every device.

Left alone, a TPU multiplies float32 numbers in one pass of bfloat16, and recent NVIDIA GPUs in TF32: of the 24 bits of
a factor 8 and 11 are left. Whoever asks for float32 (`model.dtype`, `model.stream_dtype`) gets it here, with 24 bits.

Every layer asks for the precision of its own type, rather than one setting for all: a product of bfloat16 is exact in
one pass, and the fused kernel of TPUs, which multiplies float32 beside bfloat16, does not compile with more for both
("Bad lhs type", libtpu 0.0.52).
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp


def product_precision(dtype: Any) -> Literal["highest", "default"]:
    """Returns the precision, as JAX's products take it, that multiplies numbers of this type without rounding them.

    Args:
      dtype: of the factors. Whoever writes a derivative by hand names the precision there, too: JAX's own derivatives
        inherit it.
    """
    if jnp.dtype(dtype).itemsize >= jnp.dtype(jnp.float32).itemsize:
        return "highest"
    return "default"
