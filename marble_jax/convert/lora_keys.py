"""The keys of LoRA files: which library wrote them, which layer they are of, which of the pair they name.

A key is a prefix (which library wrote it), the name of a layer and an ending (which of the pair, or alpha). The endings
are the libraries'; prefixes and names of layers are the family's (`LoraNames`), with dots or with underscores.

Source: PEFT 0.21, diffusers 0.42 (`loaders/peft.py`), kohya sd-scripts and ComfyUI for their key styles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from marble_jax.errors import InputError, nearest
from marble_jax.weights.formats import FileFormats, LayerPart

PEFT_PREFIX = "base_model.model."
_ENDING = re.compile(
    r"(?P<stem>.+?)(?:\.lora_(?P<letter>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
    r"|(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<word>down|up)\.weight"
    r"|(?:\.lora)?\.(?P<alpha>alpha))"
)
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_module)\."
    r"|(?<=_)_?(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)_"
)
"""What torch.compile, FSDP, activation checkpointing and DeepSpeed put between the parts of a name, in both styles."""
_PREFIXES = ("lycoris_", "module.", "dit.", "unet.", "network.", "model.")
"""Prefixes of trainers, whatever the model: LyCORIS, data parallel modules, attributes of their own."""
_PARTS = {"A": "a", "B": "b", "down": "a", "up": "b", "alpha": "alpha"}
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a LoRA of convolutions",
    "lora_embedding": "a LoRA of embeddings",
    "lora_B.bias": "a LoRA with bias",
}
_TEXT_ENCODER = re.compile(r"^(text_encoder|lora_te\d?_|text_model)")


def layer_names(
    shapes: Mapping[str, Any], formats: FileFormats
) -> dict[str, tuple[LayerPart, ...]]:
    """Every name a layer goes by, without prefix, and which of our layers it holds.

    Args:
      shapes: parameters or abstract parameters of the transformer.
      formats: of its family.
    """
    parts = dict(formats.lora.layer_parts(shapes))
    # kohya's files and those made after them write underscores, as module names in torch cannot hold dots.
    for name, group in list(parts.items()):
        parts[name.replace(".", "_")] = group
    return parts


def split_key(path: object, key: str) -> tuple[str, str]:
    """(layer with its prefix, "a", "b" or "alpha") of a tensor's key.

    Raises:
      InputError: not the key of a plain LoRA.
    """
    match = _ENDING.fullmatch(key)
    if match is not None:
        ending = match["letter"] or match["word"] or match["alpha"]
        return match["stem"], _PARTS[ending]
    raise _not_a_lora(path, key)


def _not_a_lora(path: object, key: str) -> InputError:
    """The error for a key that is not a plain LoRA's, which says whose it is where that can be told."""
    for mark, method in _OTHER_METHODS.items():
        if mark in key:
            return InputError(f"{path}: expected a plain LoRA; received {method} (tensor {key!r})")
    return InputError(
        f"{path}: expected tensors named LAYER.lora_A.weight, LAYER.lora_B.weight or one of the older "
        f"styles; received {key!r}"
    )


def find_layer(
    path: object, stem: str, names: Mapping[str, tuple[LayerPart, ...]], formats: FileFormats
) -> tuple[LayerPart, ...]:
    """Our layers that another library's layer name stands for.

    Args:
      path: the file, for messages.
      stem: layer name with its prefix.
      names: result of `layer_names`.
      formats: of the transformer's family.

    Raises:
      InputError: no layer of this transformer.
    """
    name = _WRAPPERS.sub("", stem)
    while name not in names:
        shorter = _without_prefix(name, (PEFT_PREFIX, *formats.lora.prefixes, *_PREFIXES))
        if shorter == name:
            # Compared with names of the same style: dots and underscores would count as differences.
            dotted = "." in name
            close = nearest(name, [known for known in names if ("." in known) == dotted])
            raise InputError(
                f"{path}: expected layers of this {formats.name} transformer; received {stem!r}{close}"
            )
        # Several prefixes may stand in front of each other: PEFT's before that of the library that used it.
        name = shorter
    return names[name]


def _without_prefix(name: str, prefixes: Iterable[str]) -> str:
    """A name without the first of some prefixes that it has."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def check_architecture(path: object, keys: Iterable[str], formats: FileFormats) -> None:
    """Raises InputError when the keys give away another model, or a text encoder's LoRA."""
    keys = list(keys)
    for model, pattern in formats.lora.other_models.items():
        foreign = list(filter(pattern.search, keys))
        if foreign:
            raise InputError(
                f"{path}: expected a LoRA for {formats.name}; received one for {model} (tensor {foreign[0]!r})"
            )
    # After the models: the text encoders of another model's LoRA are not what is wrong with it.
    of_encoders = list(filter(_TEXT_ENCODER.match, keys))
    if of_encoders:
        raise InputError(
            f"{path}: expected a LoRA of the transformer alone, as text encoders are not adapted here; "
            f"received {of_encoders[0]!r}"
        )
