"""The transformer of Wan 2.1, channel-last: latents of a clip and text to flow velocity.

The blocks are one `nn.scan` with their parameters stacked on axis 0, so that compile time does not grow with depth.
Module names are those of diffusers with dots inside a level replaced by underscores; the stacked run is `blocks_all`.
`layer_names` maps them to published files.

Source: diffusers 0.42 `WanTransformer3DModel`, `WanTimeTextImageEmbedding`; Wan-Video/Wan2.1 `wan/modules/model.py`.
Deviation: the embedded noise level and all modulation are float32 whatever the compute dtype, as in the original
repository; diffusers rounds the embedding to the compute dtype.
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
from marble_jax.families.transformer_module import plainly_compiled
from marble_jax.families.wan.blocks import NUM_MODULATIONS, WanBlock, modulation_table
from marble_jax.families.wan.config import PATCH, WanConfig
from marble_jax.families.wan.patches import PatchEmbedding, token_grid, unpatchify
from marble_jax.families.wan.rotary import rotary_tables
from marble_jax.flow.levels import NUM_TRAIN_TIMESTEPS
from marble_jax.networks.attention import AttentionFn, layer_norm, modulate
from marble_jax.networks.block_remat import (
    REMAT_POLICIES,
    GatherParams,
    run_of_blocks,
)
from marble_jax.networks.lora_dense import LoraDense
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.networks.transformer_layers import TwoLayer, tanh_gelu, timestep_embedding
from marble_jax.networks.velocity import adapted_velocity
from marble_jax.types import Adapter, Params


class ConditionEmbedder(nn.Module):
    """Noise levels to the conditioning vector and the blocks' modulation, and text to the width of the tokens.

    Attributes:
      features: width of the tokens.
      dtype: compute dtype of text.
      lora_scale: alpha / rank of the adapter.
    """

    features: int
    dtype: Any = jnp.float32
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self, sigma: Float[Array, " n"], embeds: Float[Array, "n k e"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "n 6 d"], Float[Array, "n k d"]]:
        """Returns the conditioning vector and the modulation, both float32, and the text tokens.

        Args:
          sigma: noise levels in [0, 1].
          embeds: text embeddings.
        """
        timestep = sigma.astype(jnp.float32) * NUM_TRAIN_TIMESTEPS
        time = TwoLayer(self.features, jnp.float32, self.lora_scale, name="time_embedder")
        temb = time(timestep_embedding(timestep))
        project = LoraDense(
            NUM_MODULATIONS * self.features,
            dtype=jnp.float32,
            lora_scale=self.lora_scale,
            name="time_proj",
        )
        modulation = project(nn.silu(temb)).reshape(-1, NUM_MODULATIONS, self.features)
        text = TwoLayer(self.features, self.dtype, self.lora_scale, tanh_gelu, name="text_embedder")
        return temb, modulation, text(embeds)


class WanTransformer(nn.Module):
    """The transformer: noisy latents and conditioning to flow velocity (noise - x0).

    Samples do not interact, so the model can be vmapped over per-sample adapters with the parameters closed over.

    Attributes:
      config: architecture.
      dtype: compute dtype of matrix products and token streams; norms, modulation and softmax are float32.
      stream_dtype: dtype of the token stream between layers and of the head (last modulation and projection); `dtype`
        when None.
      remat: what a block keeps for its backward pass: everything ("none"), its products with weights ("dots"), the
        outputs of its dense layers and of attention ("products") or its input alone ("full").
      attention: "xla", "cudnn", "splash", "einsum" or a function; see `marble_jax.networks.attention`.
      unroll: blocks in one turn of the scan; more run faster and take longer to compile, and as many may be whole at a
        time (see `gather`).
      lora_scale: alpha / rank of the adapter.
      gather: puts parameters together from the devices that they are split over, (path, parameters under it) ->
        parameters; called where a block is, so that no more than one is whole at a time. None where they lie whole.
    """

    config: WanConfig
    dtype: Any = jnp.float32
    stream_dtype: Any = None
    remat: str = "none"
    attention: str | AttentionFn = "xla"
    unroll: int = 1
    lora_scale: float = 1.0
    gather: GatherParams | None = None

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "n f h w c"],
        sigma: Float[Array, " n"],
        embeds: Float[Array, "n k e"],
    ) -> Float[Array, "n f h w c"]:
        """Velocity of noisy latents.

        Args:
          latents: [N, f, h, w, C].
          sigma: [N] noise levels in [0, 1].
          embeds: [N, K, text_dim]; all tokens are attended, the zeros beyond a prompt's end too.

        Returns:
          [N, f, h, w, C] in `stream_dtype`, or `dtype` without one.

        Raises:
          InputError: latents that do not divide into tokens, or too many of them; an unknown option.
        """
        config = self.config
        self._check(latents.shape)
        grid = token_grid(latents.shape[1:])
        tables = rotary_tables(config, grid)
        embed = ConditionEmbedder(
            config.width, self.dtype, self.lora_scale, name="condition_embedder"
        )
        temb, modulation, text = embed(sigma, embeds)
        x = PatchEmbedding(config.width, self.dtype, name="patch_embedding")(latents)
        stream_dtype = self.dtype if self.stream_dtype is None else self.stream_dtype
        x = x.astype(stream_dtype)
        x, _ = self._blocks()(x, text, modulation, tables)
        table = self.param("scale_shift_table", modulation_table, (1, 2, config.width))
        # Of the conditioning vector itself, which passes no activation and no projection here.
        shift, scale = jnp.moveaxis(table.astype(jnp.float32) + temb[:, None], 1, 0)
        x = modulate(layer_norm(x), shift, scale, stream_dtype)
        head = LoraDense(
            PATCH[0] * PATCH[1] * PATCH[2] * config.in_channels,
            dtype=stream_dtype,
            lora_scale=self.lora_scale,
            name="proj_out",
        )
        return unpatchify(head(x), grid)

    def _blocks(self) -> Any:
        """The blocks, as one scan over their stacked parameters."""
        # Parameters that are only being made lie whole.
        gather = None if self.is_initializing() else self.gather
        wrapping = ("block_all", self.remat, gather)
        run = run_of_blocks(WanBlock, *wrapping, self.config.num_layers, self.unroll, num_shared=3)
        return run(self.config, self.dtype, self.attention, self.lora_scale, name="blocks_all")

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raises InputError for options or latents that the model cannot take."""
        one_of("remat", self.remat, REMAT_POLICIES)
        channels = self.config.in_channels
        if len(shape) != 5 or shape[-1] != channels:
            raise InputError(f"latents: expected [N, f, h, w, {channels}]; received {list(shape)}")


def abstract_params(model: WanTransformer, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything.

    Args:
      model: the transformer.
      dtype: of the weights, except those of the embedded noise level, of modulation and of the affine norm: these are
        float32 in every model, as diffusers keeps them.
    """
    config = model.config
    # One token of each kind: no parameter's shape depends on how many there are.
    latents = (1, *PATCH, config.in_channels)
    inputs = (latents, (1,), (1, 1, config.text_dim))
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    shapes = parameter_shapes(plainly_compiled(model), *structs)

    def typed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = {key.key for key in path}
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if names & _WIDE else dtype)

    return jax.tree_util.tree_map_with_path(typed, shapes)


_WIDE = {"time_embedder", "scale_shift_table", "norm2"}
"""Modules and leaves whose weights are float32 whatever the dtype of the others."""


def velocity(
    model: WanTransformer,
    params: Params,
    adapter: Adapter | None,
    xt: Float[Array, "n f h w c"],
    sigma: Float[ArrayLike, " n"] | Float[ArrayLike, ""],
    cond: Conditioning,
) -> Float[Array, "n f h w c"]:
    """Flow velocity `noise - x0` as a pure function.

    Args:
      model: the transformer.
      params: base weights.
      adapter: LoRA leaves, possibly for some layers only; None is the base model.
      xt: [N, f, h, w, C] noisy latents.
      sigma: [N] or scalar, in [0, 1].
      cond: `embeds` [N, K, text_dim].

    Returns:
      float32 [N, f, h, w, C].

    Raises:
      InputError: adapter leaves that no layer reads or that do not fit; see also `WanTransformer`.
    """
    levels = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), xt.shape[:1])
    return adapted_velocity(model, params, adapter, xt, levels, cond["embeds"])
