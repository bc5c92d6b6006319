"""Memory of a device for the samples of a step: their latents, their decoder, and clips that it makes of them."""

from __future__ import annotations

import math
from functools import partial

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from marble_jax.config import Settings
from marble_jax.distributed import device_mesh
from marble_jax.networks.quantized import MODEL_PRODUCTS, quantize_blocks
from marble_jax.plan.model_shapes import ModelShapes
from marble_jax.programs.open_model import decode_size
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import Sizes, kept_shape
from marble_jax.training.latent_layout import is_split
from marble_jax.types import Params

DECODER_ARRAYS = 4  # of the decoder's largest activation
FLOAT32 = 4  # bytes
CHANNELS = 3  # of a pixel


def quantized_shapes(settings: Settings, params: Params) -> Params | None:
    """Returns the shapes of weights of eight bits that rollouts are drawn with; None where they have the model's own.

    Only weights that every device holds whole can be quantised, so these are whole, too.
    """
    products = settings.rollout.products
    if products == MODEL_PRODUCTS:
        return None
    return jax.eval_shape(partial(quantize_blocks, kind=products), params)


def sampling_weight_bytes(settings: Settings, shapes: ModelShapes, whole: float) -> float:
    """Returns bytes of the weights that rollouts are drawn with, `whole` in the model's own dtype."""
    narrow = quantized_shapes(settings, shapes.networks.params)
    if narrow is None:
        return whole
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(narrow)))


def latent_bytes(
    settings: Settings, shapes: ModelShapes, sizes: Sizes, mesh: Mesh | AbstractMesh
) -> tuple[float, str]:
    """Returns bytes of the latents that a train step is given, with the copies it makes, and what they are."""
    images = sizes.images
    kept = kept_shape(settings.rollout, shapes.latent)
    latent = FLOAT32 * math.prod(kept)
    what = "latents"
    if kept != shapes.latent:
        what = f"latents at {kept[0]} levels"
    share = NamedSharding(mesh, device_mesh.BATCH).shard_shape((images,))[0]
    if is_split(images, kept, mesh):
        # Every device takes a whole micro-batch from all others before it keeps its own part.
        micro_batch = settings.training.micro_batch_size
        note = f"the device's own {what}, those of a micro-batch, and conditioning of the prompts"
        return (share + micro_batch) * latent, note
    # Every device holds all latents, and copies its own into training order.
    note = f"all {what} and conditioning of the prompts, and the device's own in training order"
    return (images + share) * latent, note


def kept_bytes(
    settings: Settings, shapes: ModelShapes, mesh: Mesh | AbstractMesh, batches_left: int
) -> float:
    """Returns bytes on a device of what the rollouts of a step have kept to train on, while some batches are left."""
    rollout = settings.rollout
    images = rollout.prompts_per_step * rollout.images_per_prompt
    kept = kept_shape(rollout, shapes.latent)
    count = images - batches_left * rollout.batch_size
    if is_split(images, kept, mesh):
        count //= device_mesh.batch_shards(mesh)
    return FLOAT32 * float(count * math.prod(kept))


def sampled_bytes(settings: Settings, shapes: ModelShapes, count: int) -> tuple[float, str]:
    """Returns bytes of `count` samples that a rollout draws and of what it keeps of them, and what they are."""
    latents = FLOAT32 * count * math.prod(shapes.latent)
    kept = kept_shape(settings.rollout, shapes.latent)
    if kept == shapes.latent:
        return latents, "conditioning and latents of a batch"
    # Written step by step, then handed out sample by sample.
    states = 2 * FLOAT32 * count * math.prod(kept)
    note = f"conditioning and latents of a batch, twice those at {kept[0]} levels"
    return latents + states, note


def decoder_bytes(
    settings: Settings, shapes: ModelShapes, mesh: Mesh | AbstractMesh
) -> tuple[float, str]:
    """Returns bytes of the decoder's weights and activations, and of clips that they make; and what they are."""
    batch, size, networks = settings.rollout.batch_size, shapes.size, shapes.networks
    # The autoencoder takes a few samples at a time, over all axes of the mesh.
    frames = networks.frames_decoded_at_once(size.num_frames)
    shards = device_mesh.image_shards(mesh, batch)
    count = decode_size(batch, mesh, frames) // shards
    pixels = size.height * size.width
    activations = DECODER_ARRAYS * count * frames * pixels * networks.largest_activation * FLOAT32
    weights = FLOAT32 * lora.num_parameters(networks.decoder_only_params)
    if size.num_frames == 1:
        note = f"weights and activations of {count} images, float32"
        return weights + activations, note
    # The parts of the batch, and the whole that they are put together to.
    share = batch // shards
    clips = 2 * share * size.num_frames * pixels * CHANNELS * FLOAT32
    note = (
        f"weights, activations of {count} clips at {frames} frames, and {share} decoded clips twice, "
        "float32"
    )
    return weights + activations + clips, note
