"""LoRA files of any style, read as arrays."""

from __future__ import annotations

from marble_jax.convert import lora_reading
from marble_jax.convert.lora_reading import Lora
from marble_jax.families.descriptions import NetworkOptions
from marble_jax.families.location import find_model
from marble_jax.families.registry import family_of
from marble_jax.programs.locations import resolve_path


def read_lora(path: str, model: str = "embedded") -> Lora:
    """A LoRA of diffusers, PEFT, kohya, ComfyUI or the model's original code.

    Args:
      path: a PEFT directory, an exported folder, a .safetensors file, or a hub id of one of these.
      model: diffusers-layout directory, hub id or "embedded": the model that the LoRA is for. Of a hub model only
        configurations are downloaded.

    Returns:
      The LoRA: `layers` holds `a` [in, r], `b` [r, out] and the scale of their product by layer name.

    Raises:
      InputError: no such file or model, or a file that is no plain LoRA of this model.
    """
    root = find_model(resolve_path(model, "pipeline"))
    family = family_of(root)
    shapes = family.outline(root, NetworkOptions()).params
    return lora_reading.read_lora(path, shapes, family.formats)
