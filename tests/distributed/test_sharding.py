"""Every weight of every network has a rule, on every mesh a shape that divides, and is read in parts."""

from __future__ import annotations

import dataclasses
import functools

import fake_devices
import jax
import numpy as np
import pytest
from flax import traverse_util

from marble_jax.distributed import device_mesh
from marble_jax.distributed.sharding import SHARDED_AXES, ShardingRules
from marble_jax.errors import InputError
from marble_jax.families.sd3 import text, transformer
from marble_jax.families.sd3.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from marble_jax.families.sd3.layer_names import load_mmdit
from marble_jax.families.sd3.published import CLIP_G, CLIP_L, T5_XXL, VAE
from marble_jax.families.sd3.sharding_rules import component_rules, transformer_rules
from marble_jax.families.wan import transformer as wan_transformer
from marble_jax.families.wan.config import WAN21_1_3B
from marble_jax.families.wan.sharding_rules import transformer_rules as wan_rules
from marble_jax.networks import autoencoder_kl, autoencoder_wan, clip, t5
from marble_jax.networks.sharding_rules import (
    AUTOENCODER,
    TEXT_ENCODERS,
    VIDEO_AUTOENCODER,
)
from marble_jax.programs.locations import resolve_path
from marble_jax.storage.files import read_json

MESHES = ((8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8))


def shallow(config):
    """Two layers of a tower that is not scanned: the others are named alike."""
    return dataclasses.replace(config, num_hidden_layers=2)


@functools.cache
def shapes() -> dict[str, tuple[ShardingRules, dict]]:
    """(sharding rules, abstract parameters) by name, in published sizes, and the embedded transformer."""
    own = MMDiTConfig.from_dict(
        read_json(resolve_path("embedded", "pipeline") / "transformer" / "config.json")
    )
    found = {
        name: (
            transformer_rules(config.attention_head_dim),
            transformer.abstract_params(transformer.MMDiT(config)),
        )
        for name, config in {
            "sd3-medium": SD3_MEDIUM,
            "sd3.5-medium": SD35_MEDIUM,
            "sd3.5-large": SD35_LARGE,
            "embedded": own,
        }.items()
    }
    quant = autoencoder_kl.VAEConfig(
        use_quant_conv=True, use_post_quant_conv=True, block_out_channels=(32, 64)
    )
    found |= {
        name: (AUTOENCODER, autoencoder_kl.abstract_params(autoencoder_kl.AutoencoderKL(config)))
        for name, config in {"vae": VAE, "vae-quant": quant}.items()
    }
    found |= {
        name: (TEXT_ENCODERS, clip.abstract_text_params(clip.CLIPTextEncoder(config)))
        for name, config in {"clip-l": shallow(CLIP_L), "clip-g": shallow(CLIP_G)}.items()
    }
    found["t5"] = (
        TEXT_ENCODERS,
        t5.abstract_params(t5.T5Encoder(dataclasses.replace(T5_XXL, num_layers=2))),
    )
    found["wan"] = (
        wan_rules(WAN21_1_3B.attention_head_dim),
        wan_transformer.abstract_params(wan_transformer.WanTransformer(WAN21_1_3B)),
    )
    found["wan-vae"] = (
        VIDEO_AUTOENCODER,
        autoencoder_wan.abstract_params(
            autoencoder_wan.AutoencoderWan(autoencoder_wan.WanVAEConfig())
        ),
    )
    return found


def leaves(tree):
    return {
        path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(dict(tree)).items()
    }


def test_every_weight_has_a_rule_and_every_rule_a_weight():
    used, existing = set(), set()
    named = {name for name, _ in SHARDED_AXES}
    for name, (rules, tree) in shapes().items():
        existing |= set(rules.rules)
        for path, shape in leaves(tree).items():
            axes = rules.logical_axes(path, len(shape))
            assert len(axes) == len(shape) and set(axes) <= named, (name, path)
            used.add(rules.rule_of(path))
    assert used == existing
    assert {axis for _, axes in existing for axis in axes} | {"layers", "rank"} == named


def test_every_component_of_a_pipeline_has_rules():
    assert component_rules("transformer", 32) == transformer_rules(32)
    assert component_rules("vae") is AUTOENCODER
    assert component_rules("text_encoder") is component_rules("text_encoder_3") is TEXT_ENCODERS


@pytest.mark.parametrize("sizes", MESHES)
def test_shards_divide_and_heads_stay_whole(sizes):
    mesh = device_mesh.abstract_mesh(8, *sizes)
    for name, (rules, tree) in shapes().items():
        width = {"embedded": 32, "wan": 128}.get(name, 64)
        assert rules.head_width == width
        lie = leaves_of(rules.shardings(mesh, tree))
        for path, shape in leaves(tree).items():
            part = lie[path].shard_shape(shape)  # raises where an axis does not divide
            axes = rules.logical_axes(path, len(shape))
            if "heads" in axes and rules.network == "transformer":
                assert part[axes.index("heads")] % (1 if len(shape) == 0 else width) == 0, (
                    name,
                    path,
                )
        found = rules.layout(mesh, tree)
        assert found.device == sum(
            int(np.prod(lie[path].shard_shape(shape))) * 4 for path, shape in leaves(tree).items()
        )


def leaves_of(tree):
    return traverse_util.flatten_dict(tree)


def test_what_lies_where():
    """SD3.5-medium: an eighth a device over fsdp; over tensor all but the positional table and what is small; heads of
    SD3.5-large are 38 and do not divide."""
    trees = {name: tree for name, (_, tree) in shapes().items()}
    rules = transformer_rules()

    def share(name, *sizes):
        found = rules.layout(device_mesh.abstract_mesh(8, *sizes), trees[name])
        return found.device / found.total, found.unsplit / found.total

    assert share("sd3.5-medium", 8, 1, 1) == (1.0, 0.0)
    assert share("sd3.5-medium", 1, 8, 1) == (pytest.approx(1 / 8, rel=0.02), 0.0)
    assert share("sd3.5-medium", 1, 4, 2) == (pytest.approx(1 / 8, rel=0.2), 0.0)
    table = 147456 * 1536 / 2_469_663_936
    assert share("sd3.5-medium", 1, 1, 8) == (pytest.approx(1 / 8 + 7 / 8 * table, rel=0.02), 0.0)
    device, unsplit = share("sd3.5-large", 1, 1, 8)
    assert 0.2 < unsplit < device < 0.4
    assert (
        AUTOENCODER.layout(device_mesh.abstract_mesh(8, 1, 8), trees["vae"]).device
        == 4 * 83_819_683
    )


def test_axes_of_a_scanned_run_and_of_adapters():
    assert transformer_rules().logical_axes(("blocks_0", "attn", "to_q", "kernel"), 3) == (
        "layers",
        "embed",
        "heads",
    )
    assert transformer_rules().logical_axes(("block_23", "ff", "net_2", "kernel"), 2) == (
        "mlp",
        "embed",
    )
    assert transformer_rules().logical_axes(("blocks_0", "attn", "to_q", "b"), 3) == (
        "layers",
        "rank",
        "heads",
    )


def test_a_weight_that_no_rule_names_is_an_error():
    with pytest.raises(
        InputError, match="parameter blocks_0/attn/to_x/kernel: expected a rule of .*received none"
    ):
        transformer_rules().logical_axes(("blocks_0", "attn", "to_x", "kernel"), 3)
    with pytest.raises(
        InputError, match=r"to_q/kernel: expected 3 axes \(layers, embed, heads\); received 2"
    ):
        transformer_rules().logical_axes(("blocks_0", "attn", "to_q", "kernel"), 2)


def in_eight_devices() -> dict[str, float]:
    """Runs in a process with eight devices: the embedded transformer read straight into its shards."""
    from marble_jax.weights import key_map

    directory = resolve_path("embedded", "pipeline") / "transformer"
    mesh = device_mesh.make_mesh(1, 8, 1)
    counted, whole = [0], key_map.copy

    def count(target, tensor):
        counted[0] += target.nbytes
        whole(target, tensor)

    key_map.copy = count
    _, plain = load_mmdit(directory)
    total, counted[0] = counted[0], 0
    lie = lambda path, leaf: transformer_rules(32).sharding_of(mesh, path, leaf.shape)
    _, placed = load_mmdit(
        directory, place=lambda path, leaf: device_mesh.read_sharded(lie(path, leaf), leaf)
    )
    every, counted[0] = counted[0], 0
    one, largest = jax.devices()[3], [0]

    def own(path, leaf):
        """What a process that has only this device asks for."""
        before = counted[0]
        part = leaf[lie(path, leaf).devices_indices_map(leaf.shape)[one]]
        largest[0] = max(largest[0], counted[0] - before)
        return part

    _, mine = load_mmdit(directory, place=own)
    equal = jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), plain, placed))
    same = jax.tree.all(
        jax.tree.map(
            lambda x, y: np.array_equal(
                next(s.data for s in x.addressable_shards if s.device == one), y
            ),
            placed,
            mine,
        )
    )
    return {
        "total": total,
        "every": every,
        "one": counted[0],
        "largest": largest[0],
        "equal": equal,
        "same": same,
        "expected": transformer_rules(32).layout(mesh, plain).device,
    } | texts_in_eight_devices()


def texts_in_eight_devices() -> dict[str, float]:
    """The text encoders split over a host's devices: how far conditioning is from theirs, and bytes on a device."""
    root = resolve_path("embedded", "pipeline")
    prompts = ["a red star", 'the word "go" on a green field', ""]
    whole = text.load_text_encoders(root)
    split = text.load_text_encoders(
        root, place=lambda component: component_rules(component).place_over_host()
    )
    gaps = jax.tree.map(
        lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()),
        whole.encode(prompts, 12),
        split.encode(prompts, 12),
    )
    on_one = sum(leaf.addressable_shards[5].data.nbytes for leaf in jax.tree.leaves(split.params))
    return {
        "text_gap": max(jax.tree.leaves(gaps)),
        "text_share": on_one / sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params)),
    }


def test_a_process_reads_only_what_its_devices_need():
    found = fake_devices.call(in_eight_devices)
    assert found["equal"] and found["same"]
    assert (
        found["every"] == found["total"]
    )  # eight devices of one process: every number once, shared parts too
    assert found["one"] == found["expected"] < 0.16 * found["total"]
    assert found["text_gap"] < 1e-5 and found["text_share"] < 0.16
    assert found["largest"] < 0.03 * found["total"]
