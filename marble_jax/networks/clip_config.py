"""Shapes of CLIP's towers, as their published `config.json` gives them.

Source: Radford et al. 2021 (arXiv 2103.00020).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from marble_jax.errors import InputError, one_of
from marble_jax.storage.files import part_of, place_of
from marble_jax.validation import Count, Epsilon, Id, Layers, Side, Width, validated
from marble_jax.weights.published_config import check_heads, config_from

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a text tower; names and defaults are those of its config.json, which may leave defaults out."""

    vocab_size: Count = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 8
    max_position_embeddings: Width = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    eos_token_id: Id = 49407

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """The config of a parsed config.json; keys that do not change the network's function are passed over."""
        return config_from(cls, values, "CLIP text config")


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of a vision tower; names and defaults are those of its config.json."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    projection_dim: Width = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 12
    num_channels: int = 3
    image_size: Side = 224
    patch_size: Side = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    def __post_init__(self) -> None:
        _check(self)
        if self.num_channels != 3:
            raise InputError(
                f"CLIP config num_channels: expected 3, of colour images; received {self.num_channels}"
            )
        if self.patch_size > self.image_size:
            raise InputError(
                f"CLIP config patch_size: expected at most image_size {self.image_size}; received "
                f"{self.patch_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
        """The config of a parsed config.json; keys that do not change the network's function are passed over."""
        return config_from(cls, values, "CLIP vision config")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the space they meet in."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """The config of a parsed `CLIPModel` config.json; the towers' own `projection_dim` does not count there."""
        place = place_of(values)
        towers = []
        for name in ("text_config", "vision_config"):
            fields = validated(dict[str, Any] | None, values.get(name), f"{place}{name}") or {}
            towers.append(part_of(values, fields))
        text, vision = towers
        return cls(
            CLIPTextConfig.from_dict(text),
            CLIPVisionConfig.from_dict(vision),
            validated(Width, values.get("projection_dim", 512), f"{place}projection_dim"),
        )


def _check(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    one_of("CLIP config hidden_act", config.hidden_act, ACTIVATIONS)
    check_heads("CLIP config", config.hidden_size, config.num_attention_heads)
