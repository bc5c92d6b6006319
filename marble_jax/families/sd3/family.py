"""Stable Diffusion 3 and 3.5 as a model family: how its files are opened and what its layers are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.distributed.sharding import ShardingRules
from marble_jax.errors import InputError
from marble_jax.families.base import Family, Place
from marble_jax.families.descriptions import DiffusersNames, Layer, Licence, NetworkOptions
from marble_jax.families.model_index import component_class, name_without_owner
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.families.scheduler import SchedulerConfig, read_scheduler
from marble_jax.families.sd3 import layer_names, published, text
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.families.sd3.networks import SD3Networks
from marble_jax.families.sd3.sharding_rules import component_rules
from marble_jax.families.sd3.transformer import MMDiT, abstract_params
from marble_jax.families.transformer_module import module_fields, shapes_in
from marble_jax.networks import autoencoder_kl, clip, t5
from marble_jax.networks.autoencoder_kl import AutoencoderKL, VAEConfig, load_vae
from marble_jax.networks.tokenizers import max_length
from marble_jax.storage.files import read_json

REQUIRED = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
OPTIONAL = ("text_encoder_3", "tokenizer_3")
DEFAULT_SEQUENCE_LENGTH = 256
"""T5 tokens of diffusers' pipeline."""


class SD3Family(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    network_components = ("transformer", "vae", "scheduler")
    optional_text_encoders = (text.T5,)
    published_models = tuple(published.TRANSFORMERS)
    # The joint attention's eight projections; the image-only attn2 of SD3.5-medium's dual blocks is not among them.
    default_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    tensor_parallel_modules = (
        r"attn2?|ff|ff_context|norm1|norm1_context|norm_out|"
        r"time_text_embed|blocks?_\d+|\w+_embedder"
    )
    gathered_tables = "pos_embed"
    formats = SD3_FORMATS
    diffusers = DiffusersNames(
        pipeline="StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        tag="stable-diffusion-3",
        without_text=(*text.COMPONENTS, *text.TOKENIZERS),
        # Channels first.
        pack_latents=lambda latents: latents.transpose(0, 3, 1, 2),
        conditioning={"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"},
        licence=Licence(
            owner="stabilityai",
            name="stabilityai-ai-community",
            file="LICENSE.md",
            sentence="Derived from a Stability AI model: the Stability AI Community License of {base} applies to this "
            "adapter and to what is made with it.",
        ),
    )

    def components(self, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """See `Family.components`."""
        return REQUIRED if text.T5 in omit else REQUIRED + OPTIONAL

    def open(
        self,
        root: Path,
        options: NetworkOptions,
        place: Place | None = None,
        decoder_dtype: Any = jnp.float32,
    ) -> SD3Networks:
        """See `Family.open`."""
        index = read_json(root / "model_index.json")
        for name in REQUIRED:
            if component_class(index, name) is None:
                raise InputError(
                    f"{root / 'model_index.json'}: expected a component {name!r}; received none"
                )

        def put(component: str) -> Callable[[tuple[str, ...], Any], Any] | None:
            return None if place is None else functools.partial(place, component)

        # The cheap parts first: what is missing shows before gigabytes are read.
        scheduler = read_scheduler(root / "scheduler")
        num_clip_tokens = text.clip_length(root)
        transformer = layer_names.load_mmdit(
            root / "transformer",
            options.dtype,
            put("transformer"),
            **module_fields(options),
        )
        vae = load_vae(root / "vae", decoder_dtype, put("vae"))
        return SD3Networks(root, options, transformer, vae, scheduler, num_clip_tokens)

    def outline(self, model: Path | str, options: NetworkOptions) -> SD3Networks:
        """See `Family.outline`."""
        if isinstance(model, Path):
            transformer = MMDiTConfig.from_dict(read_json(model / "transformer" / "config.json"))
            vae = VAEConfig.from_dict(read_json(model / "vae" / "config.json"))
            scheduler = read_scheduler(model / "scheduler")
            num_clip_tokens = text.clip_length(model)
            directory: Path | None = model
        else:
            transformer = published.TRANSFORMERS[name_without_owner(model)]
            vae, scheduler = published.VAE, SchedulerConfig(published.SHIFT)
            num_clip_tokens, directory = text.CLIP_LENGTH, None
        mmdit = MMDiT(transformer, **module_fields(options))
        autoencoder = AutoencoderKL(vae)
        return SD3Networks(
            directory,
            options,
            (mmdit, shapes_in(abstract_params(mmdit), options.dtype)),
            (autoencoder, autoencoder_kl.abstract_params(autoencoder)),
            scheduler,
            num_clip_tokens,
        )

    def num_encoder_parameters(self, model: Path | str, omit: Sequence[str] = ()) -> int:
        """See `Family.num_encoder_parameters`."""
        clips, third = _encoder_configs(model)
        shapes = [clip.abstract_text_params(clip.CLIPTextEncoder(config)) for config in clips]
        if third is not None and text.T5 not in omit:
            shapes.append(t5.abstract_params(t5.T5Encoder(third)))
        count = 0
        for leaf in jax.tree.leaves(shapes):
            count += leaf.size
        return count

    def default_sequence_length(self, root: Path) -> int:
        """T5 tokens of a prompt: as many as diffusers takes, or fewer where the tokenizer says so."""
        file = root / text.TOKENIZERS[2] / "tokenizer_config.json"
        # Without T5 its tokens are zeros, and as many.
        if not file.exists():
            return DEFAULT_SEQUENCE_LENGTH
        known = max_length(read_json(file), DEFAULT_SEQUENCE_LENGTH, file)
        return min(known, DEFAULT_SEQUENCE_LENGTH)

    def component_rules(self, component: str, head_width: int) -> ShardingRules:
        """See `Family.component_rules`."""
        return component_rules(component, head_width)

    def open_text_encoders(
        self,
        root: Path,
        dtype: Any,
        omit: Sequence[str] = (),
        place: Callable[[str], Any] = lambda component: None,
    ) -> text.SD3TextEncoders:
        """See `Family.open_text_encoders`."""
        return text.load_text_encoders(root, dtype, omit, place)

    def text_components(self, root: Path, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """See `Family.text_components`."""
        encoders = text.encoders_present(root, omit)
        return (*encoders, *text.TOKENIZERS[: len(encoders)])

    def prompt_limits(
        self, root: Path, max_sequence_length: int, omit: Sequence[str] = ()
    ) -> tuple[PromptLimit, ...]:
        """See `Family.prompt_limits`."""
        return text.prompt_limits(root, max_sequence_length, omit)

    def layers_at(self, path: tuple[str, ...], shape: tuple[int, ...]) -> list[Layer]:
        """See `Family.layers_at`."""
        return layer_names.layers_at(path, shape)


def _encoder_configs(
    model: Path | str,
) -> tuple[list[clip.CLIPTextConfig], t5.T5Config | None]:
    """Configs of a model's two CLIP text encoders and of T5, None without one."""
    if not isinstance(model, Path):
        return [published.CLIP_L, published.CLIP_G], published.T5_XXL
    clips = []
    for name in text.COMPONENTS[:2]:
        clips.append(clip.CLIPTextConfig.from_dict(read_json(model / name / "config.json")))
    if not text.has_t5(model):
        return clips, None
    return clips, t5.T5Config.from_dict(read_json(model / text.T5 / "config.json"))


FAMILY = SD3Family()
