"""A model's small files, malformed: index, scheduler, configs of networks, settings and files of tokenizers."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from pathlib import Path

import pytest
from attempts import ACCEPTED, DAMAGED, changed, check, line_of

from marble_jax.families.descriptions import NetworkOptions
from marble_jax.families.flux1.config import FluxConfig
from marble_jax.families.flux1.levels import read_scheduler as read_flux1_scheduler
from marble_jax.families.registry import family_of
from marble_jax.families.wan.config import WanConfig
from marble_jax.families.wan.levels import read_scheduler as read_wan_scheduler
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.networks.blip import BlipTextConfig
from marble_jax.networks.clip_config import CLIPConfig
from marble_jax.networks.openclip import config_of
from marble_jax.networks.t5 import T5Config
from marble_jax.networks.tokenizers import check_tokenizer, load_tokenizer
from marble_jax.networks.umt5 import UMT5Config

EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded" / "pipeline"))
HUGE = 10**6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the embedded pipeline, restored after each case."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(EMBEDDED, folder)
    return folder


def look(root, file):
    """Reads a model's small files up to the one that is looked at, and no weights."""
    family = family_of(root)
    family.default_sequence_length(root)
    # What is not looked at is whole: tracing networks for it would take most of the time.
    if "encoder" not in file:
        family.outline(root, NetworkOptions())
    if "encoder" in file or "index" in file:
        family.num_encoder_parameters(root)


JSON_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_3/config.json",
    "tokenizer/tokenizer_config.json",
)
# A scheduler's file is read leniently, as other schedulers write infinities, and refused by its keys.
LENIENT = {"not a number": "'a'", "half a character": "'a'", "twice": "'a'"}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("file", JSON_FILES)
def test_damaged_json(model, file, kind):
    content, word = DAMAGED[kind]
    if "scheduler" in file:
        word = LENIENT.get(kind, word)
    with changed(model / file, content):
        line = line_of(lambda: look(model, file))
    check(line, f"{word} & {model}")


INDEX = [
    ({"_class_name": 5}, "_class_name"),
    ({"_class_name": None}, "_class_name"),
    ({"_class_name": ["StableDiffusion3Pipeline"]}, "_class_name"),
    ({"_class_name": "StableDifusion3Pipeline"}, "did you mean"),
    ({"text_encoder_3": 5}, "text_encoder_3"),
    ({"text_encoder_3": "T5EncoderModel"}, "text_encoder_3"),
    ({"text_encoder_3": ["transformers"]}, "text_encoder_3"),
    ({"text_encoder_3": [1, 2]}, "text_encoder_3"),
    ({"text_encoder_3": {"class": "T5"}}, "text_encoder_3"),
    ({"text_encoder_3": ["transformers", True]}, "text_encoder_3"),
    # Left out: a model without it.
    ({"text_encoder_3": None}, ACCEPTED),
]
SCHEDULER = [
    ({"shift": "3"}, "shift & '3'"),
    ({"shift": 0}, "shift"),
    ({"shift": -1.0}, "shift"),
    ({"shift": 1e9}, "shift"),
    ({"shift": None}, "shift"),
    ({"shift": [3.0]}, "shift"),
    ({"shift": True}, "shift"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ({"num_train_timesteps": 1000.0}, "num_train_timesteps"),
    ({"num_train_timesteps": True}, "num_train_timesteps"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas"),
    ({"use_beta_sigmas": 1}, "use_beta_sigmas"),
    ({"shift_terminal": 0.02}, "shift_terminal"),
    ({"_class_name": "EulerDiscreteScheduler"}, "_class_name"),
    ({"_class_name": 7}, "_class_name"),
    ({"unheard_of": 1}, "unheard_of"),
]
TRANSFORMER = [
    ({"num_layers": "5"}, "num_layers & '5'"),
    ({"num_layers": 0}, "num_layers & 0"),
    ({"num_layers": -3}, "num_layers"),
    ({"num_layers": HUGE}, f"num_layers & {HUGE}"),
    ({"num_layers": 5.0}, "num_layers"),
    ({"num_layers": True}, "num_layers"),
    ({"num_layers": None}, "num_layers"),
    ({"num_layers": [5]}, "num_layers"),
    ({"patch_size": 0}, "patch_size"),
    ({"patch_size": "2"}, "patch_size"),
    ({"attention_head_dim": 10**15}, "attention_head_dim"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_attention_heads": 3}, "caption_projection_dim"),
    ({"in_channels": -16}, "in_channels"),
    ({"in_channels": 8}, "latent channels"),
    ({"out_channels": 0}, "out_channels"),
    ({"joint_attention_dim": {}}, "joint_attention_dim"),
    ({"pos_embed_max_size": 10**9}, "pos_embed_max_size"),
    ({"pos_embed_max_size": 1.5}, "pos_embed_max_size"),
    ({"sample_size": "8"}, "sample_size"),
    ({"dual_attention_layers": 1}, "dual_attention_layers"),
    ({"dual_attention_layers": [99]}, "dual_attention_layers"),
    ({"dual_attention_layers": ["0"]}, "dual_attention_layers"),
    ({"dual_attention_layers": [-1]}, "dual_attention_layers"),
    ({"qk_norm": "layer_norm"}, "qk_norm"),
    ({"qk_norm": 5}, "qk_norm"),
    ({"unheard_of": 1}, "unheard_of"),
    ({"num_layer": 5}, "did you mean 'num_layers'"),
]
VAE = [
    ({"scaling_factor": 0}, "scaling_factor"),
    ({"scaling_factor": None}, "scaling_factor"),
    ({"scaling_factor": "0.8"}, "scaling_factor"),
    ({"scaling_factor": -1.0}, "scaling_factor"),
    ({"scaling_factor": 1e-30}, "scaling_factor"),
    ({"scaling_factor": 1e30}, "scaling_factor"),
    ({"shift_factor": 1e300}, "shift_factor"),
    ({"shift_factor": "0"}, "shift_factor"),
    # As diffusers writes it for autoencoders without a shift: 0.
    ({"shift_factor": None}, ACCEPTED),
    ({"norm_num_groups": 0}, "norm_num_groups"),
    ({"norm_num_groups": 5}, "norm_num_groups & 5"),
    ({"norm_num_groups": "8"}, "norm_num_groups"),
    ({"block_out_channels": []}, "block_out_channels"),
    ({"block_out_channels": 64}, "block_out_channels"),
    ({"block_out_channels": [16, "32"]}, "block_out_channels"),
    ({"block_out_channels": [16] * 40}, "block_out_channels"),
    ({"block_out_channels": [0, 8]}, "block_out_channels"),
    ({"layers_per_block": HUGE}, "layers_per_block"),
    ({"latent_channels": 0}, "latent_channels"),
    ({"latent_channels": 4}, "latent channels"),
    ({"in_channels": 4}, "in_channels"),
    ({"out_channels": 1}, "out_channels"),
    ({"act_fn": "gelu"}, "act_fn"),
    ({"act_fn": 5}, "act_fn"),
    ({"down_block_types": 5}, "down_block_types"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types"),
    ({"up_block_types": [5]}, "up_block_types"),
    ({"use_quant_conv": "false"}, "use_quant_conv"),
    ({"mid_block_add_attention": 1}, "mid_block_add_attention"),
]
CLIP = [
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"num_attention_heads": 7}, "num_attention_heads"),
    ({"num_hidden_layers": HUGE}, "num_hidden_layers"),
    ({"vocab_size": 2**40}, "vocab_size"),
    ({"vocab_size": None}, "vocab_size"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"hidden_act": ["gelu"]}, "hidden_act"),
    ({"layer_norm_eps": 0}, "layer_norm_eps"),
    ({"layer_norm_eps": "1e-5"}, "layer_norm_eps"),
    ({"eos_token_id": "620"}, "eos_token_id"),
    ({"eos_token_id": -2}, "eos_token_id"),
    ({"projection_dim": 6.5}, "projection_dim"),
]
T5 = [
    ({"d_model": "128"}, "d_model"),
    ({"d_kv": -1}, "d_kv"),
    ({"num_layers": HUGE}, "num_layers"),
    ({"num_heads": 0}, "num_heads"),
    ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets"),
    ({"relative_attention_max_distance": 4}, "relative_attention_max_distance"),
    ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
    ({"feed_forward_proj": None}, "feed_forward_proj"),
    ({"dense_act_fn": "tanh"}, "dense_act_fn"),
    ({"dense_act_fn": 5}, "dense_act_fn"),
    ({"is_gated_act": "true"}, "is_gated_act"),
    ({"layer_norm_epsilon": 5}, "layer_norm_epsilon"),
]
TOKENIZER = [
    ({"model_max_length": 0}, "model_max_length"),
    ({"model_max_length": "77"}, "model_max_length"),
    ({"model_max_length": -5}, "model_max_length"),
    ({"model_max_length": []}, "model_max_length"),
    ({"model_max_length": True}, "model_max_length"),
]
CASES = [
    (file, change, words)
    for file, cases in (
        ("model_index.json", INDEX),
        ("scheduler/scheduler_config.json", SCHEDULER),
        ("transformer/config.json", TRANSFORMER),
        ("vae/config.json", VAE),
        ("text_encoder/config.json", CLIP),
        ("text_encoder_3/config.json", T5),
        ("tokenizer/tokenizer_config.json", TOKENIZER),
    )
    for change, words in cases
]


@pytest.mark.parametrize(("file", "change", "words"), CASES)
def test_values(model, file, change, words):
    with changed(model / file, change):
        line = line_of(lambda: look(model, file))
    check(line, words)
    if words != ACCEPTED and "latent channels" not in words:
        assert Path(file).name in line, "the file is not named"


OTHER_CONFIGS = [
    (FluxConfig.from_dict, {"num_layers": 0}, "num_layers"),
    (FluxConfig.from_dict, {"num_single_layers": HUGE}, "num_single_layers"),
    (FluxConfig.from_dict, {"guidance_embeds": "true"}, "guidance_embeds"),
    (FluxConfig.from_dict, {"axes_dims_rope": [16, 56]}, "axes_dims_rope"),
    (FluxConfig.from_dict, {"axes_dims_rope": "16,56,56"}, "axes_dims_rope"),
    (FluxConfig.from_dict, {"in_channels": 6}, "in_channels"),
    (WanConfig.from_dict, {"patch_size": 2}, "patch_size"),
    (WanConfig.from_dict, {"patch_size": [2, 2, 2]}, "patch_size"),
    (WanConfig.from_dict, {"num_layers": "30"}, "num_layers"),
    (WanConfig.from_dict, {"eps": "1e-6"}, "eps"),
    (WanConfig.from_dict, {"attention_head_dim": 5}, "attention_head_dim"),
    (WanConfig.from_dict, {"rope_max_seq_len": 10**12}, "rope_max_seq_len"),
    (WanVAEConfig.from_dict, {"dim_mult": []}, "dim_mult"),
    (WanVAEConfig.from_dict, {"in_channels": 0}, "in_channels & red"),
    (WanVAEConfig.from_dict, {"in_channels": -1}, "in_channels"),
    (WanVAEConfig.from_dict, {"out_channels": 10**30}, "out_channels"),
    (WanVAEConfig.from_dict, {"out_channels": 1}, "out_channels"),
    (WanVAEConfig.from_dict, {"latents_std": [0.0] * 16}, "latents_std"),
    (WanVAEConfig.from_dict, {"latents_std": [1e30] * 16}, "latents_std"),
    (WanVAEConfig.from_dict, {"latents_mean": [-1e300] * 16}, "latents_mean"),
    (WanVAEConfig.from_dict, {"latents_mean": [0.0] * 3}, "latents_mean"),
    (WanVAEConfig.from_dict, {"temperal_downsample": [0, 1, 1]}, "temperal_downsample"),
    (UMT5Config.from_dict, {"model_type": 5}, "model_type"),
    (UMT5Config.from_dict, {"num_heads": 2.0}, "num_heads"),
    (T5Config.from_dict, {"d_ff": [1]}, "d_ff"),
    (BlipTextConfig.from_dict, {"pad_token_id": "0"}, "pad_token_id"),
    (BlipTextConfig.from_dict, {"num_attention_heads": 0}, "num_attention_heads"),
    (CLIPConfig.from_dict, {"text_config": 5}, "text_config"),
    (CLIPConfig.from_dict, {"vision_config": {"image_size": 0}}, "image_size"),
    (CLIPConfig.from_dict, {"vision_config": {"image_size": 16}}, "patch_size"),
    (CLIPConfig.from_dict, {"vision_config": {"num_channels": 4}}, "num_channels"),
    (CLIPConfig.from_dict, {"projection_dim": "512"}, "projection_dim"),
    (config_of, {"embed_dim": 4, "vision_cfg": 5, "text_cfg": {}}, "vision_cfg"),
    (config_of, {"embed_dim": 4, "vision_cfg": {"layers": 1}, "text_cfg": []}, "text_cfg"),
    (config_of, {"vision_cfg": {"layers": 1}, "text_cfg": {}}, "expected"),
]
OPENCLIP = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"layers": 1, "width": 64, "heads": 1, "context_length": 8, "vocab_size": 64},
}


@pytest.mark.parametrize(("read", "values", "words"), OTHER_CONFIGS)
def test_configs_of_other_networks(read, values, words):
    check(line_of(lambda: read(values)), words)


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [
        ("vision_cfg", "width", "64"),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "mlp_ratio", None),
        ("vision_cfg", "mlp_ratio", 1e9),
        ("vision_cfg", "image_size", [16, 16]),
        ("vision_cfg", "layers", HUGE),
        ("text_cfg", "heads", 0),
        ("text_cfg", "layers", "1"),
        ("text_cfg", "vocab_size", -1),
        ("text_cfg", "context_length", 2.5),
    ],
)
def test_openclip_configs(tower, field, value):
    values = OPENCLIP | {tower: OPENCLIP[tower] | {field: value}}
    assert line_of(lambda: config_of(OPENCLIP)) == ACCEPTED
    check(line_of(lambda: config_of(values)), field)


FLUX1 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


@pytest.mark.parametrize(
    ("read", "usual", "change", "words"),
    [
        (read_flux1_scheduler, FLUX1, {}, ACCEPTED),
        (read_flux1_scheduler, FLUX1, {"use_dynamic_shifting": "yes"}, "use_dynamic_shifting"),
        (read_flux1_scheduler, FLUX1, {"max_shift": 1000}, "max_shift"),
        (read_flux1_scheduler, FLUX1, {"base_shift": "0.5"}, "base_shift"),
        (read_flux1_scheduler, FLUX1, {"max_image_seq_len": 256}, "max_image_seq_len"),
        (read_flux1_scheduler, FLUX1, {"base_image_seq_len": 0}, "base_image_seq_len"),
        (read_flux1_scheduler, FLUX1, {"shift": -1}, "shift"),
        (read_flux1_scheduler, FLUX1, {"time_shift_type": "linear"}, "time_shift_type"),
        (read_flux1_scheduler, FLUX1, {"invert_sigmas": []}, "invert_sigmas"),
        (read_flux1_scheduler, FLUX1, {"num_train_timesteps": 500}, "num_train_timesteps & 500"),
        (read_flux1_scheduler, FLUX1, {"num_train_timesteps": "1000"}, "num_train_timesteps"),
        (read_flux1_scheduler, FLUX1, {"use_flow_sigmas": True}, "use_flow_sigmas"),
        (read_flux1_scheduler, FLUX1, {"unheard_of": 1}, "unheard_of"),
        (read_flux1_scheduler, FLUX1, {"unheard_of": None}, ACCEPTED),
        (read_wan_scheduler, WAN, {}, ACCEPTED),
        (read_wan_scheduler, WAN, {"flow_shift": "3"}, "flow_shift"),
        (read_wan_scheduler, WAN, {"flow_shift": 0}, "flow_shift"),
        (read_wan_scheduler, WAN, {"flow_shift": [3]}, "flow_shift"),
        (read_wan_scheduler, WAN, {"use_flow_sigmas": "true"}, "use_flow_sigmas"),
        (read_wan_scheduler, WAN, {"prediction_type": None}, "prediction_type"),
        (read_wan_scheduler, WAN, {"solver_order": "2"}, "solver_order"),
        (read_wan_scheduler, WAN, {"disable_corrector": {}}, "disable_corrector"),
        (read_wan_scheduler, WAN, {"_class_name": []}, "_class_name"),
        (read_wan_scheduler, WAN, {"invert_sigmas": True}, "invert_sigmas"),
        (read_wan_scheduler, WAN, {"unheard_of": 1}, "unheard_of"),
        (read_wan_scheduler, WAN, {"unheard_of": False}, ACCEPTED),
        (read_wan_scheduler, WAN, {"num_train_timesteps": 500}, "num_train_timesteps"),
    ],
)
def test_schedulers_of_other_families(tmp_path, read, usual, change, words):
    file = tmp_path / "scheduler_config.json"
    file.write_text("{}")
    with changed(file, {**usual, **change}):
        check(line_of(lambda: read(tmp_path)), words)


TOKENIZER_FILES = [
    ("tokenizer.json", None, "tokenizer.json"),
    ("tokenizer.json", "", "empty"),
    ("tokenizer.json", "{}", "Tokenizer"),
    ("tokenizer.json", "[]", "Tokenizer"),
    ("tokenizer.json", "5", "Tokenizer"),
    *[
        ("tokenizer.json", json.dumps({"added_tokens": added, "model": {"vocab": {}}}), "received")
        for added in (True, -1, "x", [1], ["x"], {"a": 1}, [None], [{"content": ["a"]}])
    ],
    *[
        ("tokenizer.json", json.dumps({"added_tokens": [], "model": value}), "received")
        for value in (
            True,
            5,
            "x",
            [1],
            {"vocab": 5},
            {"vocab": "x"},
            {"vocab": [1]},
            {"vocab": True},
        )
    ],
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "received"),
    ("tokenizer.json", DAMAGED["pointer"][0], "LFS"),
    ("tokenizer.json", DAMAGED["web page"][0], "HTML"),
    ("tokenizer.json", b"\x00\x01\x02", "received"),
    ("tokenizer_config.json", DAMAGED["deep"][0], "deep"),
    ("tokenizer_config.json", "[]", "object"),
    ("special_tokens_map.json", "[", "JSON"),
    ("special_tokens_map.json", "5", "object"),
    ("added_tokens.json", "null", "object"),
]


@pytest.mark.parametrize(("name", "content", "words"), TOKENIZER_FILES)
def test_tokenizer_files(model, name, content, words):
    folder = model / "tokenizer"

    def read():
        check_tokenizer(load_tokenizer(folder, "CLIPTokenizer"), folder, 621, 620)

    with changed(folder / name, content):
        line = line_of(read)
    check(line, f"{words} & {folder}")
