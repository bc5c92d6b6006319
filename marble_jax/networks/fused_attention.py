"""Fused attention kernels: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Exact gradients pull samples back one by one, under `vmap` over samples and, inside it, over directions; and the samples
lie on many devices. Neither kernel can do that as it comes. cuDNN's batching rule takes it that everything has the
mapped axis, which the keys of a sample do not have over its directions (jax-ml/jax#38495), and a Pallas kernel cannot
be partitioned by the compiler. So both are run the same way here:

* under `vmap` the mapped axis joins the batch, in front of it, so that a kernel only ever sees [N, T, H, d] and the
  samples of a device stay on it;
* over a mesh with several devices each device runs the kernel on its own samples and heads (`shard_map`);
* the backward pass keeps queries, keys and values alone and starts with a forward pass, which costs some 2 % of a
  micro-batch and saves the output and statistics of every block.

Nothing here is approximate: products are in the dtype of the input, sums and softmax in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

from marble_jax.distributed.device_mesh import BATCH_AXES
from marble_jax.errors import InputError

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q, k, v) -> out, all [N, T, H, d]; differentiable, need not work under `vmap`."""

LANES = 128  # a block of splash attention is made of whole registers
BLOCKS = (640, 512, 384, 256)  # tokens; larger ones do not fit next to each other in 16 MB of VMEM


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

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [N, Tq, H, d], k and v [N, Tk, H, d] -> [N, Tq, H, d].

        Raises:
          InputError: a dtype or head width that the kernel cannot do.
        """
        if self.kind == "cudnn":
            _check_cudnn(q)
        return folded(self.kernel, self.place)(q, k, v)

    def kernel(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The attention of the samples of one device."""
        if self.kind == "cudnn":
            return cudnn(q, k, v)
        return splash(q, k, v, self.interpret)

    def place(self, kernel: Callable, q: jax.Array) -> Callable:
        """`kernel` over the mesh, each device with its own part of a batch shaped like `q`."""
        if self.mesh is None or self.mesh.size == 1:
            return kernel
        spec = self.spec(q.shape)
        # The values are the same on devices that hold the same part, which the type system cannot see in a kernel.
        return jax.shard_map(kernel, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)

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


def folded(
    kernel: Kernel, place: Callable[[Callable, jax.Array], Callable] = lambda kernel, q: kernel
) -> Kernel:
    """`kernel` with a batching rule of our own: a mapped axis joins the batch, in front of it.

    Args:
      kernel: what runs on [N, T, H, d].
      place: (function, q) -> the same function over the devices that hold a batch like `q`.
    """

    def with_rule(function: Callable) -> Callable:
        mapped = custom_vmap(function)

        @mapped.def_vmap
        def rule(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[Any, Any]:
            joined = []
            for x, is_mapped in zip(arrays, batched):
                # The kernel wants the same batch everywhere: what all directions share is repeated for each.
                if not is_mapped:
                    x = jnp.broadcast_to(x, (size, *x.shape))
                joined.append(x.reshape(size * x.shape[1], *x.shape[2:]))
            out = mapped(*joined)
            # The mapped axis is in front of the batch, so that a reshape takes them apart again.
            apart = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), out)
            return apart, jax.tree.map(lambda _: True, out)

        return mapped

    @with_rule
    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return place(kernel, q)(q, k, v)

    def pull_back(
        q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, ...]:
        _, pull = jax.vjp(kernel, q, k, v)
        return pull(cotangent)

    @with_rule
    def backward(
        q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, ...]:
        return place(pull_back, q)(q, k, v, cotangent)

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return forward(q, k, v)

    # Queries, keys and values are all that is kept for the backward pass (see the module's docstring).
    attention.defvjp(
        lambda q, k, v: (forward(q, k, v), (q, k, v)), lambda kept, g: backward(*kept, g)
    )
    return attention


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's kernel through JAX.

    JAX takes no odd number of tokens in training, and 512 px with 205 text tokens are 1229 (jax 0.10 and 0.11 count a
    bias where there is none). One token is added then; as a key it is masked, as a query cut off.
    """
    num_q, num_k = q.shape[1], k.shape[1]
    if num_q % 2 or num_k % 2:
        q, k, v = _even_tokens(q), _even_tokens(k), _even_tokens(v)
    num_real = None
    if num_k % 2:
        num_real = jnp.full(k.shape[:1], num_k, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=num_real, implementation="cudnn"
    )
    return out[:, :num_q]


def _even_tokens(x: jax.Array) -> jax.Array:
    """[N, T, H, d] with a token of zeros behind an odd number of them."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def block_size(tokens: int) -> int:
    """Tokens of a block of splash attention: the least padding, then the largest block."""
    return min(BLOCKS, key=lambda block: (_whole_blocks(tokens, block), -block))


def _whole_blocks(tokens: int, block: int) -> int:
    """`tokens` rounded up to a multiple of `block`."""
    return -(-tokens // block) * block


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """JAX's splash attention kernel for TPUs.

    Tokens are padded to whole blocks. Added keys are masked; added queries are cut off, so that their cotangents are
    zero and leave no trace in the gradients of keys and values.

    Args:
      q: [N, Tq, H, d]; any d (the compiler pads it to 128).
      k: [N, Tk, H, d].
      v: [N, Tk, H, d].
      interpret: whether to emulate the kernel.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    num_q, num_k, width = q.shape[1], k.shape[1], q.shape[-1]
    block_q, block_k = block_size(num_q), block_size(num_k)
    padded_q, padded_k = _whole_blocks(num_q, block_q), _whole_blocks(num_k, block_k)

    def ready(x: jax.Array, length: int) -> jax.Array:
        """[N, T, H, d] -> [N, H, length, d], the layout of the kernel."""
        by_head = x.swapaxes(1, 2)
        return jnp.pad(by_head, ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))

    mask: Any = library.FullMask((padded_q, padded_k))
    if padded_k > num_k:
        # The same keys are real for every query; added queries may see what they like.
        is_real = np.arange(padded_k) < num_k
        mask = library.NumpyMask(np.broadcast_to(is_real, (padded_q, padded_k)))
    sizes = library.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    # One mask serves all heads. Made anew at every trace: what the kernel holds are constants of that trace.
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([mask]), block_sizes=sizes, interpret=interpret
    )
    # The kernel does not scale. In float32: the root of a head width need not be a power of two.
    scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    out = jax.vmap(kernel)(ready(scaled, padded_q), ready(k, padded_k), ready(v, padded_k))
    return out[:, :, :num_q].swapaxes(1, 2)
