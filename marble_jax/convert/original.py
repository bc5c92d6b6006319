"""Single-file checkpoints in Stability's own layout, read as if they were diffusers components.

Such a file holds the transformer and the autoencoder, sometimes text encoders too, under names of its own. Every
published tensor is a `Piece` of one of its tensors: a third of a fused query-key-value matrix, two halves swapped, or
the whole. The configs are read off the shapes.

Source: diffusers 0.42 `loaders/single_file_utils.py` for the names, the swapped halves and the identity projection.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from marble_jax.convert.layouts import CLASSES, layout
from marble_jax.errors import InputError, nearest
from marble_jax.weights.key_map import published_shape
from marble_jax.weights.safetensors_files import SafetensorsFile

TRANSFORMER, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
UNUSED = (
    "*.position_ids",
    "text_encoders.*.logit_scale",
    TEXT["text_encoder_3"] + "encoder.embed_tokens.weight",
)
"""What such files may hold that no network reads: index buffers, CLIP's loss scale, the second name of T5's table."""
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
"""Sigma grid of every published SD3 and SD3.5 model. Source: their scheduler_config.json (reference/sd3.md, 4)."""
_HEAD = 64  # width of a head, in every published MMDiT and CLIP

_GLOBAL = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
}  # fmt: skip
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
_FUSED = {
    **{f"attn.to_{q}": ("x_block.attn.qkv", i) for i, q in enumerate("qkv")},
    **{f"attn.add_{q}_proj": ("context_block.attn.qkv", i) for i, q in enumerate("qkv")},
    **{f"attn2.to_{q}": ("x_block.attn2.qkv", i) for i, q in enumerate("qkv")},
}
_BLOCK |= {f"{a}.norm_{q}": f"x_block.{a}.ln_{q}" for a in ("attn", "attn2") for q in "qk"}
_BLOCK |= {f"attn.norm_added_{q}": f"context_block.attn.ln_{q}" for q in "qk"}
_VAE_RULES = (
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder.up.\1.block.\2"),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0", r"decoder.up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a published tensor lies in an original file.

    Attributes:
      key: the original tensor; None for an identity matrix that the file leaves out.
      third: 0, 1 or 2 for a third of the rows; None for all of them.
      swapped: whether the two halves of the rows change places.
      shape: of the published tensor; a 1x1 convolution is published as a matrix.
    """

    key: str | None
    shape: tuple[int, ...]
    third: int | None = None
    swapped: bool = False


class OriginalComponent:
    """One component of an original file under its published names.

    Attributes:
      path: the file.
      config: what its config.json would hold.
    """

    def __init__(
        self, source: SafetensorsFile, config: dict[str, Any], pieces: Mapping[str, Piece]
    ):
        self.path, self.config = source.path, config
        self._source, self._pieces = source, dict(pieces)

    def keys(self) -> list[str]:
        """Published names."""
        return list(self._pieces)

    def used(self) -> set[str]:
        """Original names of what the component is made of."""
        return {piece.key for piece in self._pieces.values() if piece.key is not None}

    def shape(self, key: str) -> tuple[int, ...]:
        """Published shape."""
        return self._pieces[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Dtype in the file; an identity matrix has that of the file's first tensor of the component."""
        name = self._pieces[key].key
        return self._source.dtype(min(self.used()) if name is None else name)

    def file(self, key: str) -> pathlib.Path:
        """The file."""
        return self.path

    def release(self, key: str) -> None:
        """Lets go of the original tensor's pages."""
        if self._pieces[key].key is not None:
            self._source.release(self._pieces[key].key)

    def read(self, key: str) -> np.ndarray:
        """The published tensor."""
        piece = self._pieces[key]
        if piece.key is None:
            return np.eye(*piece.shape, dtype=self.dtype(key))
        tensor = self._source.read(piece.key)
        if piece.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[piece.third * rows : (piece.third + 1) * rows]
        if piece.swapped:
            half = tensor.shape[0] // 2
            tensor = np.concatenate([tensor[half:], tensor[:half]])
        return tensor.reshape(piece.shape)


def open_original(
    path: pathlib.Path | str, ignore: Sequence[str] = ()
) -> dict[str, OriginalComponent]:
    """The components of an original single-file checkpoint.

    Args:
      path: the file; the transformer alone may stand without its prefix.
      ignore: `fnmatch` patterns of tensors to pass over.

    Raises:
      InputError: not such a file; tensors that are missing, left over or of the wrong shape.
    """
    file = SafetensorsFile(path)
    keys = [
        k for k in file.keys() if not any(fnmatch.fnmatchcase(k, pattern) for pattern in ignore)
    ]
    bare = any(k.startswith("joint_blocks.") for k in keys)
    prefixes = {"transformer": "" if bare else TRANSFORMER, "vae": VAE, **TEXT}
    components = {}
    for component, prefix in prefixes.items():
        names = [k.removeprefix(prefix) for k in keys if k.startswith(prefix)]
        if component != "transformer" and not names:
            continue
        shape = _Shapes(file, prefix, names)
        config = {
            "transformer": _transformer_config,
            "vae": _vae_config,
            "text_encoder_3": _t5_config,
        }.get(component, _clip_config)(shape)
        if component == "text_encoder_2":
            config["hidden_act"] = "gelu"
        components[component] = _component(file, component, prefix, config, names)
    used = set().union(*(c.used() for c in components.values()))
    extra = [
        k for k in keys if k not in used and not any(fnmatch.fnmatchcase(k, p) for p in UNUSED)
    ]
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise InputError(
            f"{file.path}: expected only tensors of an SD3 checkpoint; received {extra[0]!r}{more}"
            f"{nearest(extra[0], used)} (--ignore=PATTERN passes over it)"
        )
    return components


def original_name(
    component: str, key: str, config: Mapping[str, Any]
) -> tuple[str, int | None, bool]:
    """Name of a published tensor in an original file, without prefix; which third of its rows; whether halves swap."""
    if component == "vae":
        top = len(config["block_out_channels"]) - 1
        for pattern, name in _VAE_RULES:
            key = re.sub(pattern, name, key)
        # The original numbers the decoder's resolutions from the finest, diffusers from the coarsest.
        return (
            re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}", key),
            None,
            False,
        )
    if component != "transformer":
        return key, None, False
    if key in _GLOBAL:
        return _GLOBAL[key], None, False
    module, _, leaf = key.rpartition(".")
    block = re.match(r"transformer_blocks\.(\d+)\.(.+)", module)
    if not block:
        # Stability's final layer takes (shift, scale), diffusers' (scale, shift).
        return f"{_GLOBAL[module]}.{leaf}", None, module == "norm_out.linear"
    number, name = int(block[1]), block[2]
    if name in _FUSED:
        fused, third = _FUSED[name]
        return f"joint_blocks.{number}.{fused}.{leaf}", third, False
    swapped = name == "norm1_context.linear" and number == config["num_layers"] - 1
    return f"joint_blocks.{number}.{_BLOCK[name]}.{leaf}", None, swapped


class _Shapes:
    """Shapes of the tensors under one prefix, by name; a missing one is an error that names it."""

    def __init__(self, file: SafetensorsFile, prefix: str, names: Iterable[str]):
        self.file, self.prefix, self.names = file, prefix, set(names)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.names:
            raise InputError(
                f"{self.file.path}: expected tensor {self.prefix + name!r} of an SD3 checkpoint; received "
                f"a file without it{nearest(self.prefix + name, self.file.keys())}"
            )
        return self.file.shape(self.prefix + name)

    def count(self, pattern: str) -> int:
        """One more than the largest number that the group of `pattern` matches."""
        return 1 + max(
            (int(m[1]) for m in (re.match(pattern, n) for n in self.names) if m), default=-1
        )


def _component(
    file: SafetensorsFile, component: str, prefix: str, config: dict[str, Any], names: Sequence[str]
) -> OriginalComponent:
    plan = layout(component, config, names)
    leaves = traverse_util.flatten_dict(dict(plan.shapes))
    present, pieces = set(names), {}
    for entry in plan.entries:
        shape = published_shape(entry, leaves[entry.path].shape)
        name, third, swapped = original_name(component, entry.key, config)
        if (
            component == "text_encoder"
            and entry.key == "text_projection.weight"
            and name not in present
        ):
            pieces[entry.key] = Piece(None, shape)
            continue
        if name not in present:
            raise InputError(
                f"{file.path}: expected tensor {prefix + name!r}; received a file without it"
                f"{nearest(prefix + name, file.keys())}"
            )
        received = file.shape(prefix + name)
        expected = (3 * shape[0], *shape[1:]) if third is not None else shape
        squeezed = received[:2] if received[2:] == (1, 1) and len(expected) == 2 else received
        if squeezed != expected:
            raise InputError(
                f"{file.path}: tensor {prefix + name!r}: expected shape {expected}; received {received}"
            )
        pieces[entry.key] = Piece(prefix + name, shape, third, swapped)
    return OriginalComponent(file, config, pieces)


def _transformer_config(shape: _Shapes) -> dict[str, Any]:
    patch = shape["x_embedder.proj.weight"]
    width, text = shape["context_embedder.weight"]
    duals = sorted(
        {
            int(m[1])
            for m in (re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", n) for n in shape.names)
            if m
        }
    )
    qk_norm = "joint_blocks.0.x_block.attn.ln_q.weight" in shape.names
    head = shape["joint_blocks.0.x_block.attn.ln_q.weight"][0] if qk_norm else _HEAD
    return {
        "_class_name": CLASSES["transformer"][1], "sample_size": 128, "patch_size": patch[-1], "in_channels": patch[1],
        "out_channels": shape["final_layer.linear.weight"][0] // patch[-1] ** 2,
        "num_layers": shape.count(r"joint_blocks\.(\d+)\."), "attention_head_dim": head,
        "num_attention_heads": width // head, "joint_attention_dim": text, "caption_projection_dim": width,
        "pooled_projection_dim": shape["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shape["pos_embed"][1]), "dual_attention_layers": duals,
        "qk_norm": "rms_norm" if qk_norm else None,
    }  # fmt: skip


def _vae_config(shape: _Shapes) -> dict[str, Any]:
    levels = shape.count(r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": CLASSES["vae"][1], "act_fn": "silu", "sample_size": 1024, "norm_num_groups": 32,
        "in_channels": shape["encoder.conv_in.weight"][1], "out_channels": shape["decoder.conv_out.weight"][0],
        "latent_channels": shape["decoder.conv_in.weight"][1],
        "block_out_channels": [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": shape.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shape.names, "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shape.names,
        "use_post_quant_conv": "post_quant_conv.weight" in shape.names,
        # Source: the config.json of SD3's autoencoder (reference/sd3.md, 2).
        "scaling_factor": 1.5305, "shift_factor": 0.0609,
    }  # fmt: skip


def _clip_config(shape: _Shapes) -> dict[str, Any]:
    vocabulary, width = shape["text_model.embeddings.token_embedding.weight"]
    projected = "text_projection.weight" in shape.names
    return {
        "architectures": [CLASSES["text_encoder"][1]], "model_type": "clip_text_model", "vocab_size": vocabulary,
        "hidden_size": width, "intermediate_size": shape["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": shape.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // _HEAD), "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "max_position_embeddings": shape["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": shape["text_projection.weight"][0] if projected else width,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


def _t5_config(shape: _Shapes) -> dict[str, Any]:
    vocabulary, width = shape["shared.weight"]
    first = "encoder.block.0.layer"
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shape.names
    buckets, heads = shape[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": [CLASSES["text_encoder_3"][1]], "model_type": "t5", "vocab_size": vocabulary,
        "d_model": width, "d_kv": shape[f"{first}.0.SelfAttention.q.weight"][0] // heads, "num_heads": heads,
        "d_ff": shape[f"{first}.1.DenseReluDense.wi{'_0' if gated else ''}.weight"][0],
        "num_layers": shape.count(r"encoder\.block\.(\d+)\."), "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu" if gated else "relu", "dense_act_fn": "gelu_new" if gated else "relu",
        "is_gated_act": gated, "is_encoder_decoder": False, "use_cache": False,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
