"""What other libraries call the tensors of an SD3 LoRA, and which of our layers they mean.

A key is a prefix (which library wrote it), the name of a layer and an ending (which of the pair, or alpha). The layer
is named as in diffusers or as in the original repository, with dots or with underscores; the original one holds q, k
and v in one layer and the halves of two modulation layers the other way round.

Source: PEFT 0.21, diffusers 0.42 (`loaders/peft.py`), kohya sd-scripts and ComfyUI for their key styles.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from marble_jax.convert.original import original_name
from marble_jax.errors import InputError, nearest
from marble_jax.families.sd3.layer_names import dense_modules

PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
_PREFIXES = (
    PEFT_PREFIX,
    DIFFUSERS_PREFIX,
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_transformer_",
    "lora_unet_",
)
_ENDING = re.compile(
    r"(?P<stem>.+?)(?:\.lora_(?P<letter>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
    r"|(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<word>down|up)\.weight"
    r"|(?:\.lora)?\.(?P<alpha>alpha))"
)
_PARTS = {"A": "a", "B": "b", "down": "a", "up": "b"}
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
_OTHER_MODELS = {
    "Flux": re.compile(r"single_transformer_blocks|single_blocks|double_blocks"),
    "SDXL or SD 1.5": re.compile(r"(input|output|down|up)_blocks|mid(dle)?_block"),
    "PixArt, Wan or another transformer": re.compile(
        r"attn1[._]to_|(^|[._])blocks[._]\d+[._](self|cross)_attn"
    ),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a foreign layer's output that is one of our layers.

    Attributes:
      name: our (diffusers') layer name.
      part: which of `parts` equal parts of the output it is.
      parts: 3 for q, k and v in one layer, else 1.
      swapped: the output's halves (shift, scale) are ours in the other order.
    """

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


def layer_pieces(shapes: Mapping[str, Any]) -> dict[str, tuple[Piece, ...]]:
    """Every name a layer goes by, without prefix, and what it holds.

    Args:
      shapes: parameters or abstract parameters of the transformer.
    """
    names = [module.name for module in dense_modules(shapes)]
    blocks = {int(name.split(".")[1]) for name in names if name.startswith("transformer_blocks.")}
    found = {name: (Piece(name),) for name in names}
    for name in names:
        key, third, swapped = original_name(
            "transformer", f"{name}.weight", {"num_layers": len(blocks)}
        )
        original = key.removesuffix(".weight")
        piece = Piece(name, swapped=swapped) if third is None else Piece(name, third, 3)
        found[original] = (
            *(other for other in found.get(original, ()) if other.name != name),
            piece,
        )
    return found | {name.replace(".", "_"): group for name, group in found.items()}


def split_key(path: object, key: str) -> tuple[str, str]:
    """(layer with its prefix, "a", "b" or "alpha") of a tensor's key.

    Raises:
      InputError: not the key of a plain LoRA.
    """
    match = _ENDING.fullmatch(key)
    if match is None:
        for mark, method in _OTHER_METHODS.items():
            if mark in key:
                raise InputError(
                    f"{path}: expected a plain LoRA; received {method} (tensor {key!r})"
                )
        raise InputError(
            f"{path}: expected tensors named LAYER.lora_A.weight, LAYER.lora_B.weight or one of the older "
            f"styles; received {key!r}"
        )
    return match["stem"], match["alpha"] or _PARTS[match["letter"] or match["word"]]


def find_layer(
    path: object, stem: str, pieces: Mapping[str, tuple[Piece, ...]]
) -> tuple[Piece, ...]:
    """Our layers that a foreign layer name stands for.

    Args:
      path: the file, for messages.
      stem: layer name with its prefix.
      pieces: result of `layer_pieces`.

    Raises:
      InputError: no layer of this transformer.
    """
    name, shortest = stem, stem
    while name not in pieces:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is None:
            dotted = [n for n in pieces if ("." in n) == ("." in shortest)]
            raise InputError(
                f"{path}: expected layers of this SD3 transformer; received {stem!r}"
                f"{nearest(shortest, dotted)}"
            )
        name = shortest = name.removeprefix(prefix)
    return pieces[name]


def check_architecture(path: object, keys: Iterable[str]) -> None:
    """Raises InputError when the keys give away another model, or a text encoder's LoRA."""
    keys = list(keys)
    for model, pattern in _OTHER_MODELS.items():
        found = next((key for key in keys if pattern.search(key)), None)
        if found is not None:
            raise InputError(
                f"{path}: expected a LoRA for SD3; received one for {model} (tensor {found!r})"
            )
    found = next((key for key in keys if _TEXT_ENCODER.match(key)), None)
    if found is not None:
        raise InputError(
            f"{path}: expected a LoRA of the transformer alone, as text encoders are not adapted here; "
            f"received {found!r}"
        )
