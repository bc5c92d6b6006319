"""Fused attention kernels: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Exact gradients pull samples back one by one, under `vmap` over samples and, inside it, over directions; and the samples
lie on many devices. Neither kernel can do that as it comes. cuDNN's batching rule takes it that everything has the
mapped axis, which the keys of a sample do not have over its directions (jax-ml/jax#38495), and a Pallas kernel cannot
be partitioned by the compiler. So both are run the same way here, see `mapped_kernel`.

Kernels want whole blocks of tokens (splash attention) or an even number (cuDNN). Tokens that are added are masked as
keys and cut off as queries; whoever joins streams of tokens adds them in the same copy (`padding`).

Nothing here is approximate: products are in the dtype of the input, sums and softmax in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from marble_jax.distributed.device_mesh import BATCH_AXES
from marble_jax.errors import InputError
from marble_jax.networks.mapped_kernel import ATTENTION, Axes, Axis, folded

__all__ = ["ATTENTION", "FusedAttention", "block_size", "cudnn", "folded", "splash", "whole_blocks"]

LANES = 128  # a block of splash attention is made of whole registers
# Tokens. Larger ones fit no v5e, and other chips with some numbers of keys alone (`tools.attention_blocks`).
BLOCKS = (640, 512, 384, 256)

MOST_KEYS = 2560  # that lie in VMEM at once, with their values and the cotangents of both


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """A fused kernel on given devices, as an attention function.

    Attributes:
      kind: "cudnn" or "splash".
      mesh: the devices that the batch lies on; None for one device.
      batch: axes of the mesh that split the batch.
      heads: axis of the mesh that splits the heads, if the mesh has it.
      interpret: whether Pallas is to emulate the kernel, for tests on a CPU.
    """

    kind: str
    mesh: Mesh | None = None
    batch: tuple[str, ...] = BATCH_AXES
    heads: str = "tensor"
    interpret: bool = False

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        num_tokens: int | None = None,
        is_scaled: bool = False,
    ) -> jax.Array:
        """q [N, Tq, H, d], k and v [N, Tk, H, d] -> [N, Tq, H, d].

        Args:
          q: queries.
          k: keys.
          v: values.
          num_tokens: how many keys and values are real, from the first; all of them when None.
          is_scaled: whether the queries come from `scaled`.

        Raises:
          InputError: a dtype or head width that the kernel cannot do.
        """
        if self.kind == "cudnn":
            _check_cudnn(q)
        elif not is_scaled:
            q = self.scaled(q)
        return folded(partial(self.kernel, num_tokens=num_tokens), self.place)(q, k, v)

    def scaled(self, q: jax.Array) -> jax.Array:
        """Queries times 1/sqrt(head width), for the kernel that does not scale."""
        if self.kind == "cudnn":
            return q
        # In float32: the root of a head width need not be a power of two.
        return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)

    @property
    def splits_heads(self) -> bool:
        """Whether devices share the heads of a sample."""
        return self.mesh is not None and self.mesh.shape.get(self.heads, 1) > 1

    def padding(self, tokens: int) -> int:
        """How many tokens the kernel adds to so many."""
        if self.kind == "cudnn":
            return tokens % 2
        return whole_blocks(tokens, block_size(tokens)) - tokens

    def kernel(
        self, q: jax.Array, k: jax.Array, v: jax.Array, num_tokens: int | None = None
    ) -> jax.Array:
        """The attention of the samples of one device."""
        if self.kind == "cudnn":
            return cudnn(q, k, v, num_tokens)
        return splash(q, k, v, self.interpret, num_tokens)

    def place(self, kernel: Callable, shape: tuple[int, ...], takes: Axes, gives: Axes) -> Callable:
        """`kernel` over the mesh, each device with its own part of a batch of queries of this shape.

        Args:
          kernel: what every device runs.
          shape: of the queries, [N, T, H, d].
          takes: axes of its arguments.
          gives: axes of its results.
        """
        if self.mesh is None or self.mesh.size == 1:
            return kernel
        batch, _, heads, _ = self.spec(shape)

        def specs(axes: Axes) -> tuple[PartitionSpec, ...]:
            return tuple(_spec(place, batch, heads) for place in axes)

        # The values are the same on devices that hold the same part, which the type system cannot see in a kernel.
        return jax.shard_map(
            kernel, mesh=self.mesh, in_specs=specs(takes), out_specs=specs(gives), check_vma=False
        )

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """How [N, T, H, d] is split; an axis that does not divide is whole on every device."""
        # Without a mesh nothing is split: the axes below have no devices.
        sizes: Mapping[str, int] = {}
        if self.mesh is not None:
            sizes = self.mesh.shape
        samples, _, num_heads, _ = shape
        axes = tuple(name for name in self.batch if name in sizes)
        batch: tuple[str, ...] | None = axes
        if samples % math.prod(sizes[name] for name in axes):
            batch = None
        heads: str | None = self.heads
        if self.heads not in sizes or num_heads % sizes[self.heads]:
            heads = None
        return PartitionSpec(batch, None, heads, None)


def _spec(axes: Axis, batch: Any, heads: Any) -> PartitionSpec:
    """How an array is split, by the places of its batch and its heads."""
    sides = [None] * (1 + max((place for place in axes if place is not None), default=-1))
    for place, names in zip(axes, (batch, heads)):
        if place is not None:
            sides[place] = names
    return PartitionSpec(*sides)


def _check_cudnn(q: jax.Array) -> None:
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        raise InputError(
            f"attention 'cudnn': expected float16 or bfloat16; received {q.dtype} (use 'xla' in float32)"
        )
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise InputError(
            f"attention 'cudnn': expected a head width of 8, 16, ... or 128; received {q.shape[-1]} (use "
            "'xla')"
        )


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, num_tokens: int | None = None) -> jax.Array:
    """cuDNN's kernel through JAX.

    JAX takes no odd number of tokens in training, and 512 px with 205 text tokens are 1229 (jax 0.10 and 0.11 count a
    bias where there is none). One token is added then; as a key it is masked, as a query cut off.

    Args:
      q: [N, Tq, H, d].
      k: [N, Tk, H, d].
      v: [N, Tk, H, d].
      num_tokens: how many keys are real; all when None.
    """
    num_q, num_k = q.shape[1], k.shape[1]
    real = num_k if num_tokens is None else num_tokens
    if num_q % 2 or num_k % 2:
        q, k, v = _even_tokens(q), _even_tokens(k), _even_tokens(v)
    num_real = None
    if real < k.shape[1]:
        num_real = jnp.full(k.shape[:1], real, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=num_real, implementation="cudnn"
    )
    return out[:, :num_q]


def _even_tokens(x: jax.Array) -> jax.Array:
    """[N, T, H, d] with a token of zeros behind an odd number of them."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def block_size(tokens: int, blocks: tuple[int, ...] = BLOCKS) -> int:
    """Tokens of a block of splash attention, out of `blocks`: the least padding, then the largest block."""
    return min(blocks, key=lambda block: (whole_blocks(tokens, block), -block))


def whole_blocks(tokens: int, block: int) -> int:
    """`tokens` rounded up to a multiple of `block`."""
    return -(-tokens // block) * block


def _block_sizes(library: Any, block_q: int, block_k: int, num_keys: int) -> Any:
    """Blocks of the forward and of the backward kernel.

    One backward kernel makes all three cotangents and takes the logits once, where two take them twice. It writes the
    queries' cotangent once for every block of keys that lies in memory, so all keys are one block there, of which
    `block_k` are multiplied at a time.
    """
    blocks: dict[str, Any] = {
        "block_q": block_q,
        "block_kv_compute": block_k,
        "block_q_dkv": block_q,
        "block_kv_dkv_compute": block_k,
    }
    for letter in "qkv":
        # Tokens in the lanes of a register, which a head of 64 numbers would fill by half.
        blocks[f"{letter}_layout"] = library.QKVLayout.SEQ_MINOR
    if num_keys > MOST_KEYS:
        blocks |= {"block_kv": block_k, "block_kv_dkv": block_k}
        return library.BlockSizes(**blocks, block_q_dq=block_q, block_kv_dq=block_k)
    blocks |= {"block_kv": num_keys, "block_kv_dkv": num_keys}
    return library.BlockSizes(**blocks, use_fused_bwd_kernel=True)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    interpret: bool = False,
    num_tokens: int | None = None,
    blocks: tuple[int, ...] = BLOCKS,
) -> jax.Array:
    """JAX's splash attention kernel for TPUs, on queries that are scaled already.

    Tokens are padded to whole blocks. Added keys are masked; added queries are cut off, so that their cotangents are
    zero and leave no trace in the gradients of keys and values.

    Args:
      q: [N, Tq, H, d]; any d (the compiler pads it to 128).
      k: [N, Tk, H, d].
      v: [N, Tk, H, d].
      interpret: whether to emulate the kernel.
      num_tokens: how many keys are real; all when None.
      blocks: tokens that a block may have.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    num_q, num_k = q.shape[1], k.shape[1]
    block_q, block_k = block_size(num_q, blocks), block_size(num_k, blocks)
    padded_q, padded_k = whole_blocks(num_q, block_q), whole_blocks(num_k, block_k)

    def ready(x: jax.Array, length: int) -> jax.Array:
        """[N, T, H, d] -> [N, H, length, d], the layout of the kernel."""
        by_head = x.swapaxes(1, 2)
        return jnp.pad(by_head, ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))

    mask: Any = library.FullMask((padded_q, padded_k))
    real = num_k if num_tokens is None else num_tokens
    if padded_k > real:
        # The same keys are real for every query; added queries may see what they like.
        is_real = np.arange(padded_k) < real
        mask = library.NumpyMask(np.broadcast_to(is_real, (padded_q, padded_k)))
    sizes = _block_sizes(library, block_q, block_k, padded_k)
    # One mask serves all heads. Made anew at every trace: what the kernel holds are constants of that trace.
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([mask]), block_sizes=sizes, interpret=interpret
    )
    out = jax.vmap(kernel)(ready(q, padded_q), ready(k, padded_k), ready(v, padded_k))
    return out[:, :, :num_q].swapaxes(1, 2)
