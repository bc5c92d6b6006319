"""A dense layer that adds a low-rank adapter when it is given one.

The adapter is an argument, not a mode of the model: it lives in the variable collection "lora", which mirrors the
module paths of "params". Without an entry for a layer, the layer is the plain base layer, so that the current, rollout
and reference policies are three calls of one function with three adapters (the last one None).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from marble_jax.errors import InputError, nearest
from marble_jax.networks.precision import product_precision
from marble_jax.networks.quantized import SCALES, is_quantized, quantized_matmul

COLLECTION = "lora"
PRODUCT = "product"
"""Name of a layer's output, for what a backward pass keeps."""


@jax.custom_vjp
def widen(h: jax.Array, b: jax.Array) -> jax.Array:
    """`h @ b`, [..., r] and [r, out] -> [..., out], which transposes the narrow side for the gradient of `b`.

    JAX's own rule makes [out, r] and turns it: a product that wants the wide cotangent column by column, for which XLA
    on CPUs copies it, together with all that is fused into it.
    """
    return jnp.matmul(h, b, precision=product_precision(h.dtype))


def _widen_forward(h: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(h, b, precision=product_precision(h.dtype)), (h, b)


def _widen_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, b = kept
    precision = product_precision(h.dtype)
    to_h = jnp.matmul(g, b.T, precision=precision)
    # `ro`, not `or` and a transpose: the contraction turns the narrow h, which is the point of this rule.
    return to_h, jnp.einsum("...r,...o->ro", h, g, precision=precision)


widen.defvjp(_widen_forward, _widen_backward)


class LoraDense(nn.Module):
    """`y = x @ kernel + bias + lora_scale * (x @ a) @ b`, the last term only where the "lora" collection has them.

    The layer never creates adapter leaves; `marble_jax.trainable.lora` does, from target patterns. Leaves are stored in
    float32 and multiplied in `dtype`, like the base weights. A quantised kernel (`networks.quantized`) multiplies in
    eight bits.

    Attributes:
      features: output width.
      use_bias: whether the base layer has a bias.
      dtype: dtype of the matrix products and of the result; None promotes input and weights. float32 is multiplied as
        float32 on every device (`networks.precision`).
      lora_scale: alpha / rank.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if is_quantized(kernel):
            x, bias = nn.dtypes.promote_dtype(x, bias, dtype=self.dtype)
            y = quantized_matmul(x, kernel, self.get_variable("params", SCALES))
        else:
            x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
            y = jnp.matmul(x, kernel, precision=product_precision(x.dtype))
        if self.has_variable(COLLECTION, "a"):
            a: jax.Array = self.get_variable(COLLECTION, "a").astype(x.dtype)
            b: jax.Array = self.get_variable(COLLECTION, "b").astype(x.dtype)
            # The name is how `marble-jax plan --roofline` tells these products from the base layer's.
            with jax.named_scope("lora"):
                narrow = jnp.matmul(x, a, precision=product_precision(x.dtype))
                # Scaled at the narrow waist: rank values a token instead of `features`.
                y = y + widen(self.lora_scale * narrow, b)
        if bias is not None:
            y = y + bias
        return checkpoint_name(y, PRODUCT)


def check_adapter(params: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    """Raises InputError unless every adapter leaf belongs to a dense layer of `params` and fits its kernel.

    A leaf under a path that no layer reads would otherwise be ignored in silence.
    """
    kernels = {}
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if path[-1] == "kernel":
            kernels[path[:-1]] = tuple(leaf.shape)
    leaves = traverse_util.flatten_dict(dict(adapter))
    for path in leaves:
        module, name = path[:-1], "/".join(path)
        if module not in kernels:
            close = nearest("/".join(module), ("/".join(known) for known in kernels))
            raise InputError(
                f"adapter leaf {name}: expected the path of a dense layer; received an unknown one{close}"
            )
        if path[-1] not in ("a", "b") or not _is_paired(path, leaves):
            raise InputError(
                f"adapter leaf {name}: expected the pair 'a' and 'b'; received {path[-1]!r} alone"
            )
        a, b = leaves[(*module, "a")].shape, leaves[(*module, "b")].shape
        _check_pair(module, a, b, kernels[module])


def _is_paired(path: tuple[str, ...], leaves: Mapping[tuple[str, ...], Any]) -> bool:
    """Whether both leaves of a layer's pair exist."""
    module = path[:-1]
    return (*module, "a") in leaves and (*module, "b") in leaves


def _check_pair(
    module: tuple[str, ...], a: tuple[int, ...], b: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    """Raises InputError unless the shapes of `a` and `b` fit each other and their kernel."""
    # The rank is free, everything else is the kernel's; a leading axis stacks layers.
    if (*a[:-1], b[-1]) != kernel or b[:-2] != a[:-2] or a[-1] != b[-2]:
        raise InputError(
            f"adapter of {'/'.join(module)}: expected a [.., in, r], b [.., r, out] for kernel {kernel}; "
            f"received {a}, {b}"
        )
