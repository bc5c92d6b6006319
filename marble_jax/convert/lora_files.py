"""Our adapter as the files that other libraries read, each at its right strength, and merged into whole weights.

PEFT reads alpha from `adapter_config.json`, so its matrices are written as they are trained. diffusers and ComfyUI take
a file without alpha at strength 1, so there the scale alpha / rank is part of B; writing alpha as well would count it
twice in the versions that read it.

Source: PEFT 0.10 and 0.21 `PeftModel.save_pretrained`, diffusers 0.33 and 0.42 `StableDiffusion3Pipeline`.
"""
from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from marble_jax.adapters import LoraSpec
from marble_jax.convert.lora import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from marble_jax.convert.lora_names import DIFFUSERS_PREFIX, PEFT_PREFIX

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
        PEFT_CONFIG: (json.dumps(peft_config(spec, base), indent=2, sort_keys=True) + "\n").encode(),
    }


def peft_config(spec: LoraSpec, base: str | None = None) -> dict[str, object]:
    """`adapter_config.json` with the fields of PEFT 0.10 and no others, as it refuses fields it does not know."""
    return {
        "auto_mapping": {"base_model_class": "SD3Transformer2DModel",
                         "parent_library": "diffusers.models.transformers.transformer_sd3"},
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": "gaussian", "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha, "lora_dropout": 0.0,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
        "r": spec.rank, "rank_pattern": {}, "alpha_pattern": {}, "revision": None,
        "target_modules": list(spec.targets), "task_type": None, "use_dora": False, "use_rslora": False,
    }


def _safetensors(pairs: Pairs, prefix: str, scale: float) -> bytes:
    from safetensors.numpy import save

    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = np.ascontiguousarray(a.T, np.float32)
        tensors[f"{prefix}{name}.lora_B.weight"] = np.ascontiguousarray(b.T * np.float32(scale), np.float32)
    return save(tensors, metadata={"format": "pt"})
