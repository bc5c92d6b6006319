"""Key map between the transformer's parameters and a published diffusers `transformer` directory.

The map is derived from the (abstract) parameters alone: the module path spells the diffusers name, with the stacked
runs spread over `transformer_blocks.<i>`. Adapters use the same names for their targets and files.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.transformer import MMDiT, abstract_params
from marble_jax.types import Params
from marble_jax.weights.component import load_component, open_component
from marble_jax.weights.key_map import Entry

_DOTTED = {"to_out_0": "to_out.0", "net_0_proj": "net.0.proj", "net_2": "net.2"}


@dataclasses.dataclass(frozen=True)
class Module:
    """One layer under its published name, and its place in the parameter tree.

    Attributes:
      name: diffusers name, such as "transformer_blocks.3.attn.to_q".
      path: path of the flax module.
      index: position on the stacked axis of its run; None outside the runs.
    """

    name: str
    path: tuple[str, ...]
    index: int | None


def modules_at(path: tuple[str, ...], shape: tuple[int, ...]) -> list[Module]:
    """The published layers that a leaf of `shape` of the flax module at `path` holds, in stacking order."""
    room, _, number = path[0].partition("_")
    rest = [_DOTTED.get(part, part) for part in path]
    if room == "blocks":
        indices = range(shape[0])
        return [
            Module(".".join((f"transformer_blocks.{int(number) + i}", *rest[1:])), path, i)
            for i in indices
        ]
    if room == "block":
        rest[0] = f"transformer_blocks.{number}"
    return [Module(".".join(rest), path, None)]


def entries(shapes: Mapping[str, Any]) -> list[Entry]:
    """Key map of every tensor of the transformer.

    Args:
      shapes: parameters or abstract parameters of an `MMDiT`.
    """
    result = []
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        for module in modules_at(path[:-1], leaf.shape):
            name = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
            rank = len(leaf.shape) - (module.index is not None)
            transform = {2: "linear", 4: "conv"}[rank] if path[-1] == "kernel" else "none"
            result.append(Entry(f"{module.name}.{name}", path, transform, module.index))
    return result


def dense_modules(shapes: Mapping[str, Any]) -> list[Module]:
    """Every dense layer, the ones an adapter can target, in tree order."""
    leaves = traverse_util.flatten_dict(dict(shapes)).items()
    kernels = {path[:-1]: leaf.shape for path, leaf in leaves if path[-1] == "kernel"}
    found = [module for path, shape in kernels.items() for module in modules_at(path, shape)]
    return [
        module for module in found if len(kernels[module.path]) == 2 + (module.index is not None)
    ]


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
    put = (lambda path, leaf: jnp.asarray(leaf)) if place is None else place

    def keep(path: tuple[str, ...], leaf: Any) -> Any:
        cropped = path == ("pos_embed", "pos_embed") and model.table_side is not None
        return put(path, crop_table(np.asarray(leaf), model.side) if cropped else leaf)

    return model, load_component(source, entries(whole), whole, param_dtype, place=keep)


def crop_table(table: np.ndarray, side: int) -> np.ndarray:
    """Centre [1, side * side, D] of a positional table [1, P * P, D]; P - side is even."""
    whole = round(table.shape[1] ** 0.5)
    start = (whole - side) // 2
    square = table.reshape(whole, whole, -1)[start : start + side, start : start + side]
    return np.ascontiguousarray(square).reshape(1, side * side, -1)
