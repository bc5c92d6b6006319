"""Key map between the transformer's parameters and a published diffusers `transformer` directory.

The map is derived from the (abstract) parameters alone: the module path spells the diffusers name, with the stacked
runs spread over `transformer_blocks.<i>` and `single_transformer_blocks.<i>`. Adapters use the same names for their
targets and files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from marble_jax.families.descriptions import Layer
from marble_jax.families.flux1.config import FluxConfig
from marble_jax.families.flux1.transformer import FluxTransformer, abstract_params
from marble_jax.types import Params
from marble_jax.weights.component import load_component, open_component
from marble_jax.weights.key_map import Entry, PlaceLeaf

_RUNS = {"blocks_double": "transformer_blocks", "blocks_single": "single_transformer_blocks"}
_DOTTED = {"to_out_0": "to_out.0", "net_0_proj": "net.0.proj", "net_2": "net.2"}


def layers_at(path: tuple[str, ...], shape: tuple[int, ...]) -> list[Layer]:
    """The published layers that a leaf of `shape` of the flax module at `path` holds, in stacking order."""
    parts = [_DOTTED.get(part, part) for part in path]
    if path[0] not in _RUNS:
        return [Layer(".".join(parts), path, None)]
    layers = []
    # The first axis of a stacked run counts its blocks.
    for index in range(shape[0]):
        parts[0] = f"{_RUNS[path[0]]}.{index}"
        layers.append(Layer(".".join(parts), path, index))
    return layers


def entries(shapes: Mapping[str, Any]) -> list[Entry]:
    """Key map of every tensor of the transformer.

    Args:
      shapes: parameters or abstract parameters of a `FluxTransformer`.
    """
    result = []
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        leaf_name = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
        transform = "linear" if path[-1] == "kernel" else "none"
        for layer in layers_at(path[:-1], leaf.shape):
            result.append(Entry(f"{layer.name}.{leaf_name}", path, transform, layer.index))
    return result


def load_transformer(
    directory: pathlib.Path | str,
    param_dtype: Any = jnp.float32,
    place: PlaceLeaf | None = None,
    variant: str | None = None,
    **options: Any,
) -> tuple[FluxTransformer, Params]:
    """Opens a `transformer` directory in diffusers' layout or ours.

    Args:
      directory: holds `config.json` and safetensors (or `params`).
      param_dtype: dtype of the weights in memory.
      place: puts a finished leaf on devices; see `load_component`.
      variant: file variant, such as "fp16".
      **options: fields of `FluxTransformer`.

    Returns:
      The model and its parameters.

    Raises:
      InputError: unreadable, incomplete or unsupported directory.
    """
    source = open_component(directory, variant)
    model = FluxTransformer(FluxConfig.from_dict(source.config), **options)
    shapes = abstract_params(model)
    return model, load_component(source, entries(shapes), shapes, param_dtype, place=place)
