"""Memory of a device by source, for each program of a run, reckoned from shapes.

What is passed to a program (weights, adapters, optimiser, rollouts) is exact. What lives while it runs is a model of
what XLA keeps: the inputs of the blocks that rematerialisation starts from, the widest block's intermediates (counted
in arrays of one token stream), attention's scores, the sums of gradients. The counts below were read off the buffer
assignment of XLA:TPU (libtpu 0.0.51, jax 0.10.2) for SD3.5-medium; `--topology` compiles and compares.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from marble_jax.config import Settings
from marble_jax.distributed import device_mesh
from marble_jax.distributed.sharding import SCANNED_PREFIX
from marble_jax.networks.quantized import MODEL_PRODUCTS
from marble_jax.objectives.registry import make_objective
from marble_jax.plan.model_shapes import ModelShapes
from marble_jax.plan.sample_memory import (
    decoder_bytes,
    latent_bytes,
    sampled_bytes,
    sampling_weight_bytes,
)
from marble_jax.plan.saved_activations import output_bytes, product_bytes
from marble_jax.programs.noisy_rollouts import trains_guided
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import Sizes, chunk_size
from marble_jax.types import DTYPES

NUM_POLICIES = 4  # current, rollout, averaged and best adapter
NUM_MOMENTS = 2  # of AdamW
BLOCK_ARRAYS = 28  # arrays [tokens, width] of a block's backward pass that are alive at once
FORWARD_ARRAYS = 6  # the same of a forward pass
KEPT_ARRAYS = 34  # arrays a block keeps for its backward pass without rematerialisation
SUMS_HELD = 3  # sums of gradients alive at once: of the loop, of its body, and of the loop before
SPLASH_ARRAYS = 13  # arrays [tokens, width] around the TPU's fused kernel: padded to blocks and lanes, statistics
LANES = 128  # a TPU pads the last axis of an array to this
FLOAT32 = 4  # bytes

# Names of the parts, as the table and the record show them.
BASE, ADAPTERS, OPTIMISER, HISTORY, ROLLOUTS = (
    "base weights",
    "adapters x policies",
    "optimiser",
    "history",
    "rollouts of the step",
)
SUMS, SAMPLES, SAVED, BLOCK, DECODER = (
    "accumulators",
    "per-sample gradients",
    "saved activations",
    "block working set",
    "autoencoder",
)
COPIED = "transformer, and the copy that samples"
KEPT = "latents kept so far"


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a device's memory.

    Attributes:
      name: name of the part, the same in every program.
      bytes: bytes on one device.
      note: what the bytes are, in words.
    """

    name: str
    bytes: float
    note: str


def weight_bytes(shapes: ModelShapes, mesh: Mesh | AbstractMesh) -> float:
    """Returns bytes of the base weights on a device."""
    networks = shapes.networks
    return networks.sharding_rules.layout(mesh, networks.params).device


def program_sources(
    settings: Settings,
    shapes: ModelShapes,
    sizes: Sizes,
    mesh: Mesh | AbstractMesh,
    pad: int = LANES,
) -> dict[str, list[Source]]:
    """Returns what every program holds on a device, under the names of `aot.jobs`.

    Args:
      settings: settings of the run.
      shapes: shapes of its model.
      sizes: its batch arithmetic.
      mesh: its devices.
      pad: multiple that the last axis of attention's scores is padded to.
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


def adapter_bytes(shapes: ModelShapes) -> float:
    """Bytes of one adapter, which is float32 whatever the base weights are."""
    return FLOAT32 * lora.num_parameters(shapes.adapter)


def history_adapters(settings: Settings) -> int:
    """Adapters that the history holds: earlier gradients, one a reward, and the last update."""
    return len(settings.rewards.train) + 1


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
        self.adapter = adapter_bytes(shapes)
        self.cond = self.itemsize * self.transformer.conditioning_size
        scalarized = settings.advantages.scalarized
        self.num_objectives = len(settings.rewards.train) + scalarized
        self.tokens = self.transformer.tokens + self.transformer.text_tokens
        # The unit of most estimates: one array of both token streams, of one sample.
        self.stream = self.tokens * self.transformer.width * self.itemsize
        self.image_stream = self.transformer.tokens * self.transformer.width * self.itemsize
        # The same between blocks, where it may be wider.
        self.carried = self.stream
        if settings.model.stream_dtype == "float32":
            self.carried = self.tokens * self.transformer.width * FLOAT32

    def share(self, count: int) -> int:
        """Samples of a batch of `count` that lie on one device."""
        return NamedSharding(self.mesh, device_mesh.BATCH).shard_shape((count,))[0]

    def scores(self, tokens: int, itemsize: int) -> float:
        """Bytes of attention's scores of one sample; a fused kernel never holds them.

        Args:
          tokens: tokens that attend to each other.
          itemsize: bytes of a score.
        """
        attention = self.settings.model.attention
        if attention == "cudnn":
            return 0.0
        if attention == "splash":
            # The kernel has buffers around it instead. The caller adds scores in float32 and in the compute dtype;
            # the buffers are there once.
            if itemsize != FLOAT32:
                return 0.0
            return SPLASH_ARRAYS * tokens * self.transformer.width * self.itemsize
        # Rounded up: a TPU pads the last axis to whole lanes.
        padded = -(-tokens // self.pad) * self.pad
        return self.transformer.num_heads * tokens * padded * itemsize

    def forward(self, count: int) -> float:
        """Bytes of a block's forward pass of `count` samples."""
        arrays = (FORWARD_ARRAYS + self.transformer.parallel_widths) * self.stream
        return count * (self.scores(self.tokens, FLOAT32) + arrays) + self.gathered()

    def backward(self, count: int, cotangents: int = 1) -> float:
        """Bytes of a block's backward pass of `count` samples with `cotangents` for each."""
        kept_scores = self.scores(self.tokens, self.itemsize)
        if self.transformer.num_second_attentions:
            kept_scores += self.scores(self.transformer.tokens, self.itemsize)
        # The forward pass is kept once; every cotangent goes through the block with arrays of its own.
        arrays = (BLOCK_ARRAYS + self.transformer.parallel_widths) * self.stream
        pulled_back = self.scores(self.tokens, FLOAT32) + arrays
        return count * (kept_scores + cotangents * pulled_back) + self.gathered()

    def gathered(self) -> float:
        """Bytes of the weights that are put together from several devices at once; 0 where every device has them.

        Those of the blocks in one turn of a run's loop, as many as `model.unroll`, whatever `model.remat`: a backward
        pass gathers again.
        """
        if self.mesh.shape["fsdp"] == 1:
            return 0.0
        turns: dict[str, float] = {}
        params = traverse_util.flatten_dict(dict(self.shapes.networks.params))
        for path, leaf in params.items():
            if path[0].startswith(SCANNED_PREFIX):
                # The first axis counts the blocks of a run.
                length = leaf.shape[0]
                at_once = min(self.settings.model.unroll, length)
                own = at_once * (leaf.size // length) * leaf.dtype.itemsize
                turns[path[0]] = turns.get(path[0], 0.0) + own
        return max(turns.values(), default=0.0)

    def saved(self, count: int) -> Source:
        """What all blocks keep for the backward pass of `count` samples."""
        layers = self.transformer.num_layers
        inputs = layers * self.carried
        if self.settings.model.remat == "full":
            return Source(SAVED, count * inputs, f"inputs of {layers} blocks")
        if self.settings.model.remat == "dots":
            kept = inputs + product_bytes(self.transformer, self.stream, self.image_stream)
            return Source(SAVED, count * kept, "products with weights")
        if self.settings.model.remat == "products":
            attention = self.settings.model.attention
            outputs = output_bytes(
                self.transformer, self.stream, self.image_stream, attention, self.pad
            )
            kept = inputs + outputs
            return Source(SAVED, count * kept, "outputs of dense layers and attention")
        kept = self._kept_scores() + inputs + (KEPT_ARRAYS - 1) * layers * self.stream
        return Source(SAVED, count * kept, "everything (model.remat=none)")

    def _kept_scores(self) -> float:
        """Bytes of attention's scores that all blocks keep of one sample."""
        # Softmax keeps its scores in float32 and in the compute dtype.
        joint = self.scores(self.tokens, FLOAT32) + self.scores(self.tokens, self.itemsize)
        image_tokens = self.transformer.tokens
        image = self.scores(image_tokens, FLOAT32) + self.scores(image_tokens, self.itemsize)
        second = self.transformer.num_second_attentions
        return self.transformer.num_layers * joint + second * image

    def base(self) -> Source:
        """Base weights, and how they are split."""
        params = self.shapes.networks.params
        dtype = jax.tree.leaves(params)[0].dtype
        described = self.shapes.networks.sharding_rules.describe(self.mesh, params)
        return Source(BASE, weight_bytes(self.shapes, self.mesh), f"{dtype}, {described}")

    def state(self) -> list[Source]:
        """What a train step is given besides rollouts."""
        megabytes = self.adapter / 1e6
        # All four adapters lie on every device: they are small beside the weights that fsdp splits.
        adapters = f"{NUM_POLICIES} x {megabytes:.0f} MB float32"
        kept = history_adapters(self.settings)
        return [
            self.base(),
            Source(ADAPTERS, NUM_POLICIES * self.adapter, adapters),
            Source(OPTIMISER, NUM_MOMENTS * self.adapter, "AdamW's moments, float32"),
            Source(
                HISTORY,
                kept * self.adapter,
                "gradients of earlier steps, one a reward, and the last update, float32",
            ),
        ]

    def rollout_program(self) -> list[Source]:
        """Sources of the program that samples a batch."""
        rollout = self.settings.rollout
        count = self.share(rollout.batch_size)
        policy = self.adapter
        if rollout.merge_adapter:
            policy = 0
        latents, held = sampled_bytes(self.settings, self.shapes, count)
        base = self.base()
        if rollout.products != MODEL_PRODUCTS:
            weights = sampling_weight_bytes(self.settings, self.shapes, base.bytes)
            base = Source(BASE, weights, f"{rollout.products} in blocks, replicated")
        return [
            base,
            Source(ADAPTERS, policy, "the rollout policy"),
            Source(ROLLOUTS, count * self.cond + latents, held),
            Source(BLOCK, self.forward(count), "one block, forward"),
        ]

    @property
    def prompts_trained(self) -> int:
        """Prompts that the network is differentiated at for a sample: a guided policy has the negative one, too."""
        return 2 if trains_guided(self.settings) else 1

    def rollouts(self) -> Source:
        """What the rollouts hand to training, and the copies of it that training makes."""
        latents, note = latent_bytes(self.settings, self.shapes, self.sizes, self.mesh)
        conditioning = 2 * self.settings.rollout.prompts_per_step * self.cond
        return Source(ROLLOUTS, latents + conditioning, note)

    def between(self) -> list[Source]:
        """Sources of a train step that reuses alpha, its arguments apart."""
        count = self.share(self.settings.training.micro_batch_size)
        return [
            Source(SUMS, 2 * self.adapter, "one gradient and its sum"),
            self.saved(count * self.prompts_trained),
            Source(BLOCK, self.backward(count), f"{count} samples, backward"),
        ]

    def solving(self) -> list[Source]:
        """Sources of a train step that takes every reward's gradient, its arguments apart."""
        shards = device_mesh.batch_shards(self.mesh)
        chunk = self.share(chunk_size(self.settings.training, self.settings.harmonize, shards))
        # The signal, the anchors, and the divergence from the base where that counts.
        objective = make_objective(self.settings)
        directions = objective.num_directions
        micro_batch = self.share(self.settings.training.micro_batch_size)
        # Backward passes go chunk by chunk; the velocities that need no gradient take a whole micro-batch.
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
            self.saved(chunk * self.prompts_trained),
            Source(BLOCK, block, f"{chunk} samples x {directions} cotangents"),
        ]

    def decoder(self) -> Source:
        """Weights and activations of the decoder."""
        return Source(DECODER, *decoder_bytes(self.settings, self.shapes, self.mesh))


def total(sources: list[Source]) -> float:
    """Bytes of all sources."""
    return sum(source.bytes for source in sources)


def as_record(sources: dict[str, list[Source]]) -> dict[str, Any]:
    """Plain values, for JSON."""
    record: dict[str, Any] = {}
    for program, parts in sources.items():
        record[program] = {part.name: {"bytes": part.bytes, "note": part.note} for part in parts}
    return record
