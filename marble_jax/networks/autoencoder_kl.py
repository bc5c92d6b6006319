"""The image autoencoder of latent diffusion (diffusers' `AutoencoderKL`), channel-last.

Images are [N, H, W, 3] in [0, 1], latents [N, H/f, W/f, C] in the scale the transformer works in:
`(z - shift_factor) * scaling_factor` of the posterior's z. `f = 2 ** (len(block_out_channels) - 1)`.

Modules carry the names their tensors have in a diffusers file, dots included, so the mapping from parameters to file
keys is the identity on paths.

Source: Rombach et al. 2022 (arXiv 2112.10752) for the architecture; shift_factor from Esser et al. 2024
(arXiv 2403.03206).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import MaxLen, MinLen

from marble_jax.errors import InputError
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.storage.files import part_of, place_of
from marble_jax.types import Params
from marble_jax.validation import Factor, Layers, Offset, Width, short, validated
from marble_jax.weights.component import load_component, open_component
from marble_jax.weights.key_map import PlaceLeaf, path_entries
from marble_jax.weights.published_config import config_from

_EPS = 1e-6  # of every group norm, in every published AutoencoderKL; configs do not say
_BLOCK_TYPES = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}
"""The kind of block that all levels of the published image autoencoders are made of."""


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of an `AutoencoderKL`; the names are those of its config.json.

    Attributes:
      block_out_channels: width at each resolution, finest first.
      layers_per_block: residual blocks per resolution in the encoder; the decoder has one more.
      scaling_factor: multiplies latents on their way to the transformer.
      shift_factor: is subtracted from them before that.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: Width = 4
    block_out_channels: Annotated[tuple[Width, ...], MinLen(1), MaxLen(8)] = (64,)
    layers_per_block: Layers = 1
    norm_num_groups: Width = 32
    scaling_factor: Factor = 0.18215
    shift_factor: Offset = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) != 3:
                raise InputError(
                    f"VAE config {name}: expected 3, of colour images; received {getattr(self, name)}"
                )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise InputError(
                    "VAE config norm_num_groups: expected a divisor of every block_out_channels "
                    f"{list(self.block_out_channels)}; received {self.norm_num_groups}"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """The config of a parsed config.json; keys that do not change the network's function are passed over.

        Raises:
          InputError: the config asks for a block type or an activation this module does not have.
        """
        what = f"{place_of(values)}VAE config"
        for key, only in _BLOCK_TYPES.items():
            kinds = validated(list[str], values.get(key, []), f"{what} {key}")
            unknown = set(kinds) - {only}
            if unknown:
                received = ", ".join(sorted(unknown))
                raise InputError(f"{what} {key}: expected only {only}; received {received}")
        # Two names of one function: diffusers' own configs write the first, converted ones the second.
        if values.get("act_fn", "silu") not in ("silu", "swish"):
            raise InputError(f"{what} act_fn: expected silu; received {short(values['act_fn'])}")
        # diffusers writes null for autoencoders that have no shift.
        if values.get("shift_factor", 0) is None:
            values = part_of(values, {**values, "shift_factor": 0.0})
        return config_from(cls, values, "VAE config")


class ResnetBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, plus the input (through a 1x1 convolution where the width changes)."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.silu(_norm(self.groups, self.dtype, "norm1")(x))
        y = _conv3(self.features, self.dtype, "conv1")(y)
        y = nn.silu(_norm(self.groups, self.dtype, "norm2")(y))
        y = _conv3(self.features, self.dtype, "conv2")(y)
        # Files have the shortcut only where the width changes.
        if x.shape[-1] != self.features:
            shortcut = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")
            x = shortcut(x)
        return x + y


class SpatialAttention(nn.Module):
    """One head over all cells of the image, width = channels, plus the input."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        normed = _norm(self.groups, self.dtype, "group_norm")(x)
        # Cells are the tokens [N, h * w, 1 head, C] of attention.
        tokens = normed.reshape(n, h * w, 1, c)
        q = nn.Dense(c, dtype=self.dtype, name="to_q")(tokens)
        k = nn.Dense(c, dtype=self.dtype, name="to_k")(tokens)
        v = nn.Dense(c, dtype=self.dtype, name="to_v")(tokens)
        attended = jax.nn.dot_product_attention(q, k, v)
        y = nn.Dense(c, dtype=self.dtype, name="to_out.0")(attended)
        return x + y.reshape(n, h, w, c)


class Encoder(nn.Module):
    """[N, H, W, in_channels] in [-1, 1] to posterior moments [N, H/f, W/f, 2 * latent_channels]."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        block = functools.partial(ResnetBlock, groups=config.norm_num_groups, dtype=self.dtype)
        widths = config.block_out_channels
        x = _conv3(widths[0], self.dtype, "conv_in")(x)
        for i, width in enumerate(widths):
            for j in range(config.layers_per_block):
                x = block(width, name=f"down_blocks.{i}.resnets.{j}")(x)
            if i < len(widths) - 1:
                x = _halve(width, self.dtype, f"down_blocks.{i}.downsamplers.0.conv")(x)
        x = _middle(config, self.dtype, x)
        x = nn.silu(_norm(config.norm_num_groups, self.dtype, "conv_norm_out")(x))
        return _conv3(2 * config.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """z [N, h, w, latent_channels] to images [N, f h, f w, out_channels], nominally in [-1, 1]."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        config = self.config
        block = functools.partial(ResnetBlock, groups=config.norm_num_groups, dtype=self.dtype)
        widths = config.block_out_channels[::-1]
        x = _conv3(widths[0], self.dtype, "conv_in")(z)
        x = _middle(config, self.dtype, x)
        for i, width in enumerate(widths):
            # The published decoders have one block more at each level than their encoders.
            for j in range(config.layers_per_block + 1):
                x = block(width, name=f"up_blocks.{i}.resnets.{j}")(x)
            if i < len(widths) - 1:
                x = nearest_double(x)
                x = _conv3(width, self.dtype, f"up_blocks.{i}.upsamplers.0.conv")(x)
        x = nn.silu(_norm(config.norm_num_groups, self.dtype, "conv_norm_out")(x))
        return _conv3(config.out_channels, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """Encoder and decoder, without the latent scale (that is `encode` and `decode` below).

    Attributes:
      config: the network's shape.
      dtype: of the computation; group-norm statistics are always float32.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=self.dtype)

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance (in [-30, 20]) of the posterior, each [N, h, w, C], of x [N, H, W, 3] in [-1, 1]."""
        moments = self.encoder(x)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        # Bounds of diffusers' DiagonalGaussianDistribution: exp of either is finite in float32.
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def reconstruct(self, z: jax.Array) -> jax.Array:
        """Images [N, H, W, 3], nominally in [-1, 1], of unscaled z [N, h, w, C]."""
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstruction through the posterior mean; touches every parameter, which is what `init` needs."""
        return self.reconstruct(self.moments(x)[0])


def load_vae(
    directory: pathlib.Path | str, dtype: Any = jnp.float32, place: PlaceLeaf | None = None
) -> tuple[AutoencoderKL, Params]:
    """The autoencoder and its parameters of a component directory (`place` as in `load_component`).

    Raises:
      InputError: missing or malformed directory, config or weights.
    """
    source = open_component(directory)
    model = AutoencoderKL(VAEConfig.from_dict(source.config), dtype)
    shapes = abstract_params(model)
    params = load_component(source, path_entries(shapes), shapes, dtype, place=place)
    return model, params


def abstract_params(model: AutoencoderKL) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    config = model.config
    # One latent cell: no leaf's shape depends on the size of the image.
    side = config.downsampling
    image = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    return parameter_shapes(model, image)


def encode(
    model: AutoencoderKL, params: Params, images: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Latents of images, in the transformer's scale.

    Args:
      model: the autoencoder.
      params: its parameters.
      images: [N, H, W, 3] in [0, 1]; H and W multiples of `model.config.downsampling`.
      key: draws from the posterior when given; the posterior mean otherwise.

    Returns:
      [N, H/f, W/f, C] float32.
    """
    x = 2.0 * jnp.asarray(images, jnp.float32) - 1.0
    # Any: flax types the result of `apply` by `__call__`, whatever the method.
    moments: Any = model.apply({"params": params}, x, method="moments")
    mean, logvar = moments
    z = mean.astype(jnp.float32)
    if key is not None:
        deviation = jnp.exp(0.5 * logvar.astype(jnp.float32))
        z = z + deviation * jax.random.normal(key, z.shape, jnp.float32)
    return (z - model.config.shift_factor) * model.config.scaling_factor


def decode(model: AutoencoderKL, params: Params, latents: jax.Array) -> jax.Array:
    """Images [N, f h, f w, 3], float32 in [0, 1], of latents [N, h, w, C] in the transformer's scale."""
    config = model.config
    z = jnp.asarray(latents, jnp.float32) / config.scaling_factor + config.shift_factor
    # Any: as in `encode`.
    decoded: Any = model.apply({"params": params}, z, method="reconstruct")
    y = decoded.astype(jnp.float32)
    # [-1, 1] to [0, 1]; a decoder overshoots at sharp edges. Infinity is no edge: it stays a number that is none.
    images = jnp.clip(0.5 * y + 0.5, 0.0, 1.0)
    return jnp.where(jnp.isfinite(y), images, jnp.nan)


def nearest_double(x: jax.Array) -> jax.Array:
    """[N, h, w, C] to [N, 2h, 2w, C], every cell repeated twice along both sides."""
    n, h, w, c = x.shape
    # Broadcast along a new axis behind each side, which the reshape then folds into it.
    cells = x[:, :, None, :, None, :]
    repeated = jnp.broadcast_to(cells, (n, h, 2, w, 2, c))
    return repeated.reshape(n, 2 * h, 2 * w, c)


def _conv3(features: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


def _halve(features: int, dtype: Any, name: str) -> nn.Conv:
    # Stride 2 without left padding: the window of an output cell starts at its own pixels.
    padding = ((0, 1), (0, 1))
    return nn.Conv(features, (3, 3), strides=2, padding=padding, dtype=dtype, name=name)


def _norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    # E[x^2] - E[x]^2 cancels catastrophically on the flat backgrounds images are full of.
    return nn.GroupNorm(groups, epsilon=_EPS, use_fast_variance=False, dtype=dtype, name=name)


def _middle(config: VAEConfig, dtype: Any, x: jax.Array) -> jax.Array:
    width = config.block_out_channels[-1]
    x = ResnetBlock(width, config.norm_num_groups, dtype, name="mid_block.resnets.0")(x)
    if config.mid_block_add_attention:
        x = SpatialAttention(config.norm_num_groups, dtype, name="mid_block.attentions.0")(x)
    return ResnetBlock(width, config.norm_num_groups, dtype, name="mid_block.resnets.1")(x)
