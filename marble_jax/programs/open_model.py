"""Opening the model of a run: its family, its networks on the devices of a mesh, its text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from marble_jax import distributed
from marble_jax.config import ModelSettings
from marble_jax.console import Console
from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError, one_of
from marble_jax.families.base import Family, Networks
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.families.embedding_cache import EmbeddingCache
from marble_jax.families.location import find_model
from marble_jax.families.registry import family_of, family_of_published
from marble_jax.networks import attention
from marble_jax.programs.locations import SHIPPED_SIZES, model_location, resolve_path
from marble_jax.storage.files import is_remote
from marble_jax.types import DTYPES

DECODED_AT_ONCE = 32
"""Frames that the autoencoder turns from latents to pixels together; its activations are large."""
SIZE_KEYS = ("model.height", "model.width", "model.num_frames")


def locate(settings: ModelSettings) -> tuple[Path, Family]:
    """Finds a run's model on this machine, downloading it where it is a hub id or in a bucket.

    Raises:
      InputError: no such model, one of no family, or a text encoder to leave out that the family needs.
    """
    path = model_location(settings.path)
    # The hub's index tells the family, and that tells which text encoders may be left out: checked after.
    root = find_model(path, settings.omit_text_encoders)
    family = family_of(root)
    check_omitted(family, settings.omit_text_encoders, "model.omit_text_encoders")
    return root, family


def check_omitted(family: Family, omit: Sequence[str], what: str) -> None:
    """Raises InputError for a text encoder that the family cannot do without."""
    for name in omit:
        if not family.optional_text_encoders:
            raise InputError(f"{what}: expected none for {family.name}; received {name!r}")
        one_of(what, name, family.optional_text_encoders)


def size_of(settings: ModelSettings) -> Size:
    """The size that a run draws at."""
    return Size(settings.height, settings.width, settings.num_frames)


def default_size(path: str, networks: Networks) -> Size:
    """The size that a model was made for, as far as it is known.

    Args:
      path: of the model, as settings have it.
      networks: of the model.
    """
    return SHIPPED_SIZES.get(path, networks.default_size)


def attention_of(name: str, dtype: str, mesh: Mesh | None) -> str | attention.FusedAttention:
    """The implementation of attention for batches that are split over a mesh."""
    if mesh is None:
        return name
    return attention.over(name, DTYPES[dtype], mesh)


def decode_size(count: int, mesh: Any, frames: int = 1, limit: int = DECODED_AT_ONCE) -> int:
    """Samples decoded at once, over all devices.

    Args:
      count: samples in a batch.
      mesh: the devices.
      frames: of a sample, as many as the decoder holds together.
      limit: frames that the decoder holds together at most.
    """
    shards = device_mesh.image_shards(mesh, count)
    # The same number on every device that holds samples, one at least.
    return min(count, shards * max(1, limit // frames // shards))


def stream_dtype_of(name: str) -> Any:
    """Dtype of the token streams by the name that `model.stream_dtype` has for it; None for that of products."""
    return None if name == "compute" else DTYPES[name]


def network_options(
    settings: ModelSettings, lora_scale: float, mesh: Mesh | None = None, gather: Any = None
) -> NetworkOptions:
    """How a run computes its transformer."""
    return NetworkOptions(
        dtype=DTYPES[settings.dtype],
        stream_dtype=stream_dtype_of(settings.stream_dtype),
        remat=settings.remat,
        unroll=settings.unroll,
        attention=attention_of(settings.attention, settings.dtype, mesh),
        gather=gather,
        lora_scale=lora_scale,
        embedded_guidance=settings.embedded_guidance or None,
    )


def open_networks(
    root: Path, family: Family, settings: ModelSettings, lora_scale: float, mesh: Mesh
) -> Networks:
    """Opens a run's networks, the transformer's weights laid out over the mesh.

    Raises:
      InputError: missing or malformed files, or a size, guidance scale or length that the model does not take.
    """
    # Shapes first: rules need the head's width.
    transformer = check_model(root, family, settings).sharding_rules

    def place(component: str, path: tuple[str, ...], leaf: Any) -> jax.Array:
        rules = family.component_rules(component, transformer.head_width)
        return device_mesh.read_sharded(rules.sharding_of(mesh, path, leaf.shape), leaf)

    options = network_options(settings, lora_scale, mesh, transformer.gather(mesh))
    return family.open(root, options, place)


def check_model(root: Path, family: Family, settings: ModelSettings) -> Networks:
    """Checks a run's settings against its model before gigabytes are read; returns the networks as shapes.

    Raises:
      InputError: missing or malformed config files, or a size, guidance scale or length that the model does not take.
    """
    outline = family.outline(root, NetworkOptions())
    _check_settings(outline, settings)
    return outline


def outline_networks(settings: ModelSettings, lora_scale: float) -> tuple[Family, Networks, Any]:
    """A run's networks as shapes, without weights or downloads.

    Returns:
      The family, its networks, and what `Family.outline` was given: a directory or a published name.

    Raises:
      InputError: neither a local directory with config files nor a published name; a size, guidance scale or length
        that does not fit.
    """
    if is_remote(settings.path):
        raise InputError(
            "model.path: expected a directory of this machine or a published name, as nothing is copied here (train "
            f"copies from buckets); received {settings.path}"
        )
    path = resolve_path(settings.path, "pipeline")
    model: Path | str
    if path.is_dir():
        model, family = path, family_of(path)
    else:
        model, family = settings.path, family_of_published(settings.path)
    networks = family.outline(model, network_options(settings, lora_scale))
    _check_settings(networks, settings)
    return family, networks, model


def _check_settings(networks: Networks, settings: ModelSettings) -> None:
    """Raises InputError for a size, a guidance scale or a length of prompts that a model does not take."""
    networks.check_size(size_of(settings), SIZE_KEYS)
    networks.check_guidance(settings.embedded_guidance or None, "model.embedded_guidance")
    networks.check_sequence_length(settings.max_sequence_length, "model.max_sequence_length")


def text_embeddings(
    root: Path, family: Family, settings: ModelSettings, folder: str, texts: Sequence[str]
) -> EmbeddingCache:
    """Conditioning of a run's texts. With a folder on disk all of them are there on return, and no encoder in memory.

    Args:
      root: directory of the model.
      family: of the model.
      settings: of the model.
      folder: on disk; empty: the text encoders stay in memory.
      texts: all prompts of the run; see `encode_ahead`.
    """

    def opened() -> EmbeddingCache:
        cache = EmbeddingCache(
            family,
            root,
            settings.max_sequence_length,
            DTYPES[settings.dtype],
            omit=settings.omit_text_encoders,
            folder=folder,
        )
        if not folder:
            # What is missing of the encoders shows now, not at the first rollout.
            cache.load()
        return cache

    cache = distributed.run_on_all("text encoders", opened)
    if folder:
        encode_ahead(cache, texts)
    return cache


def encode_ahead(cache: EmbeddingCache, texts: Sequence[str]) -> None:
    """Fills a cache on disk with the conditioning of texts, shared out to all processes.

    Where processes see one folder, every text is encoded once; where each has its own, the shares of the others follow
    on each of them.

    Args:
      cache: with a folder; on every process.
      texts: the same on every process.
    """
    different = list(dict.fromkeys(texts))
    console = Console()
    missing = len(cache.missing(different))
    if missing:
        count, whose = distributed.count(), ""
        if count > 1:
            whose = f", shared out to {count} processes"
        console.say(
            f"text embeddings: {missing} of {len(different)} prompts to encode into {cache.place}{whose}"
        )
    share = different[distributed.index() :: distributed.count()]
    with console.bar(missing, "text embeddings", "prompt") as bar:
        distributed.run_on_all("text embeddings", lambda: cache.fill(share, bar.update))
        if distributed.is_single_process():
            return
        cache.rescan()
        distributed.run_on_all("text embeddings", lambda: cache.fill(different, bar.update))
