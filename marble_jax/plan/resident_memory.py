"""What lies on a device while a program runs without being an argument of it, reckoned from shapes."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from marble_jax.config import Settings
from marble_jax.networks.quantized import MODEL_PRODUCTS
from marble_jax.plan.memory import (
    COPIED,
    FLOAT32,
    KEPT,
    NUM_MOMENTS,
    NUM_POLICIES,
    Source,
    adapter_bytes,
    history_adapters,
    weight_bytes,
)
from marble_jax.plan.model_shapes import ModelShapes
from marble_jax.plan.sample_memory import (
    kept_bytes,
    sampling_weight_bytes,
)
from marble_jax.trainable import lora
from marble_jax.types import DTYPES


def resident_sources(
    settings: Settings,
    shapes: ModelShapes,
    mesh: Mesh | AbstractMesh,
    program: str,
    devices_per_host: int = 1,
) -> list[Source]:
    """Returns what lies on a device while a program runs and is no argument of it, reward models apart.

    Args:
      settings: settings of the run.
      shapes: shapes of its model.
      mesh: its devices.
      program: a key of `program_sources`.
      devices_per_host: devices of one host, which share its text encoders.
    """
    if program == "rollout":
        resident = _beside_rollout(settings, shapes, mesh)
    elif program == "decode":
        resident = _beside_decode(settings, shapes, mesh)
    else:
        resident = {"VAE": _autoencoder_bytes(shapes)}
    if not settings.prompts.embedding_cache:
        itemsize = jnp.dtype(DTYPES[settings.model.dtype]).itemsize
        resident["text encoders"] = itemsize * shapes.encoder_parameters / devices_per_host
    sources = []
    for name, size in resident.items():
        if size:
            sources.append(Source(name, size, ""))
    return sources


def _beside_rollout(
    settings: Settings, shapes: ModelShapes, mesh: Mesh | AbstractMesh
) -> dict[str, float]:
    """Bytes beside the program that samples."""
    state = _state_bytes(settings, shapes)
    if not settings.rollout.merge_adapter:
        # The rollout policy, one adapter of the state, is an argument of the program.
        state -= adapter_bytes(shapes)
    beside = {
        "the rest of the state": state,
        "VAE": _autoencoder_bytes(shapes),
        # The last batch is drawn beside all others.
        KEPT: kept_bytes(settings, shapes, mesh, batches_left=1),
    }
    if _samples_from_copy(settings):
        # The program's weights are that copy; those that it was made of stay for training.
        beside[COPIED] = weight_bytes(shapes, mesh)
    return beside


def _beside_decode(
    settings: Settings, shapes: ModelShapes, mesh: Mesh | AbstractMesh
) -> dict[str, float]:
    """Bytes beside the program that decodes."""
    weights, name = weight_bytes(shapes, mesh), "transformer"
    if _samples_from_copy(settings):
        weights, name = weights + sampling_weight_bytes(settings, shapes, weights), COPIED
    return {
        "the rest of the state": _state_bytes(settings, shapes),
        name: weights,
        KEPT: kept_bytes(settings, shapes, mesh, batches_left=0),
    }


def _samples_from_copy(settings: Settings) -> bool:
    """Whether rollouts have weights of their own, with the adapter folded in or of eight bits."""
    rollout = settings.rollout
    return rollout.merge_adapter or rollout.products != MODEL_PRODUCTS


def _state_bytes(settings: Settings, shapes: ModelShapes) -> float:
    """Bytes of the training state: the adapters of all policies, AdamW's moments, and the history."""
    num_adapters = NUM_POLICIES + NUM_MOMENTS + history_adapters(settings)
    return num_adapters * adapter_bytes(shapes)


def _autoencoder_bytes(shapes: ModelShapes) -> float:
    """Bytes of the whole autoencoder, in float32."""
    return FLOAT32 * lora.num_parameters(shapes.networks.decoder_params)
