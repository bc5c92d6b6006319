"""Our adapter as the files that other libraries read, each at its right strength, and merged into whole weights.

PEFT reads alpha from `adapter_config.json`, so its matrices are written as they are trained. diffusers and ComfyUI take
a file without alpha at strength 1, so there the scale alpha / rank is part of B; writing alpha as well would count it
twice in the versions that read it.

Source: PEFT 0.10 and 0.21 `PeftModel.save_pretrained`, diffusers 0.33 and 0.42 `load_lora_weights`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from marble_jax.console import Console
from marble_jax.convert.lora_keys import PEFT_PREFIX
from marble_jax.convert.lora_reading import Pair
from marble_jax.convert.lora_strength import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from marble_jax.convert.sources import open_model
from marble_jax.convert.writing import KEEP, Cast, write_safetensors
from marble_jax.errors import InputError
from marble_jax.storage.manifest import write_json
from marble_jax.trainable.lora import LoraSpec
from marble_jax.weights.formats import FileFormats
from marble_jax.weights.safetensors_files import Tensors

Pairs = Mapping[str, Pair]
"""(a [in, r], b [r, out]) by layer name, as `adapters.unstack` gives them."""


def lora_files(
    pairs: Pairs, spec: LoraSpec, formats: FileFormats, base: str | None = None
) -> dict[str, bytes]:
    """Contents of the files of an adapter by name: diffusers' one and PEFT's two.

    Args:
      pairs: leaves of the adapted layers, all of rank `spec.rank`.
      spec: rank, alpha and targets.
      formats: of the transformer's family.
      base: hub id of the base model, for PEFT's configuration.
    """
    config = json.dumps(peft_config(spec, formats, base), indent=2, sort_keys=True) + "\n"
    return {
        DIFFUSERS_FILE: _safetensors(pairs, formats.lora.diffusers_prefix, spec.scale),
        PEFT_FILE: _safetensors(pairs, PEFT_PREFIX, 1.0),
        PEFT_CONFIG: config.encode(),
    }


def peft_config(spec: LoraSpec, formats: FileFormats, base: str | None = None) -> dict[str, object]:
    """`adapter_config.json` with the fields of PEFT 0.10 and no others, as it refuses fields it does not know."""
    alpha: float = spec.alpha
    if float(alpha).is_integer():
        # PEFT 0.10 declares alpha an integer.
        alpha = int(alpha)
    return {
        "auto_mapping": dict(formats.lora.base_model),
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
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

    Attributes:
      path: of the base weights.
    """

    def __init__(self, source: Tensors, pairs: Pairs, scale: float, keep: bool = True):
        """The tensors of a merged transformer.

        Args:
          source: the base weights.
          pairs: leaves of the adapted layers.
          scale: alpha / rank.
          keep: give the sums in the dtype of their base weight; otherwise in float32, to be cast once.
        """
        self.path = source.path
        self._source = source
        self._scale = np.float32(scale)
        self._keep = keep
        self._pairs = {f"{name}.weight": pair for name, pair in pairs.items()}

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(key)

    def dtype(self, key: str) -> np.dtype:
        """Dtype that `read` gives."""
        if key in self._pairs and not self._keep:
            return np.dtype(np.float32)
        return self._source.dtype(key)

    def read(self, key: str) -> np.ndarray:
        """The tensor. Raises InputError where a sum does not fit its dtype."""
        tensor = self._source.read(key)
        if key not in self._pairs:
            return tensor
        a, b = self._pairs[key]
        # NumPy warns of each overflow; what overflows is an error below, with the tensor's name.
        with np.errstate(over="ignore"):
            # Transposed: the file's matrices are torch's [out, in].
            delta = self._scale * (a @ b).T
            wide = tensor.astype(np.float32) + delta
            merged = wide.astype(self.dtype(key))
        if not np.isfinite(merged.astype(np.float32)).all():
            raise InputError(
                f"{self.file(key)}: tensor {key!r}: expected a finite sum with its adapter in "
                f"{merged.dtype}; received one that is not"
            )
        return merged

    def release(self, key: str) -> None:
        """Gives back the memory of the base weight."""
        self._source.release(key)

    def file(self, key: str) -> pathlib.Path:
        """The file that holds the base weight."""
        return self._source.file(key)


def merge_transformer(
    root: pathlib.Path,
    out: pathlib.Path,
    pairs: Pairs,
    scale: float,
    formats: FileFormats,
    console: Console,
    dtype: str = KEEP,
    shard_bytes: int = 10_000_000_000,
) -> None:
    """Writes a diffusers directory of the adapted component with an adapter folded in; memory holds one tensor.

    Args:
      root: the base pipeline, in diffusers' layout or ours.
      out: directory to make.
      pairs: leaves of the adapted layers.
      scale: alpha / rank.
      formats: of the pipeline's family.
      console: where the bar goes.
      dtype: of the result; "keep" is the base's, tensor by tensor.
      shard_bytes: largest file.

    Raises:
      InputError: a base that does not fit its config; sums that do not fit the dtype.
    """
    part = formats.adapted
    model = open_model(str(root), [formats], components=(part,))
    source = model.components[part]
    wanted = {entry.key for entry in model.layouts[part].entries}
    keys = [key for key in source.keys() if key in wanted]
    tensors = Cast(Merged(source, pairs, scale, dtype == KEEP), dtype)
    total = sum(map(tensors.nbytes, keys))
    with console.bar(total, "merge", "B") as bar:
        write_safetensors(out, formats.stems[part], tensors, keys, shard_bytes, bar.update)
    config = dict(source.config)
    # What they say need not hold for the sums; readers take the tensors' own dtype.
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    write_json(out / "config.json", config)


def _safetensors(pairs: Pairs, prefix: str, scale: float) -> bytes:
    from safetensors.numpy import save

    tensors = {}
    for name, (a, b) in pairs.items():
        # torch's [r, in] and [out, r]; contiguous, as the writer takes the bytes as they lie.
        scaled = b.T * np.float32(scale)
        tensors[f"{prefix}{name}.lora_A.weight"] = np.ascontiguousarray(a.T, np.float32)
        tensors[f"{prefix}{name}.lora_B.weight"] = np.ascontiguousarray(scaled, np.float32)
    return save(tensors, metadata={"format": "pt"})
