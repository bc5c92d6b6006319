"""The published Wan 2.1 text-to-video models as shapes, so that one can be planned for before it is downloaded.

Source: Wan-Video/Wan2.1 `wan/configs`; the defaults of diffusers 0.42 `AutoencoderKLWan`.
"""

from __future__ import annotations

from marble_jax.families.wan.config import WAN21_1_3B, WAN21_14B
from marble_jax.families.wan.levels import SchedulerConfig
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.networks.umt5 import UMT5Config

MODELS = {
    "Wan2.1-T2V-1.3B-Diffusers": WAN21_1_3B,
    "Wan2.1-T2V-14B-Diffusers": WAN21_14B,
    "Wan2.1-T2V-1.3B": WAN21_1_3B,
    "Wan2.1-T2V-14B": WAN21_14B,
}
"""Architecture of the transformer by the model's name on the Hub, in diffusers' layout and in the original one."""

# What all have in common.
VAE = WanVAEConfig()
SCHEDULER = SchedulerConfig()
UMT5_XXL = UMT5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
)
