"""CLIP: text tower, vision tower, and the pair that compares images with prompts.

Both towers are the same pre-norm transformer; they differ in how the sequence starts, in the causal mask and in which
position is pooled. Modules carry the names their tensors have in Hugging Face files, dots (and the misspelt
`pre_layrnorm`) included.

Source: Radford et al. 2021 (arXiv 2103.00020).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from marble_jax.errors import InputError
from marble_jax.networks.clip_config import (
    ACTIVATIONS,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.types import Params
from marble_jax.weights.component import OrbaxDir, load_component, open_component
from marble_jax.weights.key_map import Entry, PlaceLeaf, path_entries
from marble_jax.weights.safetensors_files import SafetensorsDir

BUFFERS = ("*.position_ids",)
"""Integer buffers 0, 1, 2, ... that older files hold; nothing to load."""
# Two tokens: no leaf's shape depends on how many there are.
_IDS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
_TOWER = "text_model."
LEGACY_EOS = 2
"""`eos_token_id` of configs written before the field was right: pool where the id is largest instead."""


@flax.struct.dataclass
class TextOutput:
    """Output of the text tower.

    Attributes:
      penultimate: [N, T, hidden_size] output of the last layer but one, before the final norm; the token embeddings
        that diffusion models are conditioned on.
      last: [N, T, hidden_size] output of the last layer after the final norm.
      pooled: [N, projection_dim] projection of `last` at the end-of-text token; `last` itself there, [N, hidden_size],
        in an encoder without projection.
    """

    penultimate: jax.Array
    last: jax.Array
    pooled: jax.Array


class TransformerLayer(nn.Module):
    """Self-attention and MLP, each on the layer-normed input and added to it."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        n, t, d = x.shape
        heads = config.num_attention_heads
        activation = ACTIVATIONS[config.hidden_act]

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        y = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="layer_norm1")(x)
        q = dense(d, "self_attn.q_proj")(y).reshape(n, t, heads, d // heads)
        k = dense(d, "self_attn.k_proj")(y).reshape(n, t, heads, d // heads)
        v = dense(d, "self_attn.v_proj")(y).reshape(n, t, heads, d // heads)
        # No mask for padding: it follows the end-of-text token that is pooled, and causality hides it from that.
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + dense(d, "self_attn.out_proj")(y.reshape(n, t, d))
        y = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="layer_norm2")(x)
        y = activation(dense(config.intermediate_size, "mlp.fc1")(y))
        return x + dense(d, "mlp.fc2")(y)


class TextTower(nn.Module):
    """Token ids to hidden states and the pooled (unprojected) state; the part of the file under `text_model`."""

    config: CLIPTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            name="embeddings.token_embedding",
        )
        positions = nn.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            dtype=self.dtype,
            name="embeddings.position_embedding",
        )
        x = embed(ids) + positions(jnp.arange(ids.shape[1]))
        # What a tower of one layer has before its last is the embedding.
        penultimate = x
        for i in range(config.num_hidden_layers):
            penultimate = x
            x = TransformerLayer(config, True, self.dtype, name=f"encoder.layers.{i}")(x)
        last = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)
        samples = jnp.arange(ids.shape[0])
        pooled = last[samples, end_of_text(ids, config.eos_token_id)]
        return penultimate, last, pooled


class VisionTower(nn.Module):
    """Pixels to the normed class-token state [N, hidden_size]; the part of the file under `vision_model`."""

    config: CLIPVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        config = self.config
        side = config.image_size // config.patch_size
        n, d = pixels.shape[0], config.hidden_size
        if pixels.shape[1:] != (config.image_size, config.image_size, config.num_channels):
            raise InputError(
                f"CLIP pixels: expected [N, {config.image_size}, {config.image_size}, {config.num_channels}]; "
                f"received {list(pixels.shape)}"
            )
        # A patch is one window of the convolution: stride and window are the patch's side.
        patch_embedding = nn.Conv(
            d,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="embeddings.patch_embedding",
        )
        patches = patch_embedding(pixels).reshape(n, side * side, d)
        class_embedding = self.param(
            "embeddings.class_embedding", nn.initializers.normal(0.02), (d,)
        )
        # One class token for all images, in front of the patches, where position 0 and the pooling expect it.
        class_token = jnp.broadcast_to(class_embedding.astype(patches.dtype), (n, 1, d))
        x = jnp.concatenate([class_token, patches], axis=1)
        positions = nn.Embed(
            side * side + 1, d, dtype=self.dtype, name="embeddings.position_embedding"
        )
        x = x + positions(jnp.arange(side * side + 1))
        x = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="pre_layrnorm")(x)
        for i in range(config.num_hidden_layers):
            x = TransformerLayer(config, False, self.dtype, name=f"encoder.layers.{i}")(x)
        norm = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="post_layernorm")
        return norm(x[:, 0])


class CLIPTextEncoder(nn.Module):
    """`CLIPTextModelWithProjection`: ids int32 [N, T] to `TextOutput`.

    Attributes:
      config: the tower's shape.
      dtype: of the computation.
      projected: False for `CLIPTextModel`, which has no projection; what is pooled is then [N, hidden_size].
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    projected: bool = True

    @nn.compact
    def __call__(self, ids: jax.Array) -> TextOutput:
        penultimate, last, pooled = TextTower(self.config, self.dtype, name="text_model")(ids)
        if not self.projected:
            return TextOutput(penultimate, last, pooled)
        project = _projection(self.config.projection_dim, self.dtype, "text_projection")
        return TextOutput(penultimate, last, project(pooled))


class CLIPModel(nn.Module):
    """Both towers and the learned logit scale; the layout of Hugging Face's class of the same name."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.text_model = TextTower(config.text, self.dtype)
        self.vision_model = VisionTower(config.vision, self.dtype)
        self.text_projection = _projection(config.projection_dim, self.dtype, None)
        self.visual_projection = _projection(config.projection_dim, self.dtype, None)
        # log(1 / 0.07), rounded as in CLIP's configs; a file always brings its own.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def text_features(self, ids: jax.Array) -> jax.Array:
        """Unit vectors [N, projection_dim], float32, of ids int32 [N, T]."""
        _, _, pooled = self.text_model(ids)
        return unit(self.text_projection(pooled))

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """Unit vectors [N, projection_dim], float32, of normalised pixels [N, H, W, 3]."""
        pooled = self.vision_model(pixels)
        return unit(self.visual_projection(pooled))

    def scale(self) -> jax.Array:
        """Factor from cosine to logit: exp(logit_scale)."""
        return jnp.exp(self.logit_scale.astype(jnp.float32))

    def __call__(self, ids: jax.Array, pixels: jax.Array) -> jax.Array:
        """Logits [num_images, num_texts]; touches every parameter, which is what `init` needs."""
        return self.scale() * self.image_features(pixels) @ self.text_features(ids).T


def load_text_encoder(
    directory: pathlib.Path | str,
    dtype: Any = jnp.float32,
    place: PlaceLeaf | None = None,
    projected: bool = True,
) -> tuple[CLIPTextEncoder, Params]:
    """Model and parameters of a text encoder's directory.

    Args:
      directory: of a `CLIPTextModelWithProjection`, or of a `CLIPTextModel`.
      dtype: of weights and computation.
      place: as in `load_component`.
      projected: False for a `CLIPTextModel`.

    Raises:
      InputError: missing or malformed directory, config or weights.
    """
    source = open_component(directory)
    model = CLIPTextEncoder(CLIPTextConfig.from_dict(source.config), dtype, projected)
    shapes = abstract_text_params(model)
    entries = text_entries(shapes, source.keys())
    return model, load_component(source, entries, shapes, dtype, BUFFERS, place)


def text_entries(shapes: Mapping[str, Any], keys: Collection[str]) -> list[Entry]:
    """Key map of a text encoder for a file with these keys.

    transformers writes the tower of a `CLIPTextModel` under `text_model.` up to version 4, and from 5 on without.
    """
    entries = path_entries(shapes)
    if not keys or any(key.startswith(_TOWER) for key in keys):
        return entries
    return [dataclasses.replace(entry, key=entry.key.removeprefix(_TOWER)) for entry in entries]


def abstract_text_params(model: CLIPTextEncoder) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    return parameter_shapes(model, _IDS)


def abstract_params(model: CLIPModel) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct` of a pair, without allocating anything."""
    return parameter_shapes(model, _IDS, _pixels(model.config.vision))


def load_clip(
    directory: pathlib.Path | str, dtype: Any = jnp.float32, place: PlaceLeaf | None = None
) -> tuple[CLIPModel, Params]:
    """Model and parameters of a `CLIPModel` directory (`place` as in `load_component`).

    Raises:
      InputError: missing or malformed directory, config or weights.
    """
    source = SafetensorsDir(directory)
    config = CLIPConfig.from_dict(source.config)
    model = CLIPModel(config, dtype)
    return model, _load(source, model, dtype, place, _IDS, _pixels(config.vision))


def end_of_text(ids: jax.Array, eos_token_id: int) -> jax.Array:
    """Position [N] of the token that is pooled, in ids [N, T]: the first end-of-text token.

    With the legacy id 2 of old configs, which is not the tokenizer's, the largest id marks it (end-of-text is the last
    word of CLIP's vocabulary). A row without the token pools position 0, as transformers does.
    """
    # argmax takes the first of equal values: the first match, and position 0 where nothing matches.
    if eos_token_id == LEGACY_EOS:
        return jnp.argmax(ids, axis=-1)
    return jnp.argmax(ids == eos_token_id, axis=-1)


def unit(x: jax.Array) -> jax.Array:
    """x divided by its Euclidean norm along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _projection(features: int, dtype: Any, name: str | None) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, name=name)


def _pixels(config: CLIPVisionConfig) -> jax.ShapeDtypeStruct:
    """One image, which the position table ties to the config's size."""
    side = config.image_size
    return jax.ShapeDtypeStruct((1, side, side, config.num_channels), jnp.float32)


def _load(
    source: SafetensorsDir | OrbaxDir,
    model: nn.Module,
    dtype: Any,
    place: PlaceLeaf | None,
    *inputs: jax.ShapeDtypeStruct,
) -> Params:
    shapes = parameter_shapes(model, *inputs)
    return load_component(source, path_entries(shapes), shapes, dtype, BUFFERS, place)
