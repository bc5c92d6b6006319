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
import ml_collections
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from marble_jax.distributed import device_mesh, sharding
from marble_jax.plan.model_shapes import Architecture
from marble_jax.programs import build
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import Sizes, chunk_size

POLICIES = 4  # current, rollout, averaged and best adapter
MOMENTS = 2  # of AdamW
BLOCK_ARRAYS = 28  # arrays [tokens, width] of a block's backward pass that are alive at once
FORWARD_ARRAYS = 6  # the same of a forward pass
KEPT_ARRAYS = 34  # arrays a block keeps for its backward pass without rematerialisation
SUMS_HELD = 3  # sums of gradients alive at once: of the loop, of its body, and of the loop before
SPLASH_ARRAYS = 13  # arrays [tokens, width] around the TPU's fused kernel: padded to blocks and lanes, statistics
DECODER_ARRAYS = 4  # of the decoder's largest activation
LANES = 128  # a TPU pads the last axis of an array to this


@dataclasses.dataclass(frozen=True)
class Source:
    """Bytes of one source on one device, and what they are."""

    name: str
    bytes: float
    note: str


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


def weight_bytes(made: Architecture, mesh: Mesh | AbstractMesh) -> float:
    """Bytes of the base weights on a device."""
    return sharding.layout(
        mesh, "transformer", made.params, made.model.config.attention_head_dim
    ).device


def programs(
    config: ml_collections.ConfigDict,
    made: Architecture,
    sizes: Sizes,
    mesh: Mesh | AbstractMesh,
    pad: int = LANES,
) -> dict[str, list[Source]]:
    """Sources of every program, under the names of `ahead.jobs`.

    Args:
      config: the run's configuration.
      made: its model.
      sizes: its batch arithmetic.
      mesh: its devices.
      pad: what the last axis of attention's scores is padded to.
    """
    parts = _Parts(config, made, sizes, mesh, pad)
    base = Source(BASE, weight_bytes(made, mesh), _lies(made, mesh))
    state = [
        Source(
            ADAPTERS, POLICIES * parts.adapter, f"{POLICIES} x {parts.adapter / 1e6:.0f} MB float32"
        ),
        Source(OPTIMISER, MOMENTS * parts.adapter, "AdamW's moments, float32"),
    ]
    found = {
        "rollout": [
            base,
            Source(
                ADAPTERS, 0 if config.rollout.merge_adapter else parts.adapter, "the rollout policy"
            ),
            Source(
                ROLLOUTS,
                parts.share(config.rollout.batch_size) * (parts.cond + 4 * parts.latent),
                "conditioning and latents of a batch",
            ),
            Source(
                BLOCK, parts.forward(parts.share(config.rollout.batch_size)), "one block, forward"
            ),
        ],
        "decode": [Source(DECODER, *parts.decoder())],
        "train, solving": [base, *state, parts.rollouts(), *parts.solving()],
    }
    if config.harmonize.mode != "exact":
        found["train, between"] = [base, *state, parts.rollouts(), *parts.between()]
    return found


def beside(
    config: ml_collections.ConfigDict,
    made: Architecture,
    mesh: Mesh | AbstractMesh,
    name: str,
    on_host: int = 1,
) -> list[Source]:
    """What lies on a device while program `name` runs and is no argument of it, reward models apart.

    Args:
      config: of the run.
      made: its networks.
      mesh: its devices.
      name: a key of `programs`.
      on_host: devices of one host, which share its text encoders.
    """
    adapter = 4 * lora.num_parameters(made.adapter)
    merged, cached = config.rollout.merge_adapter, bool(config.prompts.embedding_cache)
    found = {
        "the rest of the state": (POLICIES + MOMENTS) * adapter - (not merged) * adapter,
        "transformer" + (", and the merged copy" if merged else ""): (1 + merged)
        * weight_bytes(made, mesh),
        "VAE": sum(4 * s.size for s in jax.tree.leaves(made.vae_params)),
        "text encoders": 0
        if cached
        else (
            jnp.dtype(build.DTYPES[config.model.dtype]).itemsize * made.encoder_parameters / on_host
        ),
    }
    rest, weights, autoencoder, encoders = found
    if name == "rollout":
        found[weights] -= weight_bytes(made, mesh)
    elif name == "decode":
        found[rest] = (POLICIES + MOMENTS) * adapter
        del found[autoencoder]
    else:
        del found[rest], found[weights]
    return [Source(what, size, "") for what, size in found.items() if size]


def _lies(made: Architecture, mesh: Mesh | AbstractMesh) -> str:
    dtype = jax.tree.leaves(made.params)[0].dtype
    lie = sharding.describe(mesh, "transformer", made.params, made.model.config.attention_head_dim)
    return f"{dtype}, {lie}"


class _Parts:
    """Sizes that several programs share, in bytes on a device."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        made: Architecture,
        sizes: Sizes,
        mesh: Mesh | AbstractMesh,
        pad: int,
    ):
        self.config, self.made, self.sizes, self.mesh = config, made, sizes, mesh
        self.arch, self.pad = made.model.config, pad
        self.size = jnp.dtype(build.DTYPES[config.model.dtype]).itemsize
        self.adapter = 4 * lora.num_parameters(made.adapter)
        self.latent = math.prod(made.latent)
        self.cond = self.size * (
            made.text_tokens * self.arch.joint_attention_dim + self.arch.pooled_projection_dim
        )
        self.rows = len(config.rewards.train) + (config.advantages.scalarize != "none")
        self.stream = (
            (made.tokens + made.text_tokens) * self.arch.width * self.size
        )  # one array of one sample

    def share(self, count: int) -> int:
        """Samples of `count` on one device."""
        return NamedSharding(self.mesh, device_mesh.BATCH).shard_shape((count,))[0]

    def scores(self, tokens: int, size: int) -> float:
        """Attention's scores of one sample over `tokens`, numbers of `size` bytes; a fused kernel has none."""
        if self.config.model.attention == "cudnn":
            return 0.0
        if self.config.model.attention == "splash":
            return SPLASH_ARRAYS * tokens * self.arch.width * self.size * (size == 4)
        return self.arch.num_attention_heads * tokens * (-(-tokens // self.pad) * self.pad) * size

    @property
    def joint(self) -> int:
        return self.made.tokens + self.made.text_tokens

    @property
    def second(self) -> float:
        """Kept scores of the second attention of a dual block, of one sample."""
        return self.scores(self.made.tokens, self.size) if self.arch.dual_attention_layers else 0.0

    def forward(self, count: int) -> float:
        """A block's forward pass of `count` samples."""
        return count * (self.scores(self.joint, 4) + FORWARD_ARRAYS * self.stream)

    def backward(self, count: int, cotangents: int = 1) -> float:
        """A block's backward pass of `count` samples with `cotangents` for each."""
        once = self.scores(self.joint, self.size) + self.second
        return count * (
            once + cotangents * (self.scores(self.joint, 4) + BLOCK_ARRAYS * self.stream)
        )

    def saved(self, count: int) -> tuple[float, str]:
        """What all blocks keep for the backward pass of `count` samples."""
        layers, dual = self.arch.num_layers, len(self.arch.dual_attention_layers)
        image = self.made.tokens * self.arch.width * self.size
        inputs = layers * self.stream
        if self.config.model.remat == "full":
            return count * inputs, f"inputs of {layers} blocks"
        if self.config.model.remat == "dots":
            return count * (
                inputs + 9 * layers * self.stream + 4 * dual * image
            ), "products with weights"
        scores = layers * (
            self.scores(self.joint, 4) + self.scores(self.joint, self.size)
        ) + dual * (self.scores(self.made.tokens, 4) + self.scores(self.made.tokens, self.size))
        return count * (scores + KEPT_ARRAYS * inputs), "everything (model.remat=none)"

    def rollouts(self) -> Source:
        """What the rollouts hand to training, and the copies of it that training makes."""
        images = (self.sizes.images + self.share(self.sizes.images)) * 4 * self.latent
        return Source(
            ROLLOUTS,
            images + 2 * self.config.rollout.prompts_per_step * self.cond,
            "all latents and conditioning of the prompts, and the device's own in training order",
        )

    def between(self) -> list[Source]:
        count = self.share(self.config.training.micro_batch_size)
        kept, what = self.saved(count)
        return [
            Source(SUMS, 2 * self.adapter, "one gradient and its sum"),
            Source(SAVED, kept, what),
            Source(BLOCK, self.backward(count), f"{count} samples, backward"),
        ]

    def solving(self) -> list[Source]:
        chunk = self.share(
            chunk_size(
                self.config.training, self.config.harmonize, device_mesh.batch_shards(self.mesh)
            )
        )
        cotangents = 2 + (self.config.nft.kl_weight > 0)
        kept, what = self.saved(chunk)
        block = max(
            self.backward(chunk, cotangents),
            self.forward(self.share(self.config.training.micro_batch_size)),
        )
        return [
            Source(
                SUMS,
                SUMS_HELD * (self.rows + 1) * self.adapter,
                f"{self.rows} rewards and the divergence, {SUMS_HELD} times",
            ),
            Source(
                SAMPLES,
                chunk * cotangents * self.adapter,
                f"{chunk} samples x {cotangents} directions",
            ),
            Source(SAVED, kept, what),
            Source(BLOCK, block, f"{chunk} samples x {cotangents} cotangents"),
        ]

    def decoder(self) -> tuple[float, str]:
        """Weights and activations of the decoder."""
        at_once = self.config.rollout.batch_size
        count = build.decode_size(at_once, self.mesh) // device_mesh.image_shards(
            self.mesh, at_once
        )
        widths = self.made.vae.config.block_out_channels
        largest = (
            self.config.model.height
            * self.config.model.width
            * (widths[1] if len(widths) > 1 else widths[0])
            * 4
        )
        used = [
            leaves
            for part, leaves in self.made.vae_params.items()
            if part in ("decoder", "post_quant_conv")
        ]
        weights = sum(4 * s.size for s in jax.tree.leaves(used))
        return (
            weights + DECODER_ARRAYS * count * largest,
            f"weights and activations of {count} images, float32",
        )


def total(sources: list[Source]) -> float:
    """Bytes of all sources."""
    return sum(source.bytes for source in sources)


def as_record(found: dict[str, list[Source]]) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        name: {s.name: {"bytes": s.bytes, "note": s.note} for s in sources}
        for name, sources in found.items()
    }
