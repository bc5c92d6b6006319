"""BLIP's image-grounded text encoder: a ViT looks at the image, a BERT reads the prompt and attends to it.

Only what ImageReward uses: the state of the text's first token after all layers. Modules carry the names their tensors
have in `ImageReward.pt`, dots included.

Source: Li et al. 2022 (arXiv 2201.12086); `models/vit.py` and `models/med.py` of salesforce/BLIP.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marble_jax.errors import InputError, one_of
from marble_jax.networks.clip import ACTIVATIONS
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.types import Params
from marble_jax.validation import Count, Epsilon, Id, Layers, Width
from marble_jax.weights.key_map import PlaceLeaf, load_params, path_entries
from marble_jax.weights.published_config import check_heads, config_from
from marble_jax.weights.safetensors_files import Tensors

PREFIX = "blip."
_TOWER = f"{PREFIX}visual_encoder."
VISION_EPS = 1e-6
VISION_HEAD_WIDTH = 64
"""Of every published BLIP image tower; the files do not say."""
_IGNORED = ("*.position_ids", "blip.vision_proj.*", "blip.text_proj.*", "mlp.*")
"""A buffer, the projections of BLIP's contrastive loss, and the head, which belongs to the reward."""


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
    """Shape of the text encoder; names and defaults are those of `med_config.json`."""

    vocab_size: Count = 30524
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 12
    max_position_embeddings: Width = 512
    hidden_act: str = "gelu"
    layer_norm_eps: Epsilon = 1e-12
    pad_token_id: Id = 0

    def __post_init__(self) -> None:
        one_of("BLIP config hidden_act", self.hidden_act, ACTIVATIONS)
        check_heads("BLIP config", self.hidden_size, self.num_attention_heads)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlipTextConfig:
        """The config of a parsed med_config.json; keys that do not change the function are passed over."""
        return config_from(cls, values, "BLIP config")


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig:
    """Shape of the image tower; the defaults are ViT-L/16's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    image_size: int = 224
    patch_size: int = 16


class Attention(nn.Module):
    """Multi-head attention of [N, T, D] to itself or to `context` [N, S, C], with BERT's names."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        n, t, d = x.shape
        if context is None:
            context = x

        def dense(name: str) -> nn.Dense:
            return nn.Dense(d, dtype=self.dtype, name=name)

        s = context.shape[1]
        q = dense("self.query")(x).reshape(n, t, self.heads, -1)
        k = dense("self.key")(context).reshape(n, s, self.heads, -1)
        v = dense("self.value")(context).reshape(n, s, self.heads, -1)
        if mask is not None:
            # bool [N, S] says which keys count, for every head and every query alike.
            mask = mask[:, None, None]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return dense("output.dense")(y.reshape(n, t, d))


class TextLayer(nn.Module):
    """Self-attention, cross-attention to the image and MLP, each added to its input and layer-normed after."""

    config: BlipTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        config = self.config

        activation = ACTIVATIONS[config.hidden_act]

        def normed(y: jax.Array, name: str) -> jax.Array:
            norm = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name=f"{name}.LayerNorm")
            return norm(y)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        attention = Attention(config.num_attention_heads, self.dtype, name="attention")
        x = normed(x + attention(x, mask=mask), "attention.output")
        crossattention = Attention(config.num_attention_heads, self.dtype, name="crossattention")
        x = normed(x + crossattention(x, image), "crossattention.output")
        y = activation(dense(config.intermediate_size, "intermediate.dense")(x))
        return normed(x + dense(config.hidden_size, "output.dense")(y), "output")


class TextTower(nn.Module):
    """Token ids [N, T] with their mask bool [N, T] and image states [N, S, C] to text states [N, T, D]."""

    config: BlipTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        config = self.config
        words = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            name="embeddings.word_embeddings",
        )
        positions = nn.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            dtype=self.dtype,
            name="embeddings.position_embeddings",
        )
        # BLIP's BERT has no embedding of token types.
        x = words(ids)
        x = x + positions(jnp.arange(ids.shape[1]))
        x = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="embeddings.LayerNorm")(x)
        for i in range(config.num_hidden_layers):
            x = TextLayer(config, self.dtype, name=f"encoder.layer.{i}")(x, mask, image)
        return x


class VisionLayer(nn.Module):
    """Pre-norm self-attention and MLP."""

    config: BlipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, t, d = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        y = nn.LayerNorm(VISION_EPS, dtype=self.dtype, name="norm1")(x)
        # The file packs q, k and v in one layer, each with its heads side by side.
        packed = dense(3 * d, "attn.qkv")(y).reshape(n, t, 3, -1, VISION_HEAD_WIDTH)
        q, k, v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
        y = jax.nn.dot_product_attention(q, k, v)
        x = x + dense(d, "attn.proj")(y.reshape(n, t, d))
        y = nn.LayerNorm(VISION_EPS, dtype=self.dtype, name="norm2")(x)
        y = ACTIVATIONS["gelu"](dense(self.config.intermediate_size, "mlp.fc1")(y))
        return x + dense(d, "mlp.fc2")(y)


class VisionTower(nn.Module):
    """Normalised pixels [N, H, W, 3] to the states of class token and patches [N, 1 + patches, D]."""

    config: BlipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        config, n = self.config, pixels.shape[0]
        if pixels.shape[1:] != (config.image_size, config.image_size, 3):
            raise InputError(
                f"BLIP pixels: expected [N, {config.image_size}, {config.image_size}, 3]; "
                f"received {list(pixels.shape)}"
            )
        d, side = config.hidden_size, config.image_size // config.patch_size
        # A patch is one window of the convolution: stride and window are the patch's side.
        patch_embedding = nn.Conv(
            d,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            dtype=self.dtype,
            name="patch_embed.proj",
        )
        patches = patch_embedding(pixels).reshape(n, side * side, d)
        normal = nn.initializers.normal(0.02)
        class_embedding = self.param("cls_token", normal, (1, 1, d))
        positions = self.param("pos_embed", normal, (1, side * side + 1, d))
        # One class token for all images, in front of the patches, where position 0 is.
        class_token = jnp.broadcast_to(class_embedding.astype(patches.dtype), (n, 1, d))
        x = jnp.concatenate([class_token, patches], axis=1) + positions.astype(patches.dtype)
        for i in range(config.num_hidden_layers):
            x = VisionLayer(config, self.dtype, name=f"blocks.{i}")(x)
        return nn.LayerNorm(VISION_EPS, dtype=self.dtype, name="norm")(x)


class BlipEncoder(nn.Module):
    """Pixels [N, H, W, 3] and token ids int32 [N, T] to the first token's state [N, D]; padding is not attended to."""

    text: BlipTextConfig
    vision: BlipVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
        image = VisionTower(self.vision, self.dtype, name=f"{PREFIX}visual_encoder")(pixels)
        mask = ids != self.text.pad_token_id
        states = TextTower(self.text, self.dtype, name=f"{PREFIX}text_encoder")(ids, mask, image)
        return states[:, 0]


def vision_config(source: Tensors) -> BlipVisionConfig:
    """The image tower's shape, which no config file of ImageReward holds, from its tensors.

    Raises:
      InputError: a tensor that it is read from is missing.
    """
    width, _, patch, _ = _shape(source, "patch_embed.proj.weight", 4)
    _, num_positions, _ = _shape(source, "pos_embed", 3)
    (inner,) = _shape(source, "blocks.0.mlp.fc1.bias", 1)
    if width % VISION_HEAD_WIDTH:
        raise InputError(
            f"{source.path}: image tower: expected a multiple of {VISION_HEAD_WIDTH} as width; "
            f"received {width}"
        )
    pattern = re.compile(rf"{re.escape(_TOWER)}blocks\.(\d+)\.")
    layers = set()
    for key in source.keys():
        match = pattern.match(key)
        if match is not None:
            layers.add(int(match[1]))
    # One position is the class token's, the others make a square.
    side = round((num_positions - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1 + max(layers),
        image_size=side * patch,
        patch_size=patch,
    )


def _shape(source: Tensors, name: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor of the image tower. Raises InputError unless the file has it, with that rank."""
    key = _TOWER + name
    if key not in source.keys() or len(source.shape(key)) != rank:
        raise InputError(
            f"{source.path}: expected BLIP's tensor {key!r} of rank {rank}; received a file without it"
        )
    return source.shape(key)


def load_blip(
    source: Tensors,
    text: BlipTextConfig,
    dtype: Any = jnp.float32,
    place: PlaceLeaf | None = None,
) -> tuple[BlipEncoder, Params]:
    """Model and parameters from an open `ImageReward.pt` (`place` as in `load_params`); its head is left aside.

    Raises:
      InputError: a tensor is missing, left over or of the wrong shape.
    """
    vision = vision_config(source)
    model = BlipEncoder(text, vision, dtype)
    pixels = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    # Two tokens: no leaf's shape depends on how many there are.
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = parameter_shapes(model, pixels, ids)
    params = load_params(source, path_entries(shapes), shapes, dtype, _IGNORED, place)
    return model, params
