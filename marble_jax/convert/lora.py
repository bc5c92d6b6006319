"""LoRAs of other libraries as adapters: for inference, several at once with weights, or as a start of training."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.convert.lora_reading import Layer, Lora, Pair, read_lora
from marble_jax.convert.lora_strength import (
    check_strength,
    finite_number,
)
from marble_jax.errors import InputError
from marble_jax.families.layers import dense_layers
from marble_jax.trainable import lora as adapters
from marble_jax.types import Adapter
from marble_jax.weights.formats import FileFormats


def as_lora(path: str, adapter: Adapter, formats: FileFormats, scale: float) -> Lora:
    """An adapter of ours, to be combined with others."""
    layers = {}
    for name, (a, b) in adapters.unstack(formats.lora.layers_at, adapter).items():
        layers[name] = Layer(a, b, scale)
    return Lora(path, layers)


def combine(
    loras: Sequence[tuple[Lora, float]],
    shapes: Mapping[str, Any],
    formats: FileFormats,
    scale: float = 1.0,
) -> Adapter:
    """One adapter that does what all of them do together: sum of weight * scale * a @ b, whatever their ranks.

    The pairs of a layer stand side by side along the rank, which is exact. Layers of a stacked run share a rank; the
    smaller ones are filled up with zeros.

    Args:
      loras: LoRAs and their weights; a negative weight takes one away.
      shapes: parameters or abstract parameters of the transformer.
      formats: of the transformer's family.
      scale: the `lora_scale` of the model that the adapter is for.
    """
    parts: dict[str, list[Pair]] = {}
    for lora, weight in loras:
        check_strength(f"weight of {lora.path}", weight)
        for name, layer in lora.layers.items():
            # Divided by the model's scale, which the model will multiply by.
            scaled = layer.b * np.float32(layer.scale * weight / scale)
            parts.setdefault(name, []).append((layer.a, scaled))
    pairs = {name: _side_by_side(group) for name, group in parts.items()}
    return adapters.stack(formats.lora.layers_at, _pad_ranks(pairs, shapes, formats), shapes)


def _side_by_side(pairs: Sequence[Pair]) -> Pair:
    """One pair whose product is the sum of the products of `pairs`."""
    all_a, all_b = zip(*pairs, strict=True)
    return np.concatenate(all_a, axis=1), np.concatenate(all_b, axis=0)


def _pad_ranks(
    pairs: Mapping[str, Pair], shapes: Mapping[str, Any], formats: FileFormats
) -> dict[str, Pair]:
    """Pairs with the rank of the largest of their stacked run, which is one array of one rank; zeros add nothing."""
    paths = {}
    for layer in dense_layers(formats.lora.layers_at, shapes):
        paths[layer.name] = layer.path
    ranks: dict[tuple[str, ...], int] = {}
    for name, (a, _) in pairs.items():
        path = paths[name]
        ranks[path] = max(ranks.get(path, 0), a.shape[1])
    padded = {}
    for name, (a, b) in pairs.items():
        missing = ranks[paths[name]] - a.shape[1]
        wide_a = np.pad(a, ((0, 0), (0, missing)))
        wide_b = np.pad(b, ((0, missing), (0, 0)))
        padded[name] = (wide_a, wide_b)
    return padded


def named_loras(text: str) -> list[tuple[str, float]]:
    """`PATH[:weight],PATH[:weight]` as paths with weights; a weight is 1 unless it is written.

    Raises:
      InputError: an empty path, or a weight that is not a number.
    """
    loras = []
    items = [item.strip() for item in text.split(",")]
    for earlier, item in zip(items, items[1:]):
        # 0,5 for 0.5 would be a weight of 0 and a path of 5.
        if re.fullmatch(r"\d+", item) and re.search(r":[-+]?\d*$", earlier):
            if not pathlib.Path(item).exists():
                raise InputError(
                    f"--lora: expected a weight with a point, such as 0.5; received {earlier + ',' + item!r}"
                )
    for item in items:
        name, weight = _named_lora(item)
        if not name:
            raise InputError(
                f"--lora: expected PATH[:weight], separated by commas; received {text!r}"
            )
        loras.append((name, weight))
    return loras


def _named_lora(item: str) -> tuple[str, float]:
    """One path with its weight."""
    path, _, tail = item.rpartition(":")
    if not path:
        return item, 1.0
    weight = finite_number(tail)
    if weight is not None:
        check_strength(f"--lora: weight of {path}", weight)
        return path, weight
    # A path may hold a colon of its own, if there is a file of that name.
    if pathlib.Path(item).exists():
        return item, 1.0
    raise InputError(
        f"--lora: expected PATH or PATH:weight; received the weight {tail!r} in {item!r}"
    )


def add_loras(
    text: str,
    shapes: Mapping[str, Any],
    formats: FileFormats,
    scale: float,
    adapter: Adapter | None = None,
) -> Adapter | None:
    """The adapter of an inference with `--lora=text`, on top of `adapter` if there is one.

    Args:
      text: see `named_loras`; empty: `adapter` as it is.
      shapes: parameters or abstract parameters of the transformer.
      formats: of the transformer's family.
      scale: the model's `lora_scale`.
      adapter: an adapter of the model, such as a run's.
    """
    if not text:
        return adapter
    loras = []
    if adapter is not None:
        loras.append((as_lora("adapter", adapter, formats, scale), 1.0))
    for path, weight in named_loras(text):
        loras.append((read_lora(path, shapes, formats), weight))
    return combine(loras, shapes, formats, scale)


def start_from(
    lora: Lora,
    adapter: Adapter,
    shapes: Mapping[str, Any],
    formats: FileFormats,
    spec: adapters.LoraSpec,
) -> Adapter:
    """The adapter that training starts from: `adapter` with the layers that the LoRA has replaced by it.

    Rank and alpha are the run's. Another rank, another alpha on record or a layer that is not adapted would silently
    start from something else, so they are refused. A file without alpha keeps its strength: its `b` is divided by the
    run's alpha / rank. Layers that it lacks start as they are, which is without effect.

    Args:
      lora: what to start from.
      adapter: newly initialised adapter of the run.
      shapes: parameters or abstract parameters of the transformer.
      formats: of the transformer's family.
      spec: rank, alpha and targets of the run.

    Raises:
      InputError: another rank or alpha, or a layer that is not a target.
    """
    layers_at = formats.lora.layers_at
    layers = adapters.target_layers(layers_at, shapes, spec.targets)
    targets = {layer.name for layer in layers}
    pairs = adapters.unstack(layers_at, adapter)
    for name, layer in lora.layers.items():
        if name not in targets:
            raise InputError(
                f"lora.init: {lora.path}: expected only layers of lora.targets; received {name!r}; add "
                "its suffix to lora.targets"
            )
        _check_start(lora.path, name, layer, spec)
        # The model will multiply by the run's scale, in place of the file's.
        pairs[name] = layer.a, layer.b * np.float32(layer.scale / spec.scale)
    return adapters.stack(layers_at, pairs, shapes)


def _check_start(path: str, name: str, layer: Layer, spec: adapters.LoraSpec) -> None:
    """Raises InputError unless a layer has the run's rank, and its alpha where it says one."""
    if layer.rank != spec.rank:
        raise InputError(
            f"lora.init: {path}: expected lora.rank = {spec.rank}; received rank {layer.rank} "
            f"({name}); set lora.rank={layer.rank}"
        )
    if layer.alpha not in (None, spec.alpha):
        raise InputError(
            f"lora.init: {path}: expected lora.alpha = {spec.alpha:g}; received alpha "
            f"{layer.alpha:g} ({name}); set lora.alpha={layer.alpha:g}"
        )
