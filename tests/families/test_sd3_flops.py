"""The analytic counts against XLA's cost analysis, where no loop hides work, and against hand-derived figures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from sd3_lora import LoraSpec, init_adapter

from marble_jax.families.sd3 import flops
from marble_jax.families.sd3.config import SD35_MEDIUM, MMDiTConfig
from marble_jax.families.sd3.transformer import MMDiT, abstract_params, velocity
from marble_jax.networks import autoencoder_flops, autoencoder_kl

# Every run has one block, so that XLA's analysis, which counts the body of a loop once, sees all of it.
UNSCANNED = MMDiTConfig(
    sample_size=32,
    num_layers=3,
    attention_head_dim=64,
    num_attention_heads=6,
    joint_attention_dim=512,
    caption_projection_dim=384,
    pooled_projection_dim=256,
    pos_embed_max_size=16,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
NUM, SIDE, TEXT = 2, 24, 40
QUICK = {"xla_backend_optimization_level": 0}


def shapes(config, spec):
    params = abstract_params(MMDiT(config))
    return params, jax.eval_shape(lambda: init_adapter(jax.random.key(0), params, spec))


@pytest.fixture(scope="module")
def unscanned():
    """(analytic work, XLA's FLOPs a sample of a function of the model's inputs)."""
    model = MMDiT(UNSCANNED, attention="einsum")
    params, adapter = shapes(UNSCANNED, LoraSpec(16, 16.0))
    struct = jax.ShapeDtypeStruct
    cond = {
        "embeds": struct((NUM, TEXT, UNSCANNED.joint_attention_dim), jnp.float32),
        "pooled": struct((NUM, UNSCANNED.pooled_projection_dim), jnp.float32),
    }
    xt, sigma = struct((NUM, SIDE, SIDE, 16), jnp.float32), struct((NUM,), jnp.float32)

    def forward(adapter, params, xt, sigma, cond):
        return velocity(model, params, adapter, xt, sigma, cond)

    def measured(f):
        compiled = (
            jax.jit(f).lower(adapter, params, xt, sigma, cond).compile(compiler_options=QUICK)
        )
        return compiled.cost_analysis()["flops"] / NUM

    return flops.transformer(UNSCANNED, params, adapter, (SIDE // 2) ** 2, TEXT), forward, measured


def test_forward_pass_against_xla(unscanned):
    work, forward, measured = unscanned
    assert measured(forward) == pytest.approx(work.forward, rel=0.03)


def test_gradient_of_the_adapter_against_xla(unscanned):
    work, forward, measured = unscanned
    found = measured(
        lambda adapter, *rest: jax.grad(lambda a: jnp.sum(forward(a, *rest) ** 2))(adapter)
    )
    assert found == pytest.approx(work.forward + work.backward, rel=0.03)


def test_decoder_against_xla():
    model = autoencoder_kl.AutoencoderKL(
        autoencoder_kl.VAEConfig(
            latent_channels=8,
            block_out_channels=(64, 128, 128),
            layers_per_block=1,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=True,
        )
    )
    params = autoencoder_kl.abstract_params(model)
    latents = jax.ShapeDtypeStruct((1, 16, 12, 8), jnp.float32)
    compiled = (
        jax.jit(lambda p, z: autoencoder_kl.decode(model, p, z))
        .lower(params, latents)
        .compile(compiler_options=QUICK)
    )
    # XLA does not count products with the zeros around an image: about 1/12 of a 3 x 3 window at a side of 16.
    assert compiled.cost_analysis()["flops"] == pytest.approx(
        autoencoder_flops.decoder(model.config, params, 16, 12), rel=0.1
    )


def test_sd35_medium_by_hand():
    """At 512 px with 205 text tokens, dense layers of both streams and attention, from the published widths."""
    params, adapter = shapes(SD35_MEDIUM, LoraSpec())
    work = flops.transformer(SD35_MEDIUM, params, adapter, 1024, 205)
    d, image, text = 1536, 1024, 205
    dense = (
        24 * 12 * image * d**2 + 13 * 4 * image * d**2 + 23 * 12 * text * d**2 + 2 * text * d**2
    )  # last: k and v
    attention = 23 * 2 * 1229**2 * d + 2 * image * 1229 * d + 13 * 2 * image**2 * d
    vector = d**2 * (24 * 6 + 13 * 3 + 23 * 6 + 2 + 2)
    ends = image * d * (64 + 64) + text * 4096 * d + d * (256 + d + 2048 + d)
    assert work.base == pytest.approx(2 * (dense + attention + vector + ends), rel=1e-9)
    low_rank = 2 * 2 * 32 * d * (24 * 4 * image + 23 * 4 * text + 2 * text)
    assert work.forward - work.base == pytest.approx(low_rank, rel=1e-9)
    assert (
        0.95 < work.backward / work.base < 1.15
    )  # a frozen base pays for one product backward, attention for two
