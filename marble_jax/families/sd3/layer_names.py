"""Key map between the transformer's parameters and a published diffusers `transformer` directory.

The map is derived from the (abstract) parameters alone: the module path spells the diffusers name, with the stacked
runs spread over `transformer_blocks.<i>`. Adapters use the same names for their targets and files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from marble_jax.families.descriptions import Layer
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.transformer import MMDiT, abstract_params
from marble_jax.types import Params
from marble_jax.weights.component import load_component, open_component
from marble_jax.weights.key_map import Entry

_DOTTED = {"to_out_0": "to_out.0", "net_0_proj": "net.0.proj", "net_2": "net.2"}


def layers_at(path: tuple[str, ...], shape: tuple[int, ...]) -> list[Layer]:
    """The published layers that a leaf of `shape` of the flax module at `path` holds, in stacking order."""
    kind, _, number = path[0].partition("_")
    parts = [_DOTTED.get(part, part) for part in path]
    if kind == "blocks":
        # A stacked run: its first axis counts blocks from the number in its name.
        layers = []
        for index in range(shape[0]):
            parts[0] = f"transformer_blocks.{int(number) + index}"
            layers.append(Layer(".".join(parts), path, index))
        return layers
    if kind == "block":
        parts[0] = f"transformer_blocks.{number}"
    return [Layer(".".join(parts), path, None)]


def entries(shapes: Mapping[str, Any]) -> list[Entry]:
    """Key map of every tensor of the transformer.

    Args:
      shapes: parameters or abstract parameters of an `MMDiT`.
    """
    result = []
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        leaf_name = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
        for layer in layers_at(path[:-1], leaf.shape):
            num_axes = len(leaf.shape)
            if layer.index is not None:
                # A published tensor is one layer's, without the axis of the stacked run.
                num_axes -= 1
            transform = "none"
            if path[-1] == "kernel":
                transform = {2: "linear", 4: "conv"}[num_axes]
            result.append(Entry(f"{layer.name}.{leaf_name}", path, transform, layer.index))
    return result


def load_mmdit(
    directory: pathlib.Path | str,
    param_dtype: Any = jnp.float32,
    place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
    variant: str | None = None,
    **options: Any,
) -> tuple[MMDiT, Params]:
    """Opens a `transformer` directory in diffusers' layout or ours.

    Args:
      directory: holds `config.json` and safetensors (or `params`).
      param_dtype: dtype of the weights in memory.
      place: puts a finished leaf on devices; see `load_component`.
      variant: file variant, such as "fp16".
      **options: fields of `MMDiT`. With `table_side`, only the centre of the positional table is kept.

    Returns:
      The model and its parameters.

    Raises:
      InputError: unreadable, incomplete or unsupported directory.
    """
    source = open_component(directory, variant)
    model = MMDiT(MMDiTConfig.from_dict(source.config), **options)
    whole = abstract_params(model.clone(table_side=None))

    def put(path: tuple[str, ...], leaf: Any) -> Any:
        if path == ("pos_embed", "pos_embed") and model.table_side is not None:
            # Cropped before it is placed: the whole table need not fit on a device.
            leaf = crop_table(np.asarray(leaf), model.side)
        return jnp.asarray(leaf) if place is None else place(path, leaf)

    return model, load_component(source, entries(whole), whole, param_dtype, place=put)


def crop_table(
    table: Float[np.ndarray, "1 patches d"], side: int
) -> Float[np.ndarray, "1 cropped d"]:
    """Centre [1, side * side, D] of a positional table [1, P * P, D]; P - side is even."""
    whole = round(table.shape[1] ** 0.5)
    start = (whole - side) // 2
    square = table.reshape(whole, whole, -1)
    centre = square[start : start + side, start : start + side]
    # A copy: a view would keep the whole table in memory.
    return np.ascontiguousarray(centre).reshape(1, side * side, -1)
