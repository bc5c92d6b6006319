"""Wan 2.1 as a model family: how its files are opened and what its layers are called."""

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
from marble_jax.families.model_index import component_class, name_without_owner
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.families.transformer_module import module_fields
from marble_jax.families.wan import layer_names, published, text
from marble_jax.families.wan.config import WanConfig
from marble_jax.families.wan.formats import WAN_FORMATS
from marble_jax.families.wan.index import check_index
from marble_jax.families.wan.levels import read_scheduler
from marble_jax.families.wan.networks import WanNetworks
from marble_jax.families.wan.sharding_rules import component_rules
from marble_jax.families.wan.transformer import WanTransformer, abstract_params
from marble_jax.networks import autoencoder_wan, umt5
from marble_jax.networks.autoencoder_wan import AutoencoderWan, load_wan_vae
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.storage.files import read_json

COMPONENTS = ("transformer", "vae", text.COMPONENT, text.TOKENIZER, "scheduler")


class WanFamily(Family):
    """Wan 2.1 for text to video and text to image."""

    name = "wan"
    pipeline_class = "WanPipeline"
    network_components = ("transformer", "vae", "scheduler")
    optional_text_encoders = ()
    published_models = tuple(published.MODELS)
    # Projections of both attentions.
    default_targets = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
    )
    tensor_parallel_modules = (
        r"attn[12]|ffn|proj_out|blocks?_all|condition_embedder|patch_embedding"
    )
    # Rotary tables are made where they are used.
    gathered_tables = "none"
    formats = WAN_FORMATS
    diffusers = DiffusersNames(
        pipeline="WanPipeline",
        transformer="WanTransformer3DModel",
        tag="wan",
        without_text=(text.COMPONENT, text.TOKENIZER),
        # [N, f, h, w, C] to [N, C, f, h, w].
        pack_latents=lambda latents: np.moveaxis(np.asarray(latents), -1, 1),
        conditioning={"embeds": "prompt_embeds"},
        num_frames="num_frames",
    )
    # Source: the example of diffusers' `WanPipeline`, and the models' own code.
    frames_per_second = 16

    def components(self, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """See `Family.components`; the text encoder cannot be left out."""
        return COMPONENTS

    def open(
        self,
        root: Path,
        options: NetworkOptions,
        place: Place | None = None,
        decoder_dtype: Any = jnp.float32,
    ) -> WanNetworks:
        """See `Family.open`."""
        file = root / "model_index.json"
        index = read_json(file)
        check_index(file, index)
        for name in COMPONENTS:
            if component_class(index, name) is None:
                raise InputError(f"{file}: expected a component {name!r}; received none")

        def put(component: str) -> Callable[[tuple[str, ...], Any], Any] | None:
            return None if place is None else functools.partial(place, component)

        # The cheap parts first: what is missing shows before gigabytes are read.
        text.check_encoder(root)
        scheduler = read_scheduler(root / "scheduler")
        transformer = layer_names.load_transformer(
            root / "transformer",
            options.dtype,
            put("transformer"),
            **module_fields(options),
        )
        vae = load_wan_vae(root / "vae", decoder_dtype, put("vae"))
        return WanNetworks(root, options, transformer, vae, scheduler)

    def outline(self, model: Path | str, options: NetworkOptions) -> WanNetworks:
        """See `Family.outline`."""
        directory: Path | None = None
        if isinstance(model, Path):
            directory = model
            file = model / "model_index.json"
            check_index(file, read_json(file))
            config = WanConfig.from_dict(read_json(model / "transformer" / "config.json"))
            vae = WanVAEConfig.from_dict(read_json(model / "vae" / "config.json"))
            scheduler = read_scheduler(model / "scheduler")
        else:
            config = published.MODELS[name_without_owner(model)]
            vae, scheduler = published.VAE, published.SCHEDULER
        transformer = WanTransformer(config, **module_fields(options))
        # Shapes in the dtypes that weights have in memory.
        shapes = abstract_params(transformer, jnp.dtype(options.dtype))
        autoencoder = AutoencoderWan(vae)
        decoder = (autoencoder, autoencoder_wan.abstract_params(autoencoder))
        return WanNetworks(directory, options, (transformer, shapes), decoder, scheduler)

    def num_encoder_parameters(self, model: Path | str, omit: Sequence[str] = ()) -> int:
        """See `Family.num_encoder_parameters`."""
        config = published.UMT5_XXL
        if isinstance(model, Path):
            config = umt5.UMT5Config.from_dict(read_json(model / text.COMPONENT / "config.json"))
        shapes = umt5.abstract_params(umt5.UMT5Encoder(config))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def default_sequence_length(self, root: Path) -> int:
        """Rows of text of a prompt, as many as the model was trained with, zeros beyond the prompt's end counted in."""
        return text.MAX_SEQUENCE_LENGTH

    def component_rules(self, component: str, head_width: int) -> ShardingRules:
        """See `Family.component_rules`."""
        return component_rules(component, head_width)

    def open_text_encoders(
        self,
        root: Path,
        dtype: Any,
        omit: Sequence[str] = (),
        place: Callable[[str], Any] = lambda component: None,
    ) -> text.WanTextEncoders:
        """See `Family.open_text_encoders`."""
        return text.load_text_encoders(root, dtype, place)

    def text_components(self, root: Path, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """See `Family.text_components`."""
        return text.COMPONENT, text.TOKENIZER

    def prompt_limits(
        self, root: Path, max_sequence_length: int, omit: Sequence[str] = ()
    ) -> tuple[PromptLimit, ...]:
        """See `Family.prompt_limits`."""
        return (text.prompt_limit(root, max_sequence_length),)

    def layers_at(self, path: tuple[str, ...], shape: tuple[int, ...]) -> list[Layer]:
        """See `Family.layers_at`."""
        return layer_names.layers_at(path, shape)


FAMILY = WanFamily()
