"""Softmax attention, norms and modulation that the blocks of diffusion transformers share.

Implementations of attention are interchangeable functions (q, k, v) -> out, chosen by name or passed as a callable:

* "xla": `jax.nn.dot_product_attention` compiled by XLA; any platform and dtype, softmax in float32, memory quadratic in
  the number of tokens.
* "einsum": the two products and the softmax written out; the plain reference.
* "cudnn": the fused flash kernel on NVIDIA GPUs, float16 or bfloat16 only; memory linear in the number of tokens.
* "splash": the fused flash kernel on TPUs; memory linear in the number of tokens.
* "auto": in a half precision "cudnn" on a GPU and "splash" on a TPU, "xla" elsewhere.
* a callable: a kernel of one's own. It must be differentiable and work under `jax.vmap`.

Over several devices the fused kernels have to be told how the batch lies: `over` gives the function that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from marble_jax.errors import one_of
from marble_jax.networks.fused_attention import FusedAttention, cudnn
from marble_jax.networks.lora_dense import LoraDense
from marble_jax.networks.precision import product_precision

AttentionFn = Callable[..., jax.Array]
EPS = 1e-6  # of the norms in diffusers' transformer blocks


def _einsum(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    precision = product_precision(q.dtype)
    # The product accumulates in float32, as the fused kernels do: a sum of half-precision products loses its tail.
    logits = jnp.einsum(
        "...qhd,...khd->...hqk", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    logits = logits * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v, precision=precision)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # It takes no precision by itself.
    with jax.default_matmul_precision(product_precision(q.dtype)):
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def _auto(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attend(q, k, v, choose("auto", q.dtype, jax.default_backend()))


IMPLEMENTATIONS: dict[str, AttentionFn] = {
    "xla": _xla,
    "einsum": _einsum,
    "cudnn": FusedAttention("cudnn"),
    "splash": FusedAttention("splash"),
    "auto": _auto,
}
FUSED = {"cudnn": "gpu", "splash": "tpu"}  # kernels, and the platform that each runs on


def choose(name: str, dtype: Any, platform: str) -> str:
    """The implementation that `name` stands for on a platform: itself, unless it is "auto".

    Args:
      name: a key of `IMPLEMENTATIONS`.
      dtype: of queries, keys and values.
      platform: "cpu", "gpu" or "tpu".
    """
    if name != "auto":
        return name
    # cuDNN has no float32, and splash attention leaves the precision of its float32 products to the compiler.
    if platform not in FUSED.values() or jnp.dtype(dtype).itemsize != 2:
        return "xla"
    if platform == "tpu":
        return "splash"
    # A plan for GPUs is made on any machine; only a GPU of this machine can be asked what it does.
    if jax.default_backend() == "gpu" and not has_cudnn(dtype):
        return "xla"
    return "cudnn"


def has_cudnn(dtype: Any) -> bool:
    """Whether this machine's cuDNN and GPU can do the fused kernel, which JAX asks them while it traces."""
    # A shape that the kernel takes on every GPU that has it; tracing computes nothing.
    struct = jax.ShapeDtypeStruct((1, 128, 1, 64), dtype)
    try:
        jax.eval_shape(cudnn, struct, struct, struct)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def over(name: str, dtype: Any, mesh: Mesh) -> str | FusedAttention:
    """The implementation for a batch that is split over a mesh.

    A fused kernel of another platform gives way to what fits, so that a run of a TPU pod opens on a laptop; the check
    of a training configuration refuses it before.

    Args:
      name: a key of `IMPLEMENTATIONS`.
      dtype: of queries, keys and values.
      mesh: the devices.
    """
    platform = mesh.devices.flat[0].platform
    if FUSED.get(name, platform) != platform:
        name = "auto"
    chosen = choose(name, dtype, platform)
    # XLA partitions what it compiles; a kernel has to be told its part of the batch.
    if chosen in FUSED:
        return FusedAttention(chosen, mesh)
    return chosen


def is_splash(implementation: str | AttentionFn) -> bool:
    """Whether attention is computed by the kernel for TPUs, so that what surrounds it should suit them."""
    if isinstance(implementation, FusedAttention):
        return implementation.kind == "splash"
    return implementation == "splash"


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: str | AttentionFn = "xla"
) -> jax.Array:
    """Full softmax attention without mask, scaled by 1/sqrt(head width).

    Args:
      q: [N, Tq, H, d].
      k: [N, Tk, H, d].
      v: [N, Tk, H, d].
      implementation: a key of `IMPLEMENTATIONS`, or a function of (q, k, v).

    Returns:
      [N, Tq, H, d] in the dtype of `q`.

    Raises:
      InputError: unknown implementation, or one that does not support the dtype.
    """
    if not callable(implementation):
        one_of("attention", implementation, IMPLEMENTATIONS)
        implementation = IMPLEMENTATIONS[implementation]
    return implementation(q, k, v)


def attend_jointly(
    streams: Sequence[Sequence[jax.Array]], implementation: str | AttentionFn = "xla"
) -> list[jax.Array]:
    """Full softmax attention of several streams of tokens over all of them.

    The streams are joined, and filled up to what a fused kernel wants, in one copy.

    Args:
      streams: queries, keys and values of each, all [N, T, H, d] with a T of its own.
      implementation: as for `attend`.

    Returns:
      What the tokens of each stream read, [N, T, H, d].

    Raises:
      InputError: as `attend`.
    """
    if not callable(implementation):
        one_of("attention", implementation, IMPLEMENTATIONS)
        implementation = IMPLEMENTATIONS[implementation]
    lengths = [stream[0].shape[1] for stream in streams]
    num_tokens = sum(lengths)
    fused = implementation if isinstance(implementation, FusedAttention) else None
    added = fused.padding(num_tokens) if fused is not None else 0
    # Joined as [N, T, H d] where the last axis of [N, T, H, d] would be padded, so that one copy is.
    flat = wants_flat_heads(implementation)
    queries, keys, values = zip(*streams, strict=True)
    if fused is not None:
        # In front of the copy, where the norm in front of it can do it on the way.
        queries = tuple(fused.scaled(part) for part in queries)
    q, k, v = (_joined(parts, added, flat) for parts in (queries, keys, values))
    if fused is None:
        out = implementation(q, k, v)
    else:
        out = fused(q, k, v, num_tokens if added else None, is_scaled=True)
    samples, _, heads, width = out.shape
    if flat:
        out = out.reshape(samples, -1, heads * width)
    # Behind the last stream lie the tokens that were added, if any.
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    parts = jnp.split(out, ends, axis=1)[: len(lengths)]
    return [part.reshape(samples, -1, heads, width) for part in parts]


def _joined(parts: Sequence[jax.Array], added: int, flat: bool) -> jax.Array:
    """Streams of tokens [N, T, H, d] behind each other, with so many tokens of zeros behind them."""
    samples, _, heads, width = parts[0].shape
    sides = (heads * width,) if flat else (heads, width)
    shaped = [part.reshape(*part.shape[:2], *sides) for part in parts]
    if added:
        shaped.append(jnp.zeros((samples, added, *sides), parts[0].dtype))
    if len(shaped) == 1:
        return parts[0]
    return jnp.concatenate(shaped, axis=1).reshape(samples, -1, heads, width)


def wants_flat_heads(implementation: str | AttentionFn) -> bool:
    """Whether queries and keys had better be normed before they are cut into heads.

    A TPU pads the last axis of an array to 128 lanes, twice the usual width of a head, and float32 [N, T, H, 64] is
    moved so, into another layout and back. No other device minds.
    """
    fused = (
        IMPLEMENTATIONS.get(implementation) if isinstance(implementation, str) else implementation
    )
    # Over devices that share the heads, sums over a head would be exchanged.
    return isinstance(fused, FusedAttention) and fused.kind == "splash" and not fused.splits_heads


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale, in float32; the result has the input's dtype.

    Source: diffusers 0.42 `models/normalization.py` RMSNorm, eps 1e-6 as published models use it on queries and keys.

    Attributes:
      groups: parts of the last axis, each normed by itself with the same scale.
    """

    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., groups * d] -> [..., groups * d]."""
        width = x.shape[-1] // self.groups
        scale = self.param("scale", nn.initializers.ones_init(), (width,))
        if self.groups > 1:
            return grouped_rms_norm(x, scale, self.groups)
        # float32 throughout: squares of half-precision activations overflow float16 and lose bits in bfloat16.
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + EPS)
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def grouped_rms_norm(x: jax.Array, scale: jax.Array, groups: int) -> jax.Array:
    """Root-mean-square norm of each of `groups` parts of the last axis, without cutting it.

    Sums over a part, and their way back to its numbers, are products with a matrix of zeros and ones: exact in any
    precision that holds the other factor.

    Args:
      x: [..., groups * d].
      scale: [d].
      groups: parts of the last axis.

    Returns:
      [..., groups * d] in the dtype of `x`.
    """
    width = scale.shape[0]
    # Of half precision, three passes of bfloat16 hold the squares to 16 bits, where the result has 8.
    precision = jax.lax.Precision.HIGH if x.dtype.itemsize == 2 else jax.lax.Precision.HIGHEST
    member = jnp.repeat(jnp.eye(groups, dtype=jnp.float32), width, axis=0)
    wide = x.astype(jnp.float32)
    mean_square = jnp.dot(wide * wide, member, precision=precision) / width
    inverse = jnp.dot(jax.lax.rsqrt(mean_square + EPS), member.T, precision=precision)
    return (wide * inverse * jnp.tile(scale.astype(jnp.float32), groups)).astype(x.dtype)


@jax.named_scope("layer_norm")
def layer_norm(x: jax.Array) -> jax.Array:
    """Layer norm over the last axis without scale or bias, computed and returned in float32."""
    x = x.astype(jnp.float32)
    # Two passes: E[x^2] - E[x]^2 cancels where the mean is large against the deviation.
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + EPS)


@jax.named_scope("modulation")
def modulate(normed: jax.Array, shift: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """`normed * (1 + scale) + shift` in float32, cast to `dtype`.

    Args:
      normed: float32 [N, T, D].
      shift: [N, D].
      scale: [N, D].
      dtype: dtype of the result.
    """
    # [N, D] to [N, 1, D]: all tokens of a sample are modulated alike.
    scale = scale.astype(jnp.float32)[:, None]
    shift = shift.astype(jnp.float32)[:, None]
    return (normed * (1 + scale) + shift).astype(dtype)


class AdaLayerNorm(nn.Module):
    """`parts` modulation vectors from the conditioning vector: split(Dense(silu(temb))).

    Attributes:
      parts: number of vectors; their meaning belongs to the caller.
      dtype: dtype of the product.
      lora_scale: alpha / rank.
    """

    parts: int
    dtype: Any = jnp.float32
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, temb: jax.Array) -> list[jax.Array]:
        """[N, D] -> `parts` arrays [N, D]."""
        features = self.parts * temb.shape[-1]
        linear = LoraDense(features, dtype=self.dtype, lora_scale=self.lora_scale, name="linear")
        modulation = linear(nn.silu(temb))
        return jnp.split(modulation, self.parts, axis=-1)
