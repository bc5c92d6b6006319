"""CLIP pairs in OpenCLIP's layout, the one HPSv2.1 and the LAION models are published in.

The networks are those of `networks.clip`; names, the packed query-key-value tensors and the orientation of the two
projections differ. The shape is read from `open_clip_config.json`, or, for a file that comes alone, from the tensors
themselves.

Source: `open_clip/transformer.py` and `open_clip/model_configs/` of mlfoundations/open_clip.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from annotated_types import Gt, Le

from marble_jax.errors import InputError
from marble_jax.networks.clip import (
    LEGACY_EOS,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    abstract_params,
)
from marble_jax.types import Params
from marble_jax.validation import Count, Layers, Side, Width, validated, validated_fields
from marble_jax.weights.key_map import Entry, PlaceLeaf, load_params, path_entries
from marble_jax.weights.safetensors_files import Tensors
from marble_jax.weights.torch_pickle import open_weights

FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)
CONFIG = "open_clip_config.json"
HEAD_WIDTH = 64
"""Width of a head, in text towers always."""
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Width of a vision head by width of the tower, for ViT-H, ViT-g and ViT-bigG; no tensor shows it."""
_IGNORED = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Buffers and numbers that old files hold beside the weights."""
_PARTS = (
    "q",
    "k",
    "v",
)  # order of the thirds of a packed tensor, as torch's MultiheadAttention has them
_RENAMED = (
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_projection\.weight", "text_projection"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"visual_projection\.weight", "visual.proj"),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)", r".attn.in_proj_\2[\1]"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
"""From names as transformers has them."""


_Ratio = Annotated[float, Gt(0), Le(64)]
_FIELDS: Mapping[str, Any] = {"embed_dim": Width, "quick_gelu": bool}
_TOWER_FIELDS: Mapping[str, Any] = {"layers": Layers, "width": Width, "mlp_ratio": _Ratio}
_VISION_FIELDS: Mapping[str, Any] = {
    **_TOWER_FIELDS,
    "head_width": Width,
    "image_size": Side,
    "patch_size": Side,
}
_TEXT_FIELDS: Mapping[str, Any] = {
    **_TOWER_FIELDS,
    "heads": Width,
    "vocab_size": Count,
    "context_length": Width,
}
"""Fields of a `model_cfg` that are read, with their types and ranges."""


class Unpacked:
    """A file's tensors with each `in_proj_weight` and `in_proj_bias` cut into its thirds, `...[q]`, `[k]`, `[v]`."""

    def __init__(self, source: Tensors):
        """The tensors of an open OpenCLIP file."""
        self.path = source.path
        self._source = source
        self._names: dict[str, tuple[str, int | None]] = {}
        for key in source.keys():
            # A damaged tensor that has no thirds stays whole, and is named as left over.
            packed = key.endswith((".in_proj_weight", ".in_proj_bias"))
            if packed and source.shape(key)[0] % 3 == 0:
                for third, part in enumerate(_PARTS):
                    self._names[f"{key}[{part}]"] = (key, third)
            else:
                self._names[key] = (key, None)

    def keys(self) -> list[str]:
        """Names after the cut."""
        return list(self._names)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        name, third = self._names[key]
        shape = self._source.shape(name)
        if third is None:
            return shape
        return (shape[0] // 3, *shape[1:])

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor."""
        return self._source.dtype(self._names[key][0])

    def read(self, key: str) -> np.ndarray:
        """A tensor, or its third."""
        name, third = self._names[key]
        tensor = self._source.read(name)
        if third is None:
            return tensor
        return np.split(tensor, 3)[third]

    def release(self, key: str) -> None:
        """Does nothing: the other thirds may still be read."""

    def file(self, key: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self._source.path


def entries(shapes: Mapping[str, Any]) -> list[Entry]:
    """Key map of a `CLIPModel` for an `Unpacked` OpenCLIP file."""
    renamed = []
    for entry in path_entries(shapes):
        key, transform = entry.key, entry.transform
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        # Plain matrices [in, out] in these files, as here: not transposed.
        if key in ("text_projection", "visual.proj"):
            transform = "none"
        renamed.append(Entry(key, entry.path, transform))
    return renamed


def config_of(settings: Mapping[str, Any]) -> CLIPConfig:
    """The shape that the `model_cfg` of an open_clip_config.json describes.

    Raises:
      InputError: a field is missing, or the model is not a plain pair of transformers.
    """
    what = f"{CONFIG} model_cfg"
    try:
        towers = []
        for name in ("vision_cfg", "text_cfg"):
            towers.append(validated(dict[str, Any], settings[name], f"{what}: {name}"))
        return _config_of(settings, *towers)
    except KeyError as error:
        raise InputError(f"{CONFIG} model_cfg: expected {error}; received none") from None


def _config_of(
    settings: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> CLIPConfig:
    """The shape by fields of each tower; a missing field is a KeyError."""
    # ResNets list the layers of each stage; other text and vision libraries are named.
    plain = not isinstance(vision["layers"], list)
    if not plain or "hf_model_name" in text or "timm_model_name" in vision:
        raise InputError(
            f"{CONFIG}: expected a plain pair of transformers; received another kind of tower"
        )
    what = f"{CONFIG} model_cfg"
    settings = {**settings, **validated_fields(_FIELDS, settings, what)}
    vision = {**vision, **validated_fields(_VISION_FIELDS, vision, f"{what}: vision_cfg")}
    text = {**text, **validated_fields(_TEXT_FIELDS, text, f"{what}: text_cfg")}
    activation = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    text_config = CLIPTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["width"],
        intermediate_size=int(text["width"] * text.get("mlp_ratio", 4.0)),
        projection_dim=settings["embed_dim"],
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
        hidden_act=activation,
        # OpenCLIP pools where the id is largest, which is what this id asks for.
        eos_token_id=LEGACY_EOS,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        projection_dim=settings["embed_dim"],
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision.get("head_width", HEAD_WIDTH),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act=activation,
    )
    return CLIPConfig(text_config, vision_config, settings["embed_dim"])


def config_from_shapes(source: Tensors) -> CLIPConfig:
    """The shape of a published model that comes without its open_clip_config.json, such as HPS_v2.1_compressed.pt.

    Everything but the heads follows from the tensors; heads are 64 wide in text towers, see HEAD_WIDTHS for images.
    The activation is the plain GELU of the LAION models.

    Raises:
      InputError: a tensor that the shape is read from is missing.
    """

    width, _, patch, _ = _shape(source, "visual.conv1.weight", 4)
    num_positions, _ = _shape(source, "visual.positional_embedding", 2)
    # One position is the class token's, the others make a square.
    side = round((num_positions - 1) ** 0.5)
    (vision_inner,) = _shape(source, "visual.transformer.resblocks.0.mlp.c_fc.bias", 1)
    vision = {
        "image_size": side * patch,
        "layers": _num_layers(source, "visual."),
        "width": width,
        "patch_size": patch,
        "head_width": HEAD_WIDTHS.get(width, HEAD_WIDTH),
        "mlp_ratio": vision_inner / width,
    }
    vocabulary, text_width = _shape(source, "token_embedding.weight", 2)
    (text_inner,) = _shape(source, "transformer.resblocks.0.mlp.c_fc.bias", 1)
    text = {
        "context_length": _shape(source, "positional_embedding", 2)[0],
        "vocab_size": vocabulary,
        "width": text_width,
        "heads": max(1, text_width // HEAD_WIDTH),
        "layers": _num_layers(source, ""),
        "mlp_ratio": text_inner / text_width,
    }
    _, embed_dim = _shape(source, "visual.proj", 2)
    return config_of({"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text})


def _num_layers(source: Tensors, prefix: str) -> int:
    """Layers of the tower whose names begin with `prefix`."""
    pattern = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    layers = set()
    for key in source.keys():
        match = pattern.match(key)
        if match is not None:
            layers.add(int(match[1]))
    return 1 + max(layers, default=-1)


def _shape(source: Tensors, key: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor. Raises InputError unless the file has it, with that rank."""
    if key not in source.keys() or len(source.shape(key)) != rank:
        raise InputError(
            f"{source.path}: expected OpenCLIP's tensor {key!r} of rank {rank}; received a file "
            "without it"
        )
    return source.shape(key)


def find_weights(directory: pathlib.Path, names: Sequence[str] = FILES) -> pathlib.Path | None:
    """The first of `names` that the directory holds."""
    for name in names:
        if (directory / name).is_file():
            return directory / name
    return None


def load_openclip(
    path: pathlib.Path | str,
    settings: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    place: PlaceLeaf | None = None,
) -> tuple[CLIPModel, Params]:
    """Model and parameters of an OpenCLIP file.

    Args:
      path: safetensors, `.bin` or `.pt`; a training checkpoint with a `state_dict` will do.
      settings: `model_cfg` of its open_clip_config.json; None reads the shape from the tensors.
      dtype: of weights and computation.
      place: as in `load_params`.

    Raises:
      InputError: missing or malformed file, or tensors that do not fit the config.
    """
    source = open_weights(path)
    if settings is None:
        config = config_from_shapes(source)
    else:
        config = config_of(settings)
    model = CLIPModel(config, dtype)
    shapes = abstract_params(model)
    params = load_params(Unpacked(source), entries(shapes), shapes, dtype, _IGNORED, place)
    return model, params
