"""The MMDiT transformer of Stable Diffusion 3 and 3.5 (3.5-medium with dual attention), channel-last.

Image and text tokens run in two streams that meet in joint attention; each block is modulated by timestep and pooled
text. Consecutive blocks of one kind are one `nn.scan` with their parameters stacked on axis 0, so that compile time
does not grow with depth: SD3.5-medium is 13 dual blocks, 10 plain ones and the last one, which drops the text stream.

Module names are those of diffusers with dots inside a level replaced by underscores; runs are `blocks_<first block>`
(stacked) and the last block is `block_<i>`. `layer_names` maps them to published files.

Source: diffusers 0.42 `SD3Transformer2DModel`; Esser et al. 2024 (arXiv 2403.03206).
Deviation: layer norm and modulation are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from marble_jax.errors import InputError, one_of
from marble_jax.families.base import Conditioning
from marble_jax.families.sd3.blocks import Block
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.embedders import PatchEmbed, TimeTextEmbed
from marble_jax.families.transformer_module import plainly_compiled
from marble_jax.flow.levels import NUM_TRAIN_TIMESTEPS
from marble_jax.networks.attention import AdaLayerNorm, AttentionFn, layer_norm, modulate
from marble_jax.networks.block_remat import (
    REMAT_POLICIES,
    GatherParams,
    run_of_blocks,
    wrapped_block,
)
from marble_jax.networks.lora_dense import LoraDense
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.networks.velocity import adapted_velocity
from marble_jax.types import Adapter, Params


class MMDiT(nn.Module):
    """The transformer: noisy latents and conditioning to flow velocity (noise - x0).

    Samples do not interact, so the model can be vmapped over per-sample adapters with the parameters closed over.

    Attributes:
      config: architecture.
      dtype: compute dtype of matrix products and token streams; norms, modulation and softmax are float32.
      stream_dtype: dtype of the token streams between layers and of the head (last modulation and projection); `dtype`
        when None. float32 makes the difference of two policies' velocities two to three times as exact in bfloat16.
      remat: what a block keeps for its backward pass: everything ("none"), its products with weights ("dots"), the
        outputs of its dense layers and of attention ("products") or its input alone ("full").
      attention: "xla", "cudnn", "einsum" or a function; see `marble_jax.networks.attention`.
      unroll: blocks in one turn of the scan over a run of equal ones; more run faster and take longer to compile, and
        as many may be whole at a time (see `gather`).
      lora_scale: alpha / rank of the adapter.
      table_side: side of the stored positional table, in patches; None stores the whole one. SD3.5-medium's table is
        384 x 384 x 1536 numbers (453 MB in bfloat16), of which a 512 px image reads the central 32 x 32.
      gather: puts parameters together from the devices that they are split over, (path, parameters under it) ->
        parameters; called where a block is, so that no more than one is whole at a time. None where they lie whole.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    stream_dtype: Any = None
    remat: str = "none"
    attention: str | AttentionFn = "xla"
    unroll: int = 1
    lora_scale: float = 1.0
    table_side: int | None = None
    gather: GatherParams | None = None

    @property
    def side(self) -> int:
        """Side of the stored positional table, in patches."""
        return self.config.pos_embed_max_size if self.table_side is None else self.table_side

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "n h w c"],
        timestep: Float[Array, " n"],
        embeds: Float[Array, "n t e"],
        pooled: Float[Array, "n p"],
    ) -> Float[Array, "n h w v"]:
        """Velocity of noisy latents.

        Args:
          latents: [N, h, w, in_channels].
          timestep: [N], 1000 * sigma.
          embeds: [N, T, joint_attention_dim]; all tokens are attended, there is no mask.
          pooled: [N, pooled_projection_dim].

        Returns:
          [N, h, w, out_channels] in `stream_dtype`, or `dtype` without one.

        Raises:
          InputError: latents that do not divide into patches or exceed the positional table; an unknown option.
        """
        config = self.config
        self._check(latents.shape)
        low_rank = {"dtype": self.dtype, "lora_scale": self.lora_scale}
        x = PatchEmbed(config, self.side, self.dtype, name="pos_embed")(latents)
        temb = TimeTextEmbed(config.width, name="time_text_embed", **low_rank)(timestep, pooled)
        c = LoraDense(config.width, name="context_embedder", **low_rank)(embeds)
        stream_dtype = self.dtype if self.stream_dtype is None else self.stream_dtype
        x, c = x.astype(stream_dtype), c.astype(stream_dtype)
        # Parameters that are only being made lie whole.
        gather = None if self.is_initializing() else self.gather
        # Every block is split in the same way: the last one's name stands for all.
        wrapping = ("block_0", self.remat, gather)
        options = {"attention": self.attention, **low_rank}
        for first, length, dual in config.runs:
            run = run_of_blocks(Block, *wrapping, length, self.unroll, num_shared=1)
            blocks = run(config, dual, name=f"blocks_{first}", **options)
            (x, c), _ = blocks((x, c), temb)
        final = config.num_layers - 1
        last = wrapped_block(Block, *wrapping)
        dual = final in config.dual_attention_layers
        last_block = last(config, dual, last=True, name=f"block_{final}", **options)
        (x, _), _ = last_block((x, c), temb)
        head = low_rank | {"dtype": stream_dtype}
        scale, shift = AdaLayerNorm(2, name="norm_out", **head)(temb)
        x = modulate(layer_norm(x), shift, scale, stream_dtype)
        num_values = config.patch_size**2 * config.velocity_channels
        x = LoraDense(num_values, name="proj_out", **head)(x)
        return self._unpatch(x, latents.shape)

    def _unpatch(self, tokens: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Puts tokens [N, (h/p)(w/p), p p C] together to an array [N, h, w, C]."""
        p, channels = self.config.patch_size, self.config.velocity_channels
        num, height, width = shape[:3]
        cells = tokens.reshape(num, height // p, width // p, p, p, channels)
        # A token's values are rows, columns and channels of its patch: rows go beside rows of patches.
        cells = jnp.einsum("nhwpqc->nhpwqc", cells)
        return cells.reshape(num, height, width, channels)

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raises InputError for options or latents that the model cannot take."""
        one_of("remat", self.remat, REMAT_POLICIES)
        p, whole = self.config.patch_size, self.config.pos_embed_max_size
        # An even difference, so that the table that is stored has the same centre as the whole one.
        if not 0 < self.side <= whole or (whole - self.side) % 2:
            parity = "odd" if whole % 2 else "even"
            raise InputError(
                f"table_side: expected an {parity} side up to {whole}; received {self.side}"
            )
        if len(shape) != 4 or shape[-1] != self.config.in_channels:
            raise InputError(
                f"latents: expected [N, h, w, {self.config.in_channels}]; received {list(shape)}"
            )
        for side in shape[1:3]:
            if side % p or side // p > self.side:
                raise InputError(
                    f"latents: expected sides divisible by {p} and up to {p * self.side}; "
                    f"received {shape[1]} x {shape[2]}"
                )


def abstract_params(model: MMDiT) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    p, config = model.config.patch_size, model.config
    # One patch and one text token: no parameter's shape depends on how many there are.
    inputs = (
        (1, p, p, config.in_channels),
        (1,),
        (1, 1, config.joint_attention_dim),
        (1, config.pooled_projection_dim),
    )
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    return parameter_shapes(plainly_compiled(model), *structs)


def velocity(
    model: MMDiT,
    params: Params,
    adapter: Adapter | None,
    xt: Float[Array, "n h w c"],
    sigma: Float[ArrayLike, " n"] | Float[ArrayLike, ""],
    cond: Conditioning,
) -> Float[Array, "n h w v"]:
    """Flow velocity `noise - x0` as a pure function.

    Args:
      model: the transformer.
      params: base weights.
      adapter: LoRA leaves, possibly for some layers only; None is the base model.
      xt: [N, h, w, C] noisy latents.
      sigma: [N] or scalar, in [0, 1].
      cond: `embeds` [N, T, joint_attention_dim] and `pooled` [N, pooled_projection_dim].

    Returns:
      float32 [N, h, w, C].

    Raises:
      InputError: adapter leaves that no layer reads or that do not fit; see also `MMDiT`.
    """
    timestep = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32) * NUM_TRAIN_TIMESTEPS, xt.shape[:1])
    # Of the positional table only the centre is read, and it gathers that by itself.
    own = ("block", "pos_embed")
    inputs = (xt, timestep, cond["embeds"], cond["pooled"])
    return adapted_velocity(model, params, adapter, *inputs, not_gathered=own)
