"""CLIP pairs in OpenCLIP's layout, the one HPSv2.1 and the LAION models are published in.

The networks are those of `networks.clip`; names, the packed query-key-value tensors and the two projections' orientation
differ. The shape is read from `open_clip_config.json`, or, for a file that comes alone, from the tensors themselves.

Source: `open_clip/transformer.py` and `open_clip/model_configs/` of mlfoundations/open_clip.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.networks.clip import (
    LEGACY_EOS,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from marble_jax.types import Params
from marble_jax.weights.key_map import Entry, load_params, path_entries
from marble_jax.weights.safetensors_files import Tensors
from marble_jax.weights.torch_pickle import open_weights

FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)
CONFIG = "open_clip_config.json"
HEAD_WIDTH, HEAD_WIDTHS = 64, {1280: 80, 1408: 88, 1664: 104}
"""Width of a vision head: 64, but for the towers of ViT-H, ViT-g and ViT-bigG."""
_IGNORED = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Buffers and numbers that old files hold beside the weights."""
_PARTS = ("q", "k", "v")
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


class Unpacked:
    """A file's tensors with each `in_proj_weight` and `in_proj_bias` cut into its thirds, `...[q]`, `[k]`, `[v]`."""

    def __init__(self, source: Tensors):
        self._source, self.path = source, source.path
        self._names: dict[str, tuple[str, int | None]] = {}
        for key in source.keys():
            packed = (
                key.endswith((".in_proj_weight", ".in_proj_bias")) and source.shape(key)[0] % 3 == 0
            )
            self._names |= (
                {f"{key}[{p}]": (key, i) for i, p in enumerate(_PARTS)}
                if packed
                else {key: (key, None)}
            )

    def keys(self) -> list[str]:
        """Names after the cut."""
        return list(self._names)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        name, part = self._names[key]
        shape = self._source.shape(name)
        return shape if part is None else (shape[0] // 3, *shape[1:])

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor."""
        return self._source.dtype(self._names[key][0])

    def read(self, key: str) -> np.ndarray:
        """A tensor, or its third."""
        name, part = self._names[key]
        tensor = self._source.read(name)
        return tensor if part is None else np.split(tensor, 3)[part]

    def release(self, key: str) -> None:
        """Nothing: the other thirds may still be read."""

    def file(self, key: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self._source.path


def entries(shapes: Mapping[str, Any]) -> list[Entry]:
    """Key map of a `CLIPModel` for an `Unpacked` OpenCLIP file."""
    found = []
    for entry in path_entries(shapes):
        key = entry.key
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        flat = key in ("text_projection", "visual.proj")  # plain matrices [in, out] there, as here
        found.append(Entry(key, entry.path, "none" if flat else entry.transform))
    return found


def config_of(settings: Mapping[str, Any]) -> CLIPConfig:
    """The shape that the `model_cfg` of an open_clip_config.json describes.

    Raises:
      InputError: a field is missing, or the model is not a plain pair of transformers.
    """
    try:
        vision, text = settings["vision_cfg"], settings["text_cfg"]
        if (
            not isinstance(vision["layers"], int)
            or "hf_model_name" in text
            or "timm_model_name" in vision
        ):
            raise InputError(
                f"{CONFIG}: expected a plain pair of transformers; received another kind of tower"
            )
        act = "quick_gelu" if settings.get("quick_gelu") else "gelu"
        ratio = vision.get("mlp_ratio", 4.0), text.get("mlp_ratio", 4.0)
        return CLIPConfig(
            CLIPTextConfig(
                vocab_size=text["vocab_size"],
                hidden_size=text["width"],
                intermediate_size=int(text["width"] * ratio[1]),
                projection_dim=settings["embed_dim"],
                num_hidden_layers=text["layers"],
                num_attention_heads=text["heads"],
                max_position_embeddings=text["context_length"],
                hidden_act=act,
                eos_token_id=LEGACY_EOS,
            ),
            CLIPVisionConfig(
                hidden_size=vision["width"],
                intermediate_size=int(vision["width"] * ratio[0]),
                projection_dim=settings["embed_dim"],
                num_hidden_layers=vision["layers"],
                num_attention_heads=vision["width"] // vision.get("head_width", HEAD_WIDTH),
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                hidden_act=act,
            ),
            settings["embed_dim"],
        )
    except KeyError as error:
        raise InputError(f"{CONFIG} model_cfg: expected {error}; received none") from None


def config_from_shapes(source: Tensors) -> CLIPConfig:
    """The shape of a published model that comes without its open_clip_config.json, such as HPS_v2.1_compressed.pt.

    Everything but the heads follows from the tensors; heads are 64 wide in text towers, see HEAD_WIDTHS for images.
    The activation is the plain GELU of the LAION models.

    Raises:
      InputError: a tensor that the shape is read from is missing.
    """

    def layers(prefix: str) -> int:
        numbers = [
            re.match(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.", k)
            for k in source.keys()
        ]
        return 1 + max((int(m.group(1)) for m in numbers if m), default=-1)

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in source.keys() or len(source.shape(key)) != rank:
            raise InputError(
                f"{source.path}: expected OpenCLIP's tensor {key!r} of rank {rank}; received a file "
                "without it"
            )
        return source.shape(key)

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    side = round((shape("visual.positional_embedding", 2)[0] - 1) ** 0.5)
    vocabulary, text_width = shape("token_embedding.weight", 2)
    return config_of(
        {
            "embed_dim": shape("visual.proj", 2)[1],
            "vision_cfg": {
                "image_size": side * patch,
                "layers": layers("visual."),
                "width": width,
                "patch_size": patch,
                "head_width": HEAD_WIDTHS.get(width, HEAD_WIDTH),
                "mlp_ratio": shape("visual.transformer.resblocks.0.mlp.c_fc.bias", 1)[0] / width,
            },
            "text_cfg": {
                "context_length": shape("positional_embedding", 2)[0],
                "vocab_size": vocabulary,
                "width": text_width,
                "heads": max(1, text_width // HEAD_WIDTH),
                "layers": layers(""),
                "mlp_ratio": shape("transformer.resblocks.0.mlp.c_fc.bias", 1)[0] / text_width,
            },
        }
    )


def find_weights(directory: pathlib.Path, names: Sequence[str] = FILES) -> pathlib.Path | None:
    """The first of `names` that the directory holds."""
    return next((directory / name for name in names if (directory / name).is_file()), None)


def load_openclip(
    path: pathlib.Path | str,
    settings: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    place: Callable[..., Any] | None = None,
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
    config = config_from_shapes(source) if settings is None else config_of(settings)
    model = CLIPModel(config, dtype)
    shapes = abstract_params(model)
    return model, load_params(Unpacked(source), entries(shapes), shapes, dtype, _IGNORED, place)


def abstract_params(model: CLIPModel) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    vision = model.config.vision
    pixels = jax.ShapeDtypeStruct(
        (1, vision.image_size, vision.image_size, vision.num_channels), jnp.float32
    )
    return jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32), pixels
    )["params"]
