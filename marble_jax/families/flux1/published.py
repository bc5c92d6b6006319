"""The published FLUX.1 models as shapes, so that a gated model can be planned for before one has access to it.

Source: the config.json files of black-forest-labs/FLUX.1-dev and -schnell, and diffusers' conversion scripts.
"""

from __future__ import annotations

from marble_jax.families.flux1.config import FLUX1_DEV, FLUX1_SCHNELL
from marble_jax.families.flux1.levels import DEV_SCHEDULER, SCHNELL_SCHEDULER
from marble_jax.networks.autoencoder_kl import VAEConfig
from marble_jax.networks.clip import CLIPTextConfig
from marble_jax.networks.t5 import T5Config

MODELS = {
    "FLUX.1-dev": (FLUX1_DEV, DEV_SCHEDULER),
    "FLUX.1-schnell": (FLUX1_SCHNELL, SCHNELL_SCHEDULER),
}
"""Architecture of the transformer and scheduler settings by the model's name on the Hub."""

# What both have in common.
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
"""Of the autoencoder; no tensor shows them."""
VAE = VAEConfig(
    latent_channels=16,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    scaling_factor=SCALING_FACTOR,
    shift_factor=SHIFT_FACTOR,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12
)
T5_XXL = T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
