"""The shapes of a model without its weights: from the config files of a local directory, or from its published name.

Nothing is downloaded, so that a gated model can be planned for before one has access to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_collections

from marble_jax.errors import InputError, nearest
from marble_jax.families.sd3 import transformer as mmdit
from marble_jax.families.sd3.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from marble_jax.families.sd3.text import CLIP_LENGTH, clip_length, has_t5
from marble_jax.families.sd3.transformer import MMDiT
from marble_jax.networks import autoencoder_kl
from marble_jax.networks.autoencoder_kl import AutoencoderKL, VAEConfig
from marble_jax.networks.clip import CLIPTextConfig, CLIPTextEncoder, abstract_text_params
from marble_jax.networks.t5 import T5Config, T5Encoder
from marble_jax.networks.t5 import abstract_params as t5_params
from marble_jax.programs.build import DTYPES, lora_spec, place_of
from marble_jax.storage.files import read_json
from marble_jax.trainable import lora
from marble_jax.types import Adapter, Params

PUBLISHED = {
    "stable-diffusion-3.5-medium": SD35_MEDIUM,
    "stable-diffusion-3-medium-diffusers": SD3_MEDIUM,
    "stable-diffusion-3.5-large": SD35_LARGE,
    "stable-diffusion-3.5-large-turbo": SD35_LARGE,
}
# What the published SD3 models have in common; shared/reference and the converters of diffusers give the same values.
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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model as shapes.

    Attributes:
      model: the transformer, with the configuration's options.
      params: its parameters, as shapes in the dtype they have in memory.
      vae: the autoencoder.
      vae_params: its parameters, as shapes.
      encoder_parameters: numbers in the text encoders.
      adapter: the adapter, as shapes.
      shift: of the noise levels.
      latent: (h, w, C) of an image's latents.
      text_tokens: CLIP's and T5's.
    """

    model: MMDiT
    params: Params
    vae: AutoencoderKL
    vae_params: Params
    encoder_parameters: int
    adapter: Adapter
    shift: float
    latent: tuple[int, int, int]
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Image tokens of an image."""
        return self.latent[0] * self.latent[1] // self.model.config.patch_size**2


def architecture(config: ml_collections.ConfigDict) -> Architecture:
    """The shapes of `model.path`.

    Raises:
      InputError: neither a local directory with config files nor a published name; a resolution that does not fit.
    """
    transformer, autoencoder, texts, t5, clip_tokens, shift = _configs(config)
    dtype, spec = DTYPES[config.model.dtype], lora_spec(config)
    model = MMDiT(
        transformer,
        dtype=dtype,
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention=config.model.attention,
        lora_scale=spec.scale,
    )
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, dtype), mmdit.abstract_params(model)
    )
    decoder = AutoencoderKL(autoencoder)
    cell, patch = autoencoder.downsampling, transformer.patch_size
    largest = cell * patch * model.side
    for side, pixels in (("height", config.model.height), ("width", config.model.width)):
        if pixels % (cell * patch) or pixels > largest:
            best = min(max(round(pixels / (cell * patch)), 1) * cell * patch, largest)
            raise InputError(
                f"model.{side}: expected a multiple of {cell * patch} up to {largest}; received {pixels} "
                f"(nearest valid {best})"
            )
    encoders = [abstract_text_params(CLIPTextEncoder(c)) for c in texts]
    if t5 is not None and "text_encoder_3" not in config.model.omit_text_encoders:
        encoders.append(t5_params(T5Encoder(t5)))
    return Architecture(
        model,
        params,
        decoder,
        autoencoder_kl.abstract_params(decoder),
        sum(lora.num_parameters(e) for e in encoders),
        jax.eval_shape(lambda: lora.init_adapter(jax.random.key(0), params, spec)),
        shift,
        (config.model.height // cell, config.model.width // cell, transformer.in_channels),
        clip_tokens + config.model.max_sequence_length,
    )


def _configs(
    config: ml_collections.ConfigDict,
) -> tuple[MMDiTConfig, VAEConfig, list[CLIPTextConfig], T5Config | None, int, float]:
    path = place_of(config.model.path, "pipeline")
    if path.is_dir():

        def read(component: str, name: str = "config.json") -> dict[str, Any]:
            return read_json(path / component / name)

        return (
            MMDiTConfig.from_dict(read("transformer")),
            VAEConfig.from_dict(read("vae")),
            [CLIPTextConfig.from_dict(read(name)) for name in ("text_encoder", "text_encoder_2")],
            T5Config.from_dict(read("text_encoder_3")) if has_t5(path) else None,
            clip_length(path),
            read("scheduler", "scheduler_config.json").get("shift", 1.0),
        )
    name = str(config.model.path).rstrip("/").rpartition("/")[2]
    if name not in PUBLISHED:
        raise InputError(
            f"model.path: expected a local directory, 'embedded' or one of the published "
            f"{', '.join(PUBLISHED)}; received {str(config.model.path)!r}{nearest(name, PUBLISHED)}"
        )
    return PUBLISHED[name], VAE, [CLIP_L, CLIP_G], T5_XXL, CLIP_LENGTH, SHIFT
