"""FLUX.1 as a model family: how its files are opened and what its layers are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.distributed.sharding import ShardingRules
from marble_jax.errors import InputError
from marble_jax.families.base import Family, Place
from marble_jax.families.descriptions import DiffusersNames, Layer, NetworkOptions
from marble_jax.families.flux1 import layer_names, published, text
from marble_jax.families.flux1.config import FluxConfig
from marble_jax.families.flux1.formats import FLUX1_FORMATS
from marble_jax.families.flux1.levels import read_scheduler
from marble_jax.families.flux1.networks import FluxNetworks
from marble_jax.families.flux1.packing import pack
from marble_jax.families.flux1.sharding_rules import component_rules
from marble_jax.families.flux1.transformer import FluxTransformer, abstract_params
from marble_jax.families.model_index import component_class, name_without_owner
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.families.transformer_module import module_fields, shapes_in
from marble_jax.networks import autoencoder_kl, clip, t5
from marble_jax.networks.autoencoder_kl import AutoencoderKL, VAEConfig, load_vae
from marble_jax.networks.tokenizers import max_length
from marble_jax.storage.files import read_json

COMPONENTS = ("transformer", "vae", *text.COMPONENTS, *text.TOKENIZERS, "scheduler")


class FluxFamily(Family):
    """FLUX.1 for text to image: dev, schnell and models of their kind."""

    name = "flux1"
    pipeline_class = "FluxPipeline"
    network_components = ("transformer", "vae", "scheduler")
    # The transformer takes no zeros for either.
    optional_text_encoders = ()
    published_models = tuple(published.MODELS)
    # Projections of attention; the single blocks' queries, keys and values go by the same names.
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
        r"attn|ff|ff_context|proj_mlp|proj_out|norm1|norm1_context|norm|norm_out|"
        r"time_text_embed|blocks?_(double|single)|\w+_embedder"
    )
    # Rotary tables are made where they are used.
    gathered_tables = "none"
    formats = FLUX1_FORMATS
    diffusers = DiffusersNames(
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        tag="flux",
        without_text=(*text.COMPONENTS, *text.TOKENIZERS),
        pack_latents=lambda latents: np.asarray(pack(latents)),
        conditioning={"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"},
    )

    def components(self, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """See `Family.components`; no text encoder can be left out."""
        return COMPONENTS

    def open(
        self,
        root: Path,
        options: NetworkOptions,
        place: Place | None = None,
        decoder_dtype: Any = jnp.float32,
    ) -> FluxNetworks:
        """See `Family.open`."""
        index = read_json(root / "model_index.json")
        for name in COMPONENTS:
            if component_class(index, name) is None:
                raise InputError(
                    f"{root / 'model_index.json'}: expected a component {name!r}; received none"
                )

        def put(component: str) -> Callable[[tuple[str, ...], Any], Any] | None:
            return None if place is None else functools.partial(place, component)

        # The cheap parts first: what is missing shows before gigabytes are read.
        text.check_encoders(root)
        scheduler = read_scheduler(root / "scheduler")
        transformer = layer_names.load_transformer(
            root / "transformer",
            options.dtype,
            put("transformer"),
            **module_fields(options, takes_guidance=True),
        )
        vae = load_vae(root / "vae", decoder_dtype, put("vae"))
        return FluxNetworks(root, options, transformer, vae, scheduler)

    def outline(self, model: Path | str, options: NetworkOptions) -> FluxNetworks:
        """See `Family.outline`."""
        if isinstance(model, Path):
            config = FluxConfig.from_dict(read_json(model / "transformer" / "config.json"))
            vae = VAEConfig.from_dict(read_json(model / "vae" / "config.json"))
            scheduler = read_scheduler(model / "scheduler")
            directory: Path | None = model
        else:
            config, scheduler = published.MODELS[name_without_owner(model)]
            vae, directory = published.VAE, None
        transformer = FluxTransformer(config, **module_fields(options, takes_guidance=True))
        autoencoder = AutoencoderKL(vae)
        shapes = shapes_in(abstract_params(transformer), options.dtype)
        decoder = (autoencoder, autoencoder_kl.abstract_params(autoencoder))
        return FluxNetworks(directory, options, (transformer, shapes), decoder, scheduler)

    def num_encoder_parameters(self, model: Path | str, omit: Sequence[str] = ()) -> int:
        """See `Family.num_encoder_parameters`."""
        first, second = published.CLIP_L, published.T5_XXL
        if isinstance(model, Path):
            configs = [read_json(model / name / "config.json") for name in text.COMPONENTS]
            first = clip.CLIPTextConfig.from_dict(configs[0])
            second = t5.T5Config.from_dict(configs[1])
        shapes = (
            clip.abstract_text_params(clip.CLIPTextEncoder(first, projected=False)),
            t5.abstract_params(t5.T5Encoder(second)),
        )
        count = 0
        for leaf in jax.tree.leaves(shapes):
            count += leaf.size
        return count

    def default_sequence_length(self, root: Path) -> int:
        """T5 tokens of a prompt: as many as diffusers takes, or fewer where the tokenizer says so."""
        file = root / text.TOKENIZERS[1] / "tokenizer_config.json"
        return min(
            max_length(read_json(file), text.MAX_SEQUENCE_LENGTH, file), text.MAX_SEQUENCE_LENGTH
        )

    def component_rules(self, component: str, head_width: int) -> ShardingRules:
        """See `Family.component_rules`."""
        return component_rules(component, head_width)

    def open_text_encoders(
        self,
        root: Path,
        dtype: Any,
        omit: Sequence[str] = (),
        place: Callable[[str], Any] = lambda component: None,
    ) -> text.FluxTextEncoders:
        """See `Family.open_text_encoders`."""
        return text.load_text_encoders(root, dtype, place)

    def text_components(self, root: Path, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """See `Family.text_components`."""
        return (*text.COMPONENTS, *text.TOKENIZERS)

    def prompt_limits(
        self, root: Path, max_sequence_length: int, omit: Sequence[str] = ()
    ) -> tuple[PromptLimit, ...]:
        """See `Family.prompt_limits`."""
        return text.prompt_limits(root, max_sequence_length)

    def layers_at(self, path: tuple[str, ...], shape: tuple[int, ...]) -> list[Layer]:
        """See `Family.layers_at`."""
        return layer_names.layers_at(path, shape)


FAMILY = FluxFamily()
