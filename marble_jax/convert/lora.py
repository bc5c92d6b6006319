"""LoRA files of other libraries as adapters: for inference, several at once with weights, or as a start of training.

What a file means is its strength as much as its matrices: y = W x + weight * scale * B A x. The scale is alpha / rank
of `adapter_config.json` (or of the same fields in the header of a diffusers file), or of `.alpha` tensors, and 1 for a
file that says nothing, as diffusers and ComfyUI read it.

Source: PEFT 0.21 (`LoraConfig`, `get_pattern_key`), diffusers 0.42 (`SD3LoraLoaderMixin`), ComfyUI for `.alpha`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from marble_jax.convert.lora_names import (
    DIFFUSERS_PREFIX,
    PEFT_PREFIX,
    Piece,
    check_architecture,
    find_layer,
    layer_pieces,
    split_key,
)
from marble_jax.errors import InputError
from marble_jax.families.sd3.layer_names import dense_modules
from marble_jax.storage.files import read_json
from marble_jax.trainable import lora as adapters
from marble_jax.types import Adapter
from marble_jax.weights.hub import HUB_NAME, download
from marble_jax.weights.safetensors_files import SafetensorsFile

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER_CONFIG = "lora_adapter_metadata"
"""Where diffusers (new versions only) keeps the LoraConfig in the header of its file."""

Strength = Callable[[str, int], tuple[float | None, float]]
"""(our layer name, rank) -> (alpha or None where the file does not say, scale)."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The pair of one layer.

    Attributes:
      a: float32 [in, r].
      b: float32 [r, out].
      scale: factor of a @ b.
      alpha: what the file says it is; None where it says nothing.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclasses.dataclass(frozen=True)
class Lora:
    """One LoRA.

    Attributes:
      path: where it came from.
      layers: pairs by our layer name.
    """

    path: str
    layers: Mapping[str, Layer]


def read_lora(path: str, shapes: Mapping[str, Any]) -> Lora:
    """Reads a LoRA of any of the known styles.

    Args:
      path: a PEFT directory, a directory with diffusers' or one other safetensors file, an exported folder, a file, or
        a hub id of one of these.
      shapes: parameters or abstract parameters of the transformer it is for.

    Raises:
      InputError: no such file; not a plain LoRA of this transformer; half of a pair; ranks that do not agree; a
        strength that cannot be known.
    """
    file, config = _find(pathlib.Path(path))
    source = SafetensorsFile(file)
    keys = source.keys()
    if not keys:
        raise InputError(f"{file}: expected LoRA tensors; received an empty file")
    check_architecture(file, keys)
    if config is None and HEADER_CONFIG in source.metadata:
        config = _header_config(file, source.metadata[HEADER_CONFIG])
    if config is None and any(key.startswith(PEFT_PREFIX) for key in keys):
        raise InputError(
            f"{file}: expected {PEFT_CONFIG} beside a PEFT file, as alpha, and so the strength, is "
            "written there; received none"
        )
    strength = None if config is None else _strength(*config)
    return Lora(str(path), _layers(source, layer_pieces(shapes), _widths(shapes), strength))


def as_lora(path: str, adapter: Adapter, scale: float) -> Lora:
    """An adapter of ours, to be combined with others."""
    return Lora(
        path, {name: Layer(a, b, scale) for name, (a, b) in adapters.unstack(adapter).items()}
    )


def combine(
    loras: Sequence[tuple[Lora, float]], shapes: Mapping[str, Any], scale: float = 1.0
) -> Adapter:
    """One adapter that does what all of them do together: sum of weight * scale * a @ b, whatever their ranks.

    The pairs of a layer stand side by side along the rank, which is exact. Layers of a stacked run share a rank; the
    smaller ones are filled up with zeros.

    Args:
      loras: LoRAs and their weights; a negative weight takes one away.
      shapes: parameters or abstract parameters of the transformer.
      scale: the `lora_scale` of the model that the adapter is for.
    """
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for lora, weight in loras:
        for name, layer in lora.layers.items():
            parts.setdefault(name, []).append(
                (layer.a, layer.b * np.float32(layer.scale * weight / scale))
            )
    pairs = {
        name: (np.concatenate([a for a, _ in group], axis=1), np.concatenate([b for _, b in group]))
        for name, group in parts.items()
    }
    paths = {module.name: module.path for module in dense_modules(shapes)}
    ranks: dict[tuple[str, ...], int] = {}
    for name, (a, _) in pairs.items():
        ranks[paths[name]] = max(ranks.get(paths[name], 0), a.shape[1])
    padded = {}
    for name, (a, b) in pairs.items():
        missing = ranks[paths[name]] - a.shape[1]
        padded[name] = np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))
    return adapters.stack(padded, shapes)


def named_loras(text: str) -> list[tuple[str, float]]:
    """`PATH[:weight],PATH[:weight]` as paths with weights; a weight is 1 unless given.

    Raises:
      InputError: an empty path, or a weight that is not a number.
    """
    found = []
    for item in text.split(","):
        path, _, tail = item.strip().rpartition(":")
        weight = _number(tail) if path else 1.0
        if weight is None and not pathlib.Path(item.strip()).exists():
            raise InputError(
                f"--lora: expected PATH or PATH:weight; received the weight {tail!r} in {item.strip()!r}"
            )
        name = path if path and weight is not None else item.strip()
        if not name:
            raise InputError(
                f"--lora: expected PATH[:weight], separated by commas; received {text!r}"
            )
        found.append((name, 1.0 if weight is None else weight))
    return found


def add_loras(
    text: str, shapes: Mapping[str, Any], scale: float, adapter: Adapter | None = None
) -> Adapter | None:
    """The adapter of an inference with `--lora=text`, on top of `adapter` if there is one.

    Args:
      text: see `named_loras`; empty: `adapter` as it is.
      shapes: parameters or abstract parameters of the transformer.
      scale: the model's `lora_scale`.
      adapter: an adapter of the model, such as a run's.
    """
    if not text:
        return adapter
    own = [] if adapter is None else [(as_lora("adapter", adapter, scale), 1.0)]
    return combine(
        [*own, *((read_lora(path, shapes), weight) for path, weight in named_loras(text))],
        shapes,
        scale,
    )


def start_from(
    lora: Lora, adapter: Adapter, shapes: Mapping[str, Any], spec: adapters.LoraSpec
) -> Adapter:
    """The adapter that training starts from: `adapter` with the layers that the LoRA has replaced by it.

    Rank and alpha are the run's. Another rank, another alpha on record or a layer that is not adapted would silently
    start from something else, so they are refused. A file without alpha keeps its strength: its `b` is divided by the
    run's alpha / rank. Layers that it lacks start as they are, which is without effect.

    Args:
      lora: what to start from.
      adapter: newly initialised adapter of the run.
      shapes: parameters or abstract parameters of the transformer.
      spec: rank, alpha and targets of the run.

    Raises:
      InputError: another rank or alpha, or a layer that is not a target.
    """
    chosen = {module.name for module in adapters.target_modules(shapes, spec.targets)}
    pairs = adapters.unstack(adapter)
    for name, layer in lora.layers.items():
        if name not in chosen:
            raise InputError(
                f"lora.init: {lora.path}: expected only layers of lora.targets; received {name!r}; add "
                "its suffix to lora.targets"
            )
        if layer.rank != spec.rank:
            raise InputError(
                f"lora.init: {lora.path}: expected lora.rank = {spec.rank}; received rank {layer.rank} "
                f"({name}); set lora.rank={layer.rank}"
            )
        if layer.alpha is not None and layer.alpha != spec.alpha:
            raise InputError(
                f"lora.init: {lora.path}: expected lora.alpha = {spec.alpha:g}; received alpha "
                f"{layer.alpha:g} ({name}); set lora.alpha={layer.alpha:g}"
            )
        pairs[name] = layer.a, layer.b * np.float32(layer.scale / spec.scale)
    return adapters.stack(pairs, shapes)


def _find(path: pathlib.Path) -> tuple[pathlib.Path, tuple[pathlib.Path, Mapping[str, Any]] | None]:
    """The weights file, and PEFT's configuration with its place where there is one."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(
                f"{path}: expected a .safetensors file (others can run code); received {path.name!r}"
            )
        beside = path.parent / PEFT_CONFIG
        return path, (
            beside,
            read_json(beside),
        ) if path.name == PEFT_FILE and beside.is_file() else None
    if not path.exists() and HUB_NAME.fullmatch(str(path)):
        # Not every .safetensors: a repository of a whole model would come down to the last gigabyte.
        path = download(
            str(path),
            [PEFT_CONFIG, PEFT_FILE, DIFFUSERS_FILE, "lora/adapter_*", "*lora*.safetensors"],
        )
    if not path.is_dir():
        raise InputError(
            f"LoRA: expected a directory, a .safetensors file or a hub id; received {str(path)!r}"
        )
    for folder in (path, path / "lora"):
        if (folder / PEFT_CONFIG).is_file():
            return folder / PEFT_FILE, (folder / PEFT_CONFIG, read_json(folder / PEFT_CONFIG))
        if folder == path and (path / DIFFUSERS_FILE).is_file():
            return path / DIFFUSERS_FILE, None
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        received = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "an empty directory"
        raise InputError(
            f"{path}: expected {PEFT_CONFIG} with {PEFT_FILE}, {DIFFUSERS_FILE} or one other .safetensors "
            f"file; received {received}"
        )
    return _find(files[0])


def _header_config(file: pathlib.Path, text: str) -> tuple[pathlib.Path, Mapping[str, Any]]:
    try:
        fields = json.loads(text)
        return file, {
            k.removeprefix(DIFFUSERS_PREFIX): v
            for k, v in fields.items()
            if k.startswith(DIFFUSERS_PREFIX)
        }
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{file}: {HEADER_CONFIG}: expected a JSON object in the file's header; received "
            f"{type(error).__name__}"
        ) from error


def _strength(path: pathlib.Path, config: Mapping[str, Any]) -> Strength:
    """Strength by a PEFT `LoraConfig`'s fields; raises InputError for what is more than a plain LoRA."""
    for field, plain in (
        ("peft_type", ("LORA", None)),
        ("bias", ("none", None)),
        ("use_dora", (False, None)),
        ("fan_in_fan_out", (False, None)),
        ("lora_bias", (False, None)),
        ("modules_to_save", (None, [])),
    ):
        if config.get(field) not in plain:
            raise InputError(
                f"{path}: {field}: expected {plain[0]!r}, a plain LoRA; received {config[field]!r}"
            )
    start = str(config.get("init_lora_weights", ""))
    if start.startswith(("pissa", "olora", "loftq", "corda")):
        raise InputError(
            f"{path}: init_lora_weights: expected a LoRA that leaves the base weights as they are; "
            f"received {start!r}"
        )
    for field in ("r", "lora_alpha"):
        if _number(config.get(field)) is None:
            raise InputError(f"{path}: {field}: expected a number; received {config.get(field)!r}")

    def strength(name: str, rank: int) -> tuple[float, float]:
        stated = _pattern(path, config, "rank_pattern", name, config["r"])
        if stated != rank:
            raise InputError(
                f"{path}: rank of {name}: expected {stated:g}, as written there; received tensors of rank "
                f"{rank}"
            )
        alpha = _pattern(path, config, "alpha_pattern", name, config["lora_alpha"])
        return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return strength


def _pattern(
    path: pathlib.Path, config: Mapping[str, Any], field: str, name: str, default: float
) -> float:
    for pattern, value in (config.get(field) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise InputError(
                f"{path}: {field}: expected names or patterns; received {pattern!r}"
            ) from error
        if matches:
            default = value
            break
    number = _number(default)
    if number is None:
        raise InputError(f"{path}: {field}: expected numbers; received {default!r}")
    return number


def _layers(
    source: SafetensorsFile,
    known: Mapping[str, tuple[Piece, ...]],
    widths: Mapping[str, tuple[int, int]],
    strength: Strength | None,
) -> dict[str, Layer]:
    found: dict[str, dict[str, str]] = {}
    for key in source.keys():
        stem, part = split_key(source.path, key)
        if part in found.setdefault(stem, {}):
            raise InputError(
                f"{source.path}: expected each matrix of {stem} once; received {found[stem][part]!r} and "
                f"{key!r}"
            )
        found[stem][part] = key
    layers: dict[str, Layer] = {}
    for stem, keys in found.items():
        pieces = find_layer(source.path, stem, known)
        if not {"a", "b"} <= set(keys):
            lost = "A (down)" if "a" not in keys else "B (up)"
            raise InputError(
                f"{source.path}: {stem}: expected a pair of matrices; received one without {lost}"
            )
        a, b = (_matrix(source, keys[part]) for part in ("a", "b"))
        inner, outer = widths[pieces[0].name]
        expected = (a.shape[0], inner), (outer * pieces[0].parts, a.shape[0])
        if (a.shape, b.shape) != expected or not a.size:
            raise InputError(
                f"{source.path}: {stem}: expected A {expected[0]} and B {expected[1]} for this "
                f"transformer; received {a.shape} and {b.shape}"
            )
        for piece in pieces:
            if piece.name in layers:
                raise InputError(
                    f"{source.path}: expected each layer once; received {piece.name} twice, the second "
                    f"time as {stem!r}"
                )
            if "alpha" in keys:
                alpha = _scalar(source, keys["alpha"])
                scale = alpha / a.shape[0]
            else:
                alpha, scale = (None, 1.0) if strength is None else strength(piece.name, a.shape[0])
            layers[piece.name] = Layer(a.T, _rows(b, piece).T, scale, alpha)
    return layers


def _matrix(source: SafetensorsFile, key: str) -> np.ndarray:
    """A tensor as float32 [rows, columns], in the file's layout."""
    raw = source.read(key)
    if raw.dtype.kind not in "fV" or raw.ndim != 2:
        raise InputError(
            f"{source.path}: tensor {key!r}: expected a matrix of floating-point numbers; received shape "
            f"{raw.shape} {raw.dtype}"
        )
    value = np.asarray(raw, np.float32)
    if not np.isfinite(value).all():
        raise InputError(
            f"{source.path}: tensor {key!r}: expected finite numbers; received NaN or infinity"
        )
    return value


def _scalar(source: SafetensorsFile, key: str) -> float:
    value = np.asarray(source.read(key), np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        raise InputError(
            f"{source.path}: tensor {key!r}: expected one finite number; received {value.tolist()}"
        )
    return float(value.reshape(()))


def _rows(b: np.ndarray, piece: Piece) -> np.ndarray:
    rows = np.split(b, piece.parts)[piece.part]
    return np.concatenate(np.split(rows, 2)[::-1]) if piece.swapped else rows


def _widths(shapes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) by layer name."""
    kernels = {
        p[:-1]: leaf.shape
        for p, leaf in traverse_util.flatten_dict(dict(shapes)).items()
        if p[-1] == "kernel"
    }
    return {module.name: tuple(kernels[module.path][-2:]) for module in dense_modules(shapes)}


def _number(value: Any) -> float | None:
    """A finite number, also in text, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
