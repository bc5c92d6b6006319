"""Tiny Wan transformers with random weights, in diffusers and here, and what their tests compare with."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny_tokenizers import t5_tokenizer
from transformer_checks import random_leaves

from marble_jax.families.wan.config import WanConfig
from marble_jax.families.wan.layer_names import layers_at
from marble_jax.trainable import lora

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=10, ffn_dim=40, num_layers=3,
    rope_max_seq_len=8,
)  # fmt: skip
TARGETS = tuple(
    f"{attention}.{layer}"
    for attention in ("attn1", "attn2")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
)
SPEC = lora.LoraSpec(3, 6.0, TARGETS)
SIZES = ((1, 4, 6), (3, 2, 4), (2, 6, 6))
"""Latent frames, rows and columns; a picture is among them."""


def randomise(module) -> None:
    """Every tensor random, norm weights around one, so that no bias or scale can hide."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            norm = name.endswith(("norm_q.weight", "norm_k.weight", "norm2.weight", "gamma"))
            spread = 0.3
            if tensor.ndim > 1 and not name.endswith(("gamma", "scale_shift_table")):
                spread = 1.0 / math.sqrt(tensor[0].numel())
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(float(norm) + spread * noise)


def reference(config: WanConfig = TINY, path=None):
    """A diffusers transformer with random weights, saved under `path`."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(**dataclasses.asdict(config)).eval()
    randomise(model)
    if path is not None:
        model.save_pretrained(path)
    return model


def inputs(config: WanConfig = TINY, frames=3, height=4, width=6, num=2, tokens=5):
    """Latents, noise levels and conditioning; the last rows of the text are zeros, as beyond a prompt's end."""
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    embeds = draw(num, tokens, config.text_dim)
    embeds[:, tokens - 2 :] = 0
    sigma = np.asarray([0.913349, 0.0089286][:num], np.float32)
    return draw(num, frames, height, width, config.in_channels), sigma, {"embeds": embeds}


def channels_first(latents):
    """[N, f, h, w, C] as torch's [N, C, f, h, w]."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(latents), -1, 1))


def channels_last(latents):
    return np.moveaxis(np.asarray(latents), 1, -1)


def torch_velocity(model, xt, sigma, cond, dtype=None):
    """Velocity of a diffusers transformer, as its pipeline calls it."""
    torch = pytest.importorskip("torch")
    dtype = dtype or torch.float32
    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(channels_first(xt)).to(dtype),
            timestep=torch.from_numpy(sigma) * 1000,
            encoder_hidden_states=torch.from_numpy(cond["embeds"]).to(dtype),
            return_dict=False,
        )[0]
    return channels_last(out.float().numpy())


def random_adapter(params, spec=SPEC, seed: int = 0):
    return random_leaves(
        lambda: lora.init_adapter(jax.random.key(0), layers_at, params, spec), seed
    )


def build_pipeline(directory, scheduler=None, config: WanConfig = TINY, z_dim: int = 4):
    """A tiny torch pipeline with random weights, saved in `directory`; images are multiples of 16 pixels."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    config = dataclasses.replace(config, text_dim=24, in_channels=z_dim, out_channels=z_dim)
    # The published statistics where there are as many channels: no original file holds them.
    statistics = {}
    if z_dim != 16:
        statistics = {
            "latents_mean": [0.3, -0.2, 0.1, 0.0],
            "latents_std": [1.5, 0.7, 2.0, 1.0],
        }
    pipeline = diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4
            )
        ).eval(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=z_dim,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            scale_factor_spatial=4,
            **statistics,
        ).eval(),
        scheduler=scheduler or unipc_scheduler(),
        transformer=diffusers.WanTransformer3DModel(**dataclasses.asdict(config)).eval(),
    )
    for network in (pipeline.transformer, pipeline.vae):
        randomise(network)
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pipeline.save_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unipc_scheduler(shift: float = 3.0):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def euler_scheduler(shift: float = 5.0):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
