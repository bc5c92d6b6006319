"""Shapes of CLIP's towers, as their published `config.json` gives them.

Source: Radford et al. 2021 (arXiv 2103.00020).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from marble_jax.errors import one_of
from marble_jax.weights.published_config import check_heads, config_from

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a text tower; names and defaults are those of its config.json, which may leave defaults out."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """The config of a parsed config.json; keys that do not change the network's function are passed over."""
        return config_from(cls, values)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of a vision tower; names and defaults are those of its config.json."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
        """The config of a parsed config.json; keys that do not change the network's function are passed over."""
        return config_from(cls, values)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the space they meet in."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """The config of a parsed `CLIPModel` config.json; the towers' own `projection_dim` does not count there."""
        return cls(
            CLIPTextConfig.from_dict(values.get("text_config") or {}),
            CLIPVisionConfig.from_dict(values.get("vision_config") or {}),
            values.get("projection_dim", 512),
        )


def _check(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    one_of("CLIP config hidden_act", config.hidden_act, ACTIVATIONS)
    check_heads("CLIP config", config.hidden_size, config.num_attention_heads)
