"""Memory of a device by source, for each program of a run, reckoned from shapes.

What is passed to a program (weights, adapters, optimiser, rollouts) is exact. What lives while it runs is a model of
what XLA keeps: the inputs of the blocks that rematerialisation starts from, the widest block's intermediates (counted
in arrays of one token stream), attention's scores, the sums of gradients. The counts below were read off the buffer
assignment of XLA:TPU (libtpu 0.0.51, jax 0.10.2) for SD3.5-medium; `--topology` compiles and compares.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from marble_jax.config import Settings
from marble_jax.distributed import device_mesh
from marble_jax.plan.model_shapes import ModelShapes
from marble_jax.programs.open_model import decode_size
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import Sizes, chunk_size
from marble_jax.types import DTYPES

NUM_POLICIES = 4  # current, rollout, averaged and best adapter
NUM_MOMENTS = 2  # of AdamW
BLOCK_ARRAYS = 28  # arrays [tokens, width] of a block's backward pass that are alive at once
FORWARD_ARRAYS = 6  # the same of a forward pass
KEPT_ARRAYS = 34  # arrays a block keeps for its backward pass without rematerialisation
DOTS_ARRAYS = 9  # arrays of both streams that a block keeps under remat=dots
SECOND_DOTS_ARRAYS = 4  # arrays of the image tokens that a second attention keeps under remat=dots
SUMS_HELD = 3  # sums of gradients alive at once: of the loop, of its body, and of the loop before
SPLASH_ARRAYS = 13  # arrays [tokens, width] around the TPU's fused kernel: padded to blocks and lanes, statistics
DECODER_ARRAYS = 4  # of the decoder's largest activation
LANES = 128  # a TPU pads the last axis of an array to this
FLOAT32 = 4  # bytes

BASE, ADAPTERS, OPTIMISER, ROLLOUTS = (
    "base weights",
    "adapters x policies",
    "optimiser",
    "rollouts of the step",
)
SUMS, SAMPLES, SAVED, BLOCK, DECODER = (
    "accumulators",
    "per-sample gradients",
    "saved activations",
    "block working set",
    "autoencoder",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Bytes of one source on one device, and what they are."""

    name: str
    bytes: float
    note: str


def weight_bytes(shapes: ModelShapes, mesh: Mesh | AbstractMesh) -> float:
    """Bytes of the base weights on a device."""
    networks = shapes.networks
    return networks.sharding_rules.layout(mesh, networks.params).device


def program_sources(
    settings: Settings,
    shapes: ModelShapes,
    sizes: Sizes,
    mesh: Mesh | AbstractMesh,
    pad: int = LANES,
) -> dict[str, list[Source]]:
    """Sources of every program, under the names of `aot.jobs`.

    Args:
      settings: of the run.
      shapes: of its model.
      sizes: its batch arithmetic.
      mesh: its devices.
      pad: what the last axis of attention's scores is padded to.
    """
    model = MemoryModel(settings, shapes, sizes, mesh, pad)
    sources = {
        "rollout": model.rollout_program(),
        "decode": [model.decoder()],
        "train, solving": [*model.state(), model.rollouts(), *model.solving()],
    }
    if settings.harmonize.mode != "exact":
        sources["train, between"] = [*model.state(), model.rollouts(), *model.between()]
    return sources


def resident_sources(
    settings: Settings,
    shapes: ModelShapes,
    mesh: Mesh | AbstractMesh,
    program: str,
    devices_per_host: int = 1,
) -> list[Source]:
    """What lies on a device while a program runs and is no argument of it, reward models apart.

    Args:
      settings: of the run.
      shapes: of its model.
      mesh: its devices.
      program: a key of `program_sources`.
      devices_per_host: devices of one host, which share its text encoders.
    """
    adapter = FLOAT32 * lora.num_parameters(shapes.adapter)
    weights = weight_bytes(shapes, mesh)
    merged = settings.rollout.merge_adapter
    state = (NUM_POLICIES + NUM_MOMENTS) * adapter
    autoencoder = FLOAT32 * lora.num_parameters(shapes.networks.decoder_params)
    transformer = "transformer, and the merged copy" if merged else "transformer"
    resident: dict[str, float] = {}
    if program == "rollout":
        # The rollout policy is an argument, unless it is folded into a copy of the weights.
        resident["the rest of the state"] = state if merged else state - adapter
        resident[transformer] = weights if merged else 0
        resident["VAE"] = autoencoder
    elif program == "decode":
        resident["the rest of the state"] = state
        resident[transformer] = (1 + merged) * weights
    else:
        resident["VAE"] = autoencoder
    if not settings.prompts.embedding_cache:
        size = jnp.dtype(DTYPES[settings.model.dtype]).itemsize
        resident["text encoders"] = size * shapes.encoder_parameters / devices_per_host
    return [Source(name, size, "") for name, size in resident.items() if size]


class MemoryModel:
    """Sizes that several programs share, in bytes on a device; arguments as in `program_sources`."""

    def __init__(
        self,
        settings: Settings,
        shapes: ModelShapes,
        sizes: Sizes,
        mesh: Mesh | AbstractMesh,
        pad: int,
    ):
        self.settings, self.shapes, self.sizes, self.mesh = settings, shapes, sizes, mesh
        self.transformer, self.pad = shapes.transformer, pad
        self.itemsize = jnp.dtype(DTYPES[settings.model.dtype]).itemsize
        self.adapter = FLOAT32 * lora.num_parameters(shapes.adapter)
        self.latent = FLOAT32 * math.prod(shapes.latent)
        self.cond = self.itemsize * self.transformer.conditioning_size
        scalarized = settings.advantages.scalarize != "none"
        self.num_objectives = len(settings.rewards.train) + scalarized
        self.tokens = self.transformer.tokens + self.transformer.text_tokens
        # One array of both token streams, of one sample.
        self.stream = self.tokens * self.transformer.width * self.itemsize
        self.image_stream = self.transformer.tokens * self.transformer.width * self.itemsize

    def share(self, count: int) -> int:
        """Samples of `count` on one device."""
        return NamedSharding(self.mesh, device_mesh.BATCH).shard_shape((count,))[0]

    def scores(self, tokens: int, itemsize: int) -> float:
        """Attention's scores of one sample over `tokens`, numbers of `itemsize` bytes; a fused kernel has none."""
        attention = self.settings.model.attention
        if attention == "cudnn":
            return 0.0
        if attention == "splash":
            # The kernel's own buffers, counted once: with the scores in float32.
            if itemsize != FLOAT32:
                return 0.0
            return SPLASH_ARRAYS * tokens * self.transformer.width * self.itemsize
        padded = -(-tokens // self.pad) * self.pad
        return self.transformer.num_heads * tokens * padded * itemsize

    def forward(self, count: int) -> float:
        """A block's forward pass of `count` samples."""
        return count * (self.scores(self.tokens, FLOAT32) + FORWARD_ARRAYS * self.stream)

    def backward(self, count: int, cotangents: int = 1) -> float:
        """A block's backward pass of `count` samples with `cotangents` for each."""
        kept_scores = self.scores(self.tokens, self.itemsize)
        if self.transformer.num_second_attentions:
            kept_scores += self.scores(self.transformer.tokens, self.itemsize)
        each = self.scores(self.tokens, FLOAT32) + BLOCK_ARRAYS * self.stream
        return count * (kept_scores + cotangents * each)

    def saved(self, count: int) -> Source:
        """What all blocks keep for the backward pass of `count` samples."""
        layers = self.transformer.num_layers
        second = self.transformer.num_second_attentions
        inputs = layers * self.stream
        if self.settings.model.remat == "full":
            return Source(SAVED, count * inputs, f"inputs of {layers} blocks")
        if self.settings.model.remat == "dots":
            products = DOTS_ARRAYS * layers * self.stream
            products += SECOND_DOTS_ARRAYS * second * self.image_stream
            return Source(SAVED, count * (inputs + products), "products with weights")
        # Softmax keeps its scores in float32 and in the compute dtype.
        joint = self.scores(self.tokens, FLOAT32) + self.scores(self.tokens, self.itemsize)
        image_tokens = self.transformer.tokens
        image = self.scores(image_tokens, FLOAT32) + self.scores(image_tokens, self.itemsize)
        kept = layers * joint + second * image + KEPT_ARRAYS * inputs
        return Source(SAVED, count * kept, "everything (model.remat=none)")

    def base(self) -> Source:
        """Base weights, with how they lie."""
        params = self.shapes.networks.params
        dtype = jax.tree.leaves(params)[0].dtype
        described = self.shapes.networks.sharding_rules.describe(self.mesh, params)
        return Source(BASE, weight_bytes(self.shapes, self.mesh), f"{dtype}, {described}")

    def state(self) -> list[Source]:
        """What a train step is given besides rollouts."""
        megabytes = self.adapter / 1e6
        adapters = f"{NUM_POLICIES} x {megabytes:.0f} MB float32"
        return [
            self.base(),
            Source(ADAPTERS, NUM_POLICIES * self.adapter, adapters),
            Source(OPTIMISER, NUM_MOMENTS * self.adapter, "AdamW's moments, float32"),
        ]

    def rollout_program(self) -> list[Source]:
        """Sources of the program that samples a batch."""
        rollout = self.settings.rollout
        count = self.share(rollout.batch_size)
        policy = 0 if rollout.merge_adapter else self.adapter
        batch = count * (self.cond + self.latent)
        return [
            self.base(),
            Source(ADAPTERS, policy, "the rollout policy"),
            Source(ROLLOUTS, batch, "conditioning and latents of a batch"),
            Source(BLOCK, self.forward(count), "one block, forward"),
        ]

    def rollouts(self) -> Source:
        """What the rollouts hand to training, and the copies of it that training makes."""
        images = self.sizes.images
        latents = (images + self.share(images)) * self.latent
        conditioning = 2 * self.settings.rollout.prompts_per_step * self.cond
        note = (
            "all latents and conditioning of the prompts, and the device's own in training order"
        )
        return Source(ROLLOUTS, latents + conditioning, note)

    def between(self) -> list[Source]:
        """Sources of a train step that reuses alpha, besides what it is given."""
        count = self.share(self.settings.training.micro_batch_size)
        return [
            Source(SUMS, 2 * self.adapter, "one gradient and its sum"),
            self.saved(count),
            Source(BLOCK, self.backward(count), f"{count} samples, backward"),
        ]

    def solving(self) -> list[Source]:
        """Sources of a train step that takes every reward's gradient, besides what it is given."""
        shards = device_mesh.batch_shards(self.mesh)
        chunk = self.share(chunk_size(self.settings.training, self.settings.harmonize, shards))
        directions = 2 + (self.settings.nft.kl_weight > 0)
        micro_batch = self.share(self.settings.training.micro_batch_size)
        block = max(self.backward(chunk, directions), self.forward(micro_batch))
        sums = SUMS_HELD * (self.num_objectives + 1) * self.adapter
        return [
            Source(
                SUMS,
                sums,
                f"{self.num_objectives} rewards and the divergence, {SUMS_HELD} times",
            ),
            Source(
                SAMPLES,
                chunk * directions * self.adapter,
                f"{chunk} samples x {directions} directions",
            ),
            self.saved(chunk),
            Source(BLOCK, block, f"{chunk} samples x {directions} cotangents"),
        ]

    def decoder(self) -> Source:
        """Weights and activations of the decoder."""
        batch = self.settings.rollout.batch_size
        count = decode_size(batch, self.mesh) // device_mesh.image_shards(self.mesh, batch)
        size, networks = self.shapes.size, self.shapes.networks
        pixels = size.num_frames * size.height * size.width
        activations = DECODER_ARRAYS * count * pixels * networks.largest_activation * FLOAT32
        weights = FLOAT32 * lora.num_parameters(networks.decoder_only_params)
        note = f"weights and activations of {count} images, float32"
        return Source(DECODER, weights + activations, note)


def total(sources: list[Source]) -> float:
    """Bytes of all sources."""
    return sum(source.bytes for source in sources)


def as_record(sources: dict[str, list[Source]]) -> dict[str, Any]:
    """Plain values, for JSON."""
    record: dict[str, Any] = {}
    for program, parts in sources.items():
        record[program] = {part.name: {"bytes": part.bytes, "note": part.note} for part in parts}
    return record
