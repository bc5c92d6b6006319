"""Our adapter as the files that other libraries read, each at its right strength, and merged into whole weights.

PEFT reads alpha from `adapter_config.json`, so its matrices are written as they are trained. diffusers and ComfyUI take
a file without alpha at strength 1, so there the scale alpha / rank is part of B; writing alpha as well would count it
twice in the versions that read it.

Source: PEFT 0.10 and 0.21 `PeftModel.save_pretrained`, diffusers 0.33 and 0.42 `StableDiffusion3Pipeline`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from marble_jax.console import Console
from marble_jax.convert.layouts import STEMS
from marble_jax.convert.lora import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from marble_jax.convert.lora_names import DIFFUSERS_PREFIX, PEFT_PREFIX
from marble_jax.convert.sources import open_model
from marble_jax.convert.writing import KEEP, Cast, write_safetensors
from marble_jax.errors import InputError
from marble_jax.storage.manifest import write_json
from marble_jax.trainable.lora import LoraSpec
from marble_jax.weights.safetensors_files import Tensors

Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""(a [in, r], b [r, out]) by layer name, as `adapters.unstack` gives them."""


def lora_files(pairs: Pairs, spec: LoraSpec, base: str | None = None) -> dict[str, bytes]:
    """Contents of the files of an adapter by name: diffusers' one and PEFT's two.

    Args:
      pairs: leaves of the adapted layers, all of rank `spec.rank`.
      spec: rank, alpha and targets.
      base: hub id of the base model, for PEFT's configuration.
    """
    return {
        DIFFUSERS_FILE: _safetensors(pairs, DIFFUSERS_PREFIX, spec.scale),
        PEFT_FILE: _safetensors(pairs, PEFT_PREFIX, 1.0),
        PEFT_CONFIG: (
            json.dumps(peft_config(spec, base), indent=2, sort_keys=True) + "\n"
        ).encode(),
    }


def peft_config(spec: LoraSpec, base: str | None = None) -> dict[str, object]:
    """`adapter_config.json` with the fields of PEFT 0.10 and no others, as it refuses fields it does not know."""
    return {
        "auto_mapping": {
            "base_model_class": "SD3Transformer2DModel",
            "parent_library": "diffusers.models.transformers.transformer_sd3",
        },
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": list(spec.targets),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


class Merged:
    """A transformer's tensors with an adapter folded in: W + scale * B A in float32, tensor by tensor.

    Args:
      source: the base weights.
      pairs: leaves of the adapted layers.
      scale: alpha / rank.
      keep: give the sums in the dtype of their base weight; otherwise in float32, to be cast once.
    """

    def __init__(self, source: Tensors, pairs: Pairs, scale: float, keep: bool = True):
        self._source, self._scale, self._keep = source, np.float32(scale), keep
        self._pairs = {f"{name}.weight": pair for name, pair in pairs.items()}
        self.path, self.keys, self.shape = source.path, source.keys, source.shape
        self.file, self.release = source.file, source.release

    def dtype(self, key: str) -> np.dtype:
        """Dtype that `read` gives."""
        return (
            self._source.dtype(key)
            if self._keep or key not in self._pairs
            else np.dtype(np.float32)
        )

    def read(self, key: str) -> np.ndarray:
        """The tensor. Raises InputError where a sum does not fit its dtype."""
        tensor = self._source.read(key)
        if key not in self._pairs:
            return tensor
        a, b = self._pairs[key]
        with np.errstate(over="ignore"):
            merged = (tensor.astype(np.float32) + self._scale * (a @ b).T).astype(self.dtype(key))
        if not np.isfinite(merged.astype(np.float32)).all():
            raise InputError(
                f"{self.file(key)}: tensor {key!r}: expected a finite sum with its adapter in "
                f"{merged.dtype}; received one that is not"
            )
        return merged


def merge_transformer(
    root: pathlib.Path,
    out: pathlib.Path,
    pairs: Pairs,
    scale: float,
    console: Console,
    dtype: str = KEEP,
    shard_bytes: int = 10_000_000_000,
) -> None:
    """Writes a diffusers `transformer` directory with an adapter folded in; memory holds one tensor.

    Args:
      root: the base pipeline, in diffusers' layout or ours.
      out: directory to make.
      pairs: leaves of the adapted layers.
      scale: alpha / rank.
      console: where the bar goes.
      dtype: of the result; "keep" is the base's, tensor by tensor.
      shard_bytes: largest file.

    Raises:
      InputError: a base that does not fit its config; sums that do not fit the dtype.
    """
    model = open_model(str(root), components=("transformer",))
    source, wanted = (
        model.components["transformer"],
        {entry.key for entry in model.layouts["transformer"].entries},
    )
    tensors, keys = (
        Cast(Merged(source, pairs, scale, dtype == KEEP), dtype),
        [k for k in source.keys() if k in wanted],
    )
    with console.bar(sum(map(tensors.nbytes, keys)), "merge", "B") as bar:
        write_safetensors(out, STEMS["transformer"], tensors, keys, shard_bytes, bar.update)
    write_json(
        out / "config.json",
        {k: v for k, v in source.config.items() if k not in ("dtype", "torch_dtype")},
    )


def _safetensors(pairs: Pairs, prefix: str, scale: float) -> bytes:
    from safetensors.numpy import save

    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = np.ascontiguousarray(a.T, np.float32)
        tensors[f"{prefix}{name}.lora_B.weight"] = np.ascontiguousarray(
            b.T * np.float32(scale), np.float32
        )
    return save(tensors, metadata={"format": "pt"})
