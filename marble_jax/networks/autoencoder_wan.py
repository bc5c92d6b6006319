"""The causal video autoencoder of Wan 2.1 (diffusers' `AutoencoderKLWan`), channel-last.

Clips are [N, F, H, W, 3] in [0, 1] with F = 4 k + 1 frames, latents [N, k + 1, H/8, W/8, C] in the scale the
transformer works in: (z - mean) / std by channel, of the posterior's z. The first latent frame is the first frame
alone, so that an image is a clip of one frame; nothing looks at later frames.

Clips are decoded as a stream over latent frames (`decode_stream`, or one chunk at a time), whose memory does not grow
with the clip but for what it returns, and which gives what a whole clip at once does.

Modules carry the names their tensors have in a diffusers file, dots included, so the mapping from parameters to file
keys is the identity on paths.

Source: Wan team 2025 (arXiv 2503.20314); diffusers 0.42 `AutoencoderKLWan`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marble_jax.networks.autoencoder_wan_coders import Decoder, Encoder
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.networks.causal_conv import STREAM, CausalConv
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.types import Params
from marble_jax.weights.component import load_component, open_component
from marble_jax.weights.key_map import PlaceLeaf, path_entries

State = Any
"""What a stream keeps between two chunks."""


class AutoencoderWan(nn.Module):
    """Encoder and decoder, without the latent scale (that is `decode_chunk` below).

    Attributes:
      config: the network's shape.
      dtype: of the computation; norms are always float32.
      taps: whether causal convolutions are sums of two-dimensional ones; None leaves it to the backend.
    """

    config: WanVAEConfig
    dtype: Any = jnp.float32
    taps: bool | None = None

    def setup(self) -> None:
        z_dim = self.config.z_dim
        self.encoder = Encoder(self.config, self.dtype, self.taps)
        self.decoder = Decoder(self.config, self.dtype, self.taps)
        self.quant_conv = CausalConv(2 * z_dim, (1, 1, 1), self.dtype)
        self.post_quant_conv = CausalConv(z_dim, (1, 1, 1), self.dtype)

    def moments(self, x: jax.Array, begins: bool = True) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance (in [-30, 20]) of the posterior, each [N, f, h, w, z_dim].

        Args:
          x: [N, F, H, W, 3] in [-1, 1].
          begins: whether the clip begins with `x`; otherwise a stream goes on.
        """
        moments = self.quant_conv(self.encoder(x, begins))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        # Bounds of diffusers' DiagonalGaussianDistribution: exp of either is finite in float32.
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def reconstruct(self, z: jax.Array, begins: bool = True) -> jax.Array:
        """Clips [N, F, H, W, 3], nominally in [-1, 1].

        Args:
          z: unscaled latents [N, f, h, w, z_dim].
          begins: whether the clip begins with `z`; otherwise a stream goes on.
        """
        return self.decoder(self.post_quant_conv(z), begins)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstruction through the posterior mean; touches every parameter, which is what `init` needs."""
        return self.reconstruct(self.moments(x)[0])


def load_wan_vae(
    directory: pathlib.Path | str, dtype: Any = jnp.float32, place: PlaceLeaf | None = None
) -> tuple[AutoencoderWan, Params]:
    """The autoencoder and its parameters of a component directory (`place` as in `load_component`).

    Raises:
      InputError: missing or malformed directory, config or weights.
    """
    source = open_component(directory)
    model = AutoencoderWan(WanVAEConfig.from_dict(source.config), dtype)
    shapes = abstract_params(model)
    params = load_component(source, path_entries(shapes), shapes, dtype, place=place)
    return model, params


def abstract_params(model: AutoencoderWan) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    config = model.config
    # One latent cell: no leaf's shape depends on the size of the clip.
    side = config.scale_factor_spatial
    image = jax.ShapeDtypeStruct((1, 1, side, side, config.in_channels), jnp.float32)
    return parameter_shapes(model, image)


def decode_stream(model: AutoencoderWan, params: Params, latents: jax.Array) -> jax.Array:
    """Clips [N, F, H, W, 3], float32 in [0, 1], of latents [N, f, h, w, C] in the transformer's scale."""
    clips, state = decode_chunk(model, params, latents[:, :1])
    if latents.shape[1] == 1:
        return clips

    def step(state: State, latent: jax.Array) -> tuple[State, jax.Array]:
        frames, state = decode_chunk(model, params, latent[:, None], state)
        return state, frames

    _, more = jax.lax.scan(step, state, jnp.moveaxis(latents[:, 1:], 1, 0))
    return _with_later_frames(clips, more)


def decode_chunk(
    model: AutoencoderWan, params: Params, latents: jax.Array, state: State | None = None
) -> tuple[jax.Array, State]:
    """The next frames of a stream, float32 in [0, 1], and what the stream keeps.

    Args:
      model: the autoencoder.
      params: its parameters.
      latents: [N, 1, h, w, C], the next latent frame, in the transformer's scale.
      state: returned for the latent frame before; None at first.

    Returns:
      [N, 1, H, W, 3] at first, then [N, 4, H, W, 3], and the state.
    """
    z = _unscaled(model.config, latents)
    decoded, state = _run_chunk(model, params, "reconstruct", z, state)
    return _to_pixels(decoded), state


def _run_chunk(
    model: AutoencoderWan, params: Params, method: str, x: jax.Array, state: State | None
) -> tuple[Any, State]:
    """One chunk through a method of the model, and the stream after it."""
    variables = {"params": params}
    if state is not None:
        variables |= state
    return model.apply(variables, x, state is None, method=method, mutable=[STREAM])


def _with_later_frames(first: jax.Array, later: jax.Array) -> jax.Array:
    """[N, 1, ...] and the chunks [f, N, c, ...] behind it, as [N, 1 + f c, ...]."""
    chunks = jnp.moveaxis(later, 0, 1)
    frames = chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])
    return jnp.concatenate([first, frames], axis=1)


def _to_pixels(decoded: jax.Array) -> jax.Array:
    """[-1, 1] to [0, 1] in float32; a decoder overshoots at sharp edges."""
    return jnp.clip(0.5 * decoded.astype(jnp.float32) + 0.5, 0.0, 1.0)


def _unscaled(config: WanVAEConfig, latents: jax.Array) -> jax.Array:
    """Latents as the decoder takes them."""
    z = jnp.asarray(latents, jnp.float32) * jnp.asarray(config.latents_std)
    return z + jnp.asarray(config.latents_mean)
