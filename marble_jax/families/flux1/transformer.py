"""The transformer of FLUX.1, channel-last: packed latents, rotary positions, double and then single blocks.

Each of the two kinds of blocks is one `nn.scan` with its parameters stacked on axis 0, so that compile time does not
grow with depth. Module names are those of diffusers with dots inside a level replaced by underscores; the stacked runs
are `blocks_double` and `blocks_single`. `layer_names` maps them to published files.

Source: diffusers 0.42 `FluxTransformer2DModel`, `CombinedTimestepGuidanceTextProjEmbeddings`.
Deviation: layer norm, the norms of queries and keys and modulation are computed in float32 whatever the compute dtype.
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
from marble_jax.families.flux1.blocks import DoubleBlock, SingleBlock
from marble_jax.families.flux1.config import PATCH, FluxConfig
from marble_jax.families.flux1.packing import pack, unpack
from marble_jax.families.flux1.rotary import rotary_tables
from marble_jax.families.transformer_module import plainly_compiled
from marble_jax.flow.levels import NUM_TRAIN_TIMESTEPS
from marble_jax.networks.attention import AdaLayerNorm, AttentionFn, layer_norm, modulate
from marble_jax.networks.block_remat import (
    REMAT_POLICIES,
    GatherParams,
    run_of_blocks,
)
from marble_jax.networks.lora_dense import LoraDense
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.networks.transformer_layers import TwoLayer, timestep_embedding
from marble_jax.networks.velocity import adapted_velocity
from marble_jax.types import Adapter, Params


class TimeGuidanceTextEmbed(nn.Module):
    """Conditioning vector: embedded noise level plus embedded guidance scale, where there is one, plus pooled text.

    Attributes:
      features: width of the result.
      dtype: compute dtype.
      lora_scale: alpha / rank of the adapter.
    """

    features: int
    dtype: Any = jnp.float32
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        sigma: Float[Array, " n"],
        guidance: Float[Array, " n"] | None,
        pooled: Float[Array, "n p"],
    ) -> Float[Array, "n features"]:
        """Returns the conditioning vector.

        Args:
          sigma: noise levels in [0, 1].
          guidance: guidance scales; None for a model without guidance embedding.
          pooled: pooled text embeddings.
        """
        sizes = (self.features, self.dtype, self.lora_scale)

        def embedded(scalar: jax.Array, name: str) -> jax.Array:
            # Rounded to the compute dtype before and after, as in the reference: in bfloat16, models were always run
            # with noise levels and guidance scales that were.
            timestep = scalar.astype(self.dtype) * NUM_TRAIN_TIMESTEPS
            return TwoLayer(*sizes, name=name)(timestep_embedding(timestep))

        temb = embedded(sigma, "timestep_embedder")
        if guidance is not None:
            temb = temb + embedded(guidance, "guidance_embedder")
        return temb + TwoLayer(*sizes, name="text_embedder")(pooled)


class FluxTransformer(nn.Module):
    """The transformer: noisy latents and conditioning to flow velocity (noise - x0).

    Samples do not interact, so the model can be vmapped over per-sample adapters with the parameters closed over.

    Attributes:
      config: architecture.
      dtype: compute dtype of matrix products and token streams; norms, modulation and softmax are float32.
      stream_dtype: dtype of the token streams between layers and of the head (last modulation and projection); `dtype`
        when None.
      remat: what a block keeps for its backward pass: everything ("none"), its products with weights ("dots"), the
        outputs of its dense layers and of attention ("products") or its input alone ("full").
      attention: "xla", "cudnn", "splash", "einsum" or a function; see `marble_jax.networks.attention`.
      unroll: blocks in one turn of the scan over a run of equal ones; more run faster and take longer to compile, and
        as many may be whole at a time (see `gather`).
      lora_scale: alpha / rank of the adapter.
      embedded_guidance: guidance scale of models with a guidance embedding; None for models without.
      gather: puts parameters together from the devices that they are split over, (path, parameters under it) ->
        parameters; called where a block is, so that no more than one is whole at a time. None where they lie whole.
    """

    config: FluxConfig
    dtype: Any = jnp.float32
    stream_dtype: Any = None
    remat: str = "none"
    attention: str | AttentionFn = "xla"
    unroll: int = 1
    lora_scale: float = 1.0
    embedded_guidance: float | None = None
    gather: GatherParams | None = None

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "n h w c"],
        sigma: Float[Array, " n"],
        embeds: Float[Array, "n t e"],
        pooled: Float[Array, "n p"],
    ) -> Float[Array, "n h w c"]:
        """Velocity of noisy latents.

        Args:
          latents: [N, h, w, C].
          sigma: [N] noise levels in [0, 1].
          embeds: [N, T, joint_attention_dim]; all tokens are attended, there is no mask.
          pooled: [N, pooled_projection_dim].

        Returns:
          [N, h, w, C] in `stream_dtype`, or `dtype` without one.

        Raises:
          InputError: latents that do not divide into tokens; an unknown option; a guidance scale that is missing, or
            one too many.
        """
        config = self.config
        self._check(latents.shape)
        check_guidance(config, self.embedded_guidance, "embedded_guidance")
        num, height, width = latents.shape[:3]
        num_text = embeds.shape[1]
        tables = rotary_tables(config, num_text, height // PATCH, width // PATCH)
        low_rank: dict[str, Any] = {"dtype": self.dtype, "lora_scale": self.lora_scale}
        tokens = jnp.asarray(pack(latents))
        x = LoraDense(config.width, name="x_embedder", **low_rank)(tokens)
        c = LoraDense(config.width, name="context_embedder", **low_rank)(embeds)
        stream_dtype = self.dtype if self.stream_dtype is None else self.stream_dtype
        x, c = x.astype(stream_dtype), c.astype(stream_dtype)
        guidance = None
        if self.embedded_guidance is not None:
            guidance = jnp.full(num, self.embedded_guidance, jnp.float32)
        embed = TimeGuidanceTextEmbed(config.width, name="time_text_embed", **low_rank)
        temb = embed(sigma, guidance, pooled)
        double = self._run(DoubleBlock, "double", config.num_layers)
        (x, c), _ = double((x, c), temb, tables)
        single = self._run(SingleBlock, "single", config.num_single_layers)
        both, _ = single(jnp.concatenate([c, x], axis=1), temb, tables)
        # Of the text tokens nothing is asked.
        x = both[:, num_text:]
        head = low_rank | {"dtype": stream_dtype}
        scale, shift = AdaLayerNorm(2, name="norm_out", **head)(temb)
        x = modulate(layer_norm(x), shift, scale, stream_dtype)
        x = LoraDense(config.in_channels, name="proj_out", **head)(x)
        return jnp.asarray(unpack(x, height, width))

    def _run(self, block: type[nn.Module], kind: str, length: int) -> Any:
        """A run of equal blocks, as one scan over their stacked parameters."""
        # Parameters that are only being made lie whole.
        gather = None if self.is_initializing() else self.gather
        wrapping = (f"block_{kind}", self.remat, gather)
        run = run_of_blocks(block, *wrapping, length, self.unroll, num_shared=2)
        return run(
            self.config,
            self.dtype,
            self.attention,
            self.lora_scale,
            name=f"blocks_{kind}",
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raises InputError for options or latents that the model cannot take."""
        one_of("remat", self.remat, REMAT_POLICIES)
        channels = self.config.latent_channels
        if len(shape) != 4 or shape[-1] != channels:
            raise InputError(f"latents: expected [N, h, w, {channels}]; received {list(shape)}")
        if shape[1] % PATCH or shape[2] % PATCH:
            raise InputError(
                f"latents: expected sides divisible by {PATCH}, as a token is {PATCH} x {PATCH} cells; "
                f"received {shape[1]} x {shape[2]}"
            )


def check_guidance(config: FluxConfig, guidance: float | None, name: str) -> None:
    """Raises InputError for a guidance scale that a model does not take, or for none where it needs one.

    Args:
      config: architecture.
      guidance: guidance scale; None for none.
      name: of the setting, for the message.
    """
    if config.guidance_embeds and guidance is None:
        raise InputError(
            f"{name}: expected a guidance scale, as this model has a guidance embedding (3.5 is usual); "
            "received none"
        )
    if not config.guidance_embeds and guidance is not None:
        raise InputError(
            f"{name}: expected none, as this model has no guidance embedding; received {guidance:g}"
        )


def abstract_params(model: FluxTransformer) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    config = model.config
    # One image token and one text token: no parameter's shape depends on how many there are.
    inputs = (
        (1, PATCH, PATCH, config.latent_channels),
        (1,),
        (1, 1, config.joint_attention_dim),
        (1, config.pooled_projection_dim),
    )
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    # No parameter depends on how strong the guidance is.
    guidance = 1.0 if config.guidance_embeds else None
    plain = plainly_compiled(model).clone(embedded_guidance=guidance)
    return parameter_shapes(plain, *structs)


def velocity(
    model: FluxTransformer,
    params: Params,
    adapter: Adapter | None,
    xt: Float[Array, "n h w c"],
    sigma: Float[ArrayLike, " n"] | Float[ArrayLike, ""],
    cond: Conditioning,
) -> Float[Array, "n h w c"]:
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
      InputError: adapter leaves that no layer reads or that do not fit; see also `FluxTransformer`.
    """
    levels = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), xt.shape[:1])
    return adapted_velocity(model, params, adapter, xt, levels, cond["embeds"], cond["pooled"])
