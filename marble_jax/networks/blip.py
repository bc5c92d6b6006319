"""BLIP's image-grounded text encoder: a ViT looks at the image, a BERT reads the prompt and attends to it.

Only what ImageReward uses: the state of the text's first token after all layers. Modules carry the names their tensors
have in `ImageReward.pt`, dots included.

Source: Li et al. 2022 (arXiv 2201.12086); `models/vit.py` and `models/med.py` of salesforce/BLIP.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marble_jax.errors import InputError, one_of
from marble_jax.networks.clip import ACTIVATIONS
from marble_jax.types import Params
from marble_jax.weights.key_map import load_params, path_entries
from marble_jax.weights.safetensors_files import Tensors

PREFIX = "blip."
VISION_EPS = 1e-6
VISION_HEAD_WIDTH = 64
"""Of every published BLIP image tower; the files do not say."""
_IGNORED = ("*.position_ids", "blip.vision_proj.*", "blip.text_proj.*", "mlp.*")
"""A buffer, the projections of BLIP's contrastive loss, and the head, which belongs to the reward."""


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
    """Shape of the text encoder; names and defaults are those of `med_config.json`."""

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        one_of("BLIP config hidden_act", self.hidden_act, ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"BLIP config num_attention_heads: expected a divisor of hidden_size {self.hidden_size}; "
                f"received {self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlipTextConfig:
        """The config of a parsed med_config.json; keys that do not change the function are passed over."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in names})


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
        context = x if context is None else context
        q, k, v = (
            nn.Dense(d, dtype=self.dtype, name=f"self.{name}")(y).reshape(
                n, y.shape[1], self.heads, -1
            )
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        y = jax.nn.dot_product_attention(
            q, k, v, mask=None if mask is None else mask[:, None, None]
        )
        return nn.Dense(d, dtype=self.dtype, name="output.dense")(y.reshape(n, t, d))


class TextLayer(nn.Module):
    """Self-attention, cross-attention to the image and MLP, each added to its input and layer-normed after."""

    config: BlipTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        config = self.config

        def normed(y: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name=f"{name}.LayerNorm")(
                y
            )

        attention = Attention(config.num_attention_heads, self.dtype, name="attention")
        x = normed(x + attention(x, mask=mask), "attention.output")
        crossattention = Attention(config.num_attention_heads, self.dtype, name="crossattention")
        x = normed(x + crossattention(x, image), "crossattention.output")
        y = ACTIVATIONS[config.hidden_act](
            nn.Dense(config.intermediate_size, dtype=self.dtype, name="intermediate.dense")(x)
        )
        return normed(
            x + nn.Dense(config.hidden_size, dtype=self.dtype, name="output.dense")(y), "output"
        )


class TextTower(nn.Module):
    """Token ids [N, T] with their mask bool [N, T] and image states [N, S, C] to text states [N, T, D]."""

    config: BlipTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        config = self.config
        x = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            name="embeddings.word_embeddings",
        )(ids)
        x = x + nn.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            dtype=self.dtype,
            name="embeddings.position_embeddings",
        )(jnp.arange(ids.shape[1]))
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
        y = nn.LayerNorm(VISION_EPS, dtype=self.dtype, name="norm1")(x)
        packed = nn.Dense(3 * d, dtype=self.dtype, name="attn.qkv")(y).reshape(
            n, t, 3, -1, VISION_HEAD_WIDTH
        )
        y = jax.nn.dot_product_attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]).reshape(
            n, t, d
        )
        x = x + nn.Dense(d, dtype=self.dtype, name="attn.proj")(y)
        y = nn.LayerNorm(VISION_EPS, dtype=self.dtype, name="norm2")(x)
        y = ACTIVATIONS["gelu"](
            nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="mlp.fc1")(y)
        )
        return x + nn.Dense(d, dtype=self.dtype, name="mlp.fc2")(y)


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
        patches = nn.Conv(
            d,
            (config.patch_size,) * 2,
            strides=config.patch_size,
            padding="VALID",
            dtype=self.dtype,
            name="patch_embed.proj",
        )(pixels).reshape(n, side * side, d)
        first = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, d)).astype(
            patches.dtype
        )
        where = self.param(
            "pos_embed", nn.initializers.normal(0.02), (1, side * side + 1, d)
        ).astype(patches.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (n, 1, d)), patches], axis=1) + where
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
        return TextTower(self.text, self.dtype, name=f"{PREFIX}text_encoder")(ids, mask, image)[
            :, 0
        ]


def vision_config(source: Tensors) -> BlipVisionConfig:
    """The image tower's shape, which no config file of ImageReward holds, from its tensors.

    Raises:
      InputError: a tensor that it is read from is missing.
    """
    where = f"{PREFIX}visual_encoder."
    found = {}
    for name, rank in (
        ("patch_embed.proj.weight", 4),
        ("pos_embed", 3),
        ("blocks.0.mlp.fc1.bias", 1),
    ):
        if where + name not in source.keys() or len(source.shape(where + name)) != rank:
            raise InputError(
                f"{source.path}: expected BLIP's tensor {where + name!r} of rank {rank}; received a file "
                "without it"
            )
        found[name] = source.shape(where + name)
    width, _, patch, _ = found["patch_embed.proj.weight"]
    layers = [re.match(rf"{re.escape(where)}blocks\.(\d+)\.", key) for key in source.keys()]
    if width % VISION_HEAD_WIDTH:
        raise InputError(
            f"{source.path}: image tower: expected a multiple of {VISION_HEAD_WIDTH} as width; "
            f"received {width}"
        )
    return BlipVisionConfig(
        width,
        found["blocks.0.mlp.fc1.bias"][0],
        1 + max(int(m.group(1)) for m in layers if m),
        round((found["pos_embed"][1] - 1) ** 0.5) * patch,
        patch,
    )


def load_blip(
    source: Tensors,
    text: BlipTextConfig,
    dtype: Any = jnp.float32,
    place: Callable[..., Any] | None = None,
) -> tuple[BlipEncoder, Params]:
    """Model and parameters from an open `ImageReward.pt` (`place` as in `load_params`); its head is left aside.

    Raises:
      InputError: a tensor is missing, left over or of the wrong shape.
    """
    vision = vision_config(source)
    model = BlipEncoder(text, vision, dtype)
    pixels = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), pixels, jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )["params"]
    return model, load_params(source, path_entries(shapes), shapes, dtype, _IGNORED, place)
