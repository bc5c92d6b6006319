"""Tiny FLUX.1 transformers with random weights, in diffusers and here, and what their tests compare with."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny_tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer
from transformer_checks import random_leaves

from marble_jax.families.flux1.config import FluxConfig
from marble_jax.families.flux1.family import FAMILY
from marble_jax.families.flux1.packing import pack, unpack
from marble_jax.trainable import lora

DEV = FluxConfig(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=10, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
SCHNELL = dataclasses.replace(DEV, guidance_embeds=False)
GUIDANCE = 3.5
SPEC = lora.LoraSpec(3, 6.0, FAMILY.default_targets)
SIZES = ((4, 6), (8, 2), (6, 6))
"""Latent sides; two of the three are not square."""


def guidance_of(config: FluxConfig) -> float | None:
    return GUIDANCE if config.guidance_embeds else None


def randomise(module) -> None:
    """Every tensor random, norm weights around one, so that no bias or scale can hide."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            centre = 1.0 if ".norm_" in name and tensor.ndim == 1 and "linear" not in name else 0.0
            spread = 0.3 if tensor.ndim == 1 else 1.0 / math.sqrt(tensor[0].numel())
            tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))


def reference(config: FluxConfig, path=None):
    """A diffusers transformer with random weights, saved under `path`."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(**dataclasses.asdict(config)).eval()
    randomise(model)
    if path is not None:
        model.save_pretrained(path)
    return model


def inputs(config: FluxConfig, height: int = 4, width: int = 6, num: int = 2, tokens: int = 5):
    """Latents, noise levels and conditioning."""
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    cond = {
        "embeds": draw(num, tokens, config.joint_attention_dim),
        "pooled": draw(num, config.pooled_projection_dim),
    }
    sigma = np.asarray([0.913349, 0.0089286][:num], np.float32)
    return draw(num, height, width, config.latent_channels), sigma, cond


def token_ids(rows: int, columns: int) -> np.ndarray:
    """Coordinates (0, row, column) of image tokens, written out one by one."""
    return np.asarray(
        [(0, row, column) for row in range(rows) for column in range(columns)], np.float32
    )


def torch_velocity(model, xt, sigma, cond, dtype=None, guidance=GUIDANCE):
    """Velocity of a diffusers transformer, as its pipeline calls it."""
    torch = pytest.importorskip("torch")
    dtype = dtype or torch.float32
    num, height, width, _ = xt.shape
    scales = None
    if model.config.guidance_embeds:
        scales = torch.full((num,), guidance, dtype=torch.float32)
    with torch.no_grad():
        tokens = model(
            hidden_states=torch.from_numpy(np.ascontiguousarray(pack(xt))).to(dtype),
            timestep=torch.from_numpy(sigma),
            guidance=scales,
            pooled_projections=torch.from_numpy(cond["pooled"]).to(dtype),
            encoder_hidden_states=torch.from_numpy(cond["embeds"]).to(dtype),
            txt_ids=torch.zeros(cond["embeds"].shape[1], 3),
            img_ids=torch.from_numpy(token_ids(height // 2, width // 2)),
            return_dict=False,
        )[0]
    return unpack(tokens.float().numpy(), height, width)


def random_adapter(params, spec=SPEC, seed: int = 0):
    return random_leaves(
        lambda: lora.init_adapter(jax.random.key(0), FAMILY.layers_at, params, spec), seed
    )


def build_pipeline(directory, guidance_embeds: bool = True):
    """A tiny torch pipeline with random weights, saved in `directory`; images are multiples of four pixels."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    directory.parent.mkdir(parents=True, exist_ok=True)
    first = clip_tokenizer(directory.parent / f"{directory.name}_clip", "<|endoftext|>")
    second = t5_tokenizer()
    config = dataclasses.replace(
        DEV, joint_attention_dim=32, pooled_projection_dim=12, guidance_embeds=guidance_embeds
    )
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {}
    pipeline = diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(**dataclasses.asdict(config)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(first),
                hidden_size=12,
                intermediate_size=24,
                # Another width than the pooled output's, which a projection would show.
                projection_dim=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=CLIP_LENGTH,
                bos_token_id=first.bos_token_id,
                eos_token_id=first.eos_token_id,
                pad_token_id=first.pad_token_id,
            )
        ),
        tokenizer=first,
        text_encoder_2=transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(second),
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=second,
    )
    randomise(pipeline.transformer)
    networks = (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    with torch.no_grad():
        for parameter in (p for network in networks for p in network.eval().parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline.save_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
