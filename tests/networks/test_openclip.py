"""OpenCLIP's key map and shapes; values are compared in tests/rewards/test_published.py."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from marble_jax.errors import InputError
from marble_jax.networks import clip, openclip
from marble_jax.networks.clip import CLIPConfig, CLIPModel
from marble_jax.networks.openclip import Unpacked, config_from_shapes, config_of, load_openclip
from marble_jax.weights.safetensors_files import SafetensorsFile

VIT_H = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224,
        "layers": 32,
        "width": 1280,
        "head_width": 80,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 1024,
        "heads": 16,
        "layers": 24,
    },
}
TINY = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 5, "vocab_size": 9, "width": 64, "heads": 1, "layers": 2},
}


def count(config):
    leaves = jax.tree.leaves(clip.abstract_params(CLIPModel(config)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def test_published_models_have_their_published_size():
    assert count(config_of(VIT_H)) == 986_109_441
    large = CLIPConfig.from_dict(
        {
            "projection_dim": 768,
            "text_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "num_hidden_layers": 12,
            },
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        }
    )
    assert count(large) == 427_616_513


def tensors(settings):
    """A file in OpenCLIP's layout with numbers that say where they are."""
    config, found, rng = config_of(settings), {}, np.random.default_rng(0)
    leaves = openclip.entries(clip.abstract_params(CLIPModel(config)))
    flat = {
        tuple(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            clip.abstract_params(CLIPModel(config))
        )[0]
    }
    for entry in leaves:
        shape = flat[entry.path].shape
        shape = {
            "linear": shape[::-1],
            "conv": (shape[-1], shape[-2], *shape[:2]) if len(shape) == 4 else shape,
            "none": shape,
        }[entry.transform]
        found[entry.key] = rng.normal(size=shape).astype(np.float32)
    packed = {}
    for key in list(found):
        if key.endswith("[q]"):
            name = key[:-3]
            packed[name] = np.concatenate([found.pop(f"{name}[{part}]") for part in "qkv"])
    return found | packed


@pytest.fixture
def file(tmp_path):
    save_file(tensors(TINY), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_packed_projections_are_cut_in_order(file):
    source = SafetensorsFile(file)
    cut = Unpacked(source)
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    for i, part in enumerate("qkv"):
        assert (
            cut.shape(f"{name}[{part}]") == (64, 64) and cut.dtype(f"{name}[{part}]") == np.float32
        )
        np.testing.assert_array_equal(
            cut.read(f"{name}[{part}]"), source.read(name)[64 * i : 64 * (i + 1)]
        )
    _, params = load_openclip(file, TINY)
    kernel = params["vision_model"]["encoder.layers.0"]["self_attn.k_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, source.read(name)[64:128].T)
    np.testing.assert_array_equal(
        params["text_projection"]["kernel"], source.read("text_projection")
    )


def test_shape_from_the_tensors_alone(file):
    assert config_from_shapes(SafetensorsFile(file)) == config_of(TINY)

    class Shapes:
        """A file of the published size, without its 4 GB."""

        path = file
        shapes = {
            "visual.conv1.weight": (1280, 3, 14, 14),
            "visual.positional_embedding": (257, 1280),
            "token_embedding.weight": (49408, 1024),
            "visual.proj": (1280, 1024),
            "positional_embedding": (77, 1024),
            "visual.transformer.resblocks.0.mlp.c_fc.bias": (5120,),
            "transformer.resblocks.0.mlp.c_fc.bias": (4096,),
            "visual.transformer.resblocks.31.ln_1.weight": (1280,),
            "transformer.resblocks.23.ln_1.weight": (1024,),
        }

        def keys(self):
            return list(self.shapes)

        def shape(self, key):
            return self.shapes[key]

    assert config_from_shapes(Shapes()) == config_of(VIT_H)


def test_every_tensor_counts(tmp_path):
    found = tensors(TINY)
    path = tmp_path / "x.safetensors"

    def refused(message, change, settings=TINY):
        save_file(change, path)
        with pytest.raises(InputError, match=message):
            load_openclip(path, settings)

    lost = "transformer.resblocks.1.attn.in_proj_bias"
    refused(
        r"expected tensor 'transformer.resblocks.1.attn.in_proj_bias\[k\]' \(and 2 more\); received a file without",
        {k: v for k, v in found.items() if k != lost},
    )
    refused(
        "expected only the tensors of this config; received 'logit_bias'",
        found | {"logit_bias": np.zeros(1)},
    )
    refused(
        r"tensor 'visual.proj': expected shape \(64, 6\); received \(6, 64\)",
        found | {"visual.proj": found["visual.proj"].T.copy()},
    )
    save_file(found | {"attn_mask": np.zeros((5, 5), np.float32)}, path)
    assert load_openclip(path, TINY)[0].config == config_of(TINY)  # a buffer of old files
    save_file({"visual.proj": found["visual.proj"]}, path)
    with pytest.raises(
        InputError,
        match="expected OpenCLIP's tensor 'visual.conv1.weight' of rank 4; received a file",
    ):
        load_openclip(path)


def test_configs():
    quick = config_of({**TINY, "quick_gelu": True})
    assert quick.text.hidden_act == "quick_gelu" and config_of(TINY).vision.hidden_act == "gelu"
    assert dataclasses.replace(config_of(VIT_H).vision, image_size=28).num_attention_heads == 16
    with pytest.raises(
        InputError, match="open_clip_config.json model_cfg: expected 'embed_dim'; received none"
    ):
        config_of({k: v for k, v in TINY.items() if k != "embed_dim"})
    with pytest.raises(
        InputError, match="expected a plain pair of transformers; received another kind of tower"
    ):
        config_of({**TINY, "vision_cfg": {**TINY["vision_cfg"], "layers": [3, 4, 6, 3]}})
