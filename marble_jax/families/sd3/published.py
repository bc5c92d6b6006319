"""The published SD3 models as shapes, so that a gated model can be planned for before one has access to it.

Source: the config.json files of stabilityai/stable-diffusion-3-medium-diffusers, -3.5-medium and -3.5-large, and
diffusers' conversion scripts.
"""

from __future__ import annotations

from marble_jax.families.sd3.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from marble_jax.networks.autoencoder_kl import VAEConfig
from marble_jax.networks.clip import CLIPTextConfig
from marble_jax.networks.t5 import T5Config

TRANSFORMERS = {
    "stable-diffusion-3.5-medium": SD35_MEDIUM,
    "stable-diffusion-3-medium-diffusers": SD3_MEDIUM,
    "stable-diffusion-3.5-large": SD35_LARGE,
    "stable-diffusion-3.5-large-turbo": SD35_LARGE,
}
"""Architecture of the transformer by the model's name on the Hub."""

# What all of them have in common.
VAE = VAEConfig(
    latent_channels=16,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12
)
CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
)
T5_XXL = T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
SHIFT = 3.0
