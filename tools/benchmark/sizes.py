"""What is measured: shapes of a micro-batch, and one of random weights and rollouts."""

from __future__ import annotations

import dataclasses
import json
import runpy
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.config import default_config
from marble_jax.families.sd3.config import SD35_MEDIUM, MMDiTConfig
from marble_jax.families.sd3.family import FAMILY
from marble_jax.families.sd3.transformer import MMDiT, abstract_params
from marble_jax.objectives.nft import Nft
from marble_jax.trainable import lora
from marble_jax.trainable.lora import LoraSpec
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.types import Adapter, Params

ROOT = Path(__file__).parents[2]
SIGMAS = (1.0, 0.9, 0.7, 0.4)


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes and settings of a micro-batch.

    Attributes:
      name: of the size.
      config: the transformer.
      num: samples n.
      side: of a latent image.
      tokens: text tokens a sample.
      rank: of the adapter.
      alpha: of the adapter.
      chunk: samples whose per-sample gradients are held at once.
      anchor_every: micro-batchs from one with anchors to the next.
      micro_steps: of an optimiser step, over which one solve is spread.
      dtype: compute dtype, and dtype of the frozen weights.
      remat: what the backward pass recomputes.
      unroll: transformer blocks in one turn of the scan.
      attention: implementation; "auto" is the fused one where the machine has it.
      table_side: side of the stored positional table; None stores the whole one.
      nft_beta, kl_weight, clip: the objective's constants.
      gpu_only: too slow for a CPU.
    """

    name: str
    config: MMDiTConfig
    num: int
    side: int
    tokens: int
    rank: int
    alpha: float
    chunk: int
    anchor_every: int
    micro_steps: int
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"
    table_side: int | None = None
    nft_beta: float = 0.1
    kl_weight: float = 1e-4
    clip: float = 5.0
    gpu_only: bool = False

    @property
    def spec(self) -> LoraSpec:
        """The adapter's shape."""
        return LoraSpec(self.rank, self.alpha, FAMILY.default_targets)

    @property
    def anchored_share(self) -> float:
        """Share of an optimiser step's micro-batchs that have anchors, as `training.train_step` chooses them."""
        return len(range(0, self.micro_steps, self.anchor_every)) / self.micro_steps


def embedded() -> Size:
    """The shipped pipeline, as configs/embedded.py trains it."""
    config = runpy.run_path(str(ROOT / "configs" / "embedded.py"))["get_config"]()
    record = json.loads(
        (ROOT / "marble_jax/embedded/pipeline/transformer/config.json").read_text(encoding="utf-8")
    )
    training, images = (
        config.training,
        config.rollout.prompts_per_step * config.rollout.images_per_prompt,
    )
    # 64 px over a VAE of 8 px a cell; 14 CLIP tokens come before those of T5.
    return Size(
        "embedded",
        MMDiTConfig.from_dict(record),
        training.micro_batch_size,
        config.model.height // 8,
        14 + config.model.max_sequence_length,
        config.lora.rank,
        config.lora.alpha,
        config.harmonize.chunk_size,
        config.harmonize.anchor_every,
        images
        // training.micro_batch_size
        * int(training.timestep_fraction * config.rollout.num_steps),
        config.model.dtype,
        config.model.remat,
        config.model.unroll,
    )


def mid() -> Size:
    """Large enough that matrix products fill two cores: 8 blocks of width 384, 64 + 48 tokens."""
    config = MMDiTConfig(
        sample_size=16,
        num_layers=8,
        num_attention_heads=6,
        joint_attention_dim=512,
        caption_projection_dim=384,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1, 2, 3),
        qk_norm="rms_norm",
    )
    return Size(
        "mid",
        config,
        num=16,
        side=16,
        tokens=48,
        rank=16,
        alpha=32.0,
        chunk=16,
        anchor_every=default_config().harmonize.anchor_every,
        micro_steps=24,
        unroll=8,
    )


def sd35m() -> Size:
    """SD3.5-medium at 512 px with upstream's micro-batch of 9 a device, 77 + 128 text tokens; random weights."""
    config = default_config()
    return Size(
        "sd35m",
        SD35_MEDIUM,
        num=9,
        side=64,
        tokens=77 + 128,
        rank=32,
        alpha=64.0,
        chunk=9,
        anchor_every=config.harmonize.anchor_every,
        micro_steps=192,
        dtype="bfloat16",
        remat=config.model.remat,
        unroll=config.model.unroll,
        table_side=32,
        gpu_only=True,
    )


def tiny() -> Size:
    """For tests: nothing takes time, and the divergence weighs enough to be seen."""
    config = MMDiTConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return Size(
        "tiny",
        config,
        num=4,
        side=8,
        tokens=5,
        rank=3,
        alpha=6.0,
        chunk=2,
        anchor_every=4,
        micro_steps=6,
        kl_weight=0.5,
    )


SIZES = {"tiny": tiny, "embedded": embedded, "mid": mid, "sd35m": sd35m}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random weights and rollouts of a size, with v != v_rollout != v_base.

    Attributes:
      size: what it was made from.
      model: the transformer.
      params: frozen base weights.
      current: adapter that is trained.
      rollout: adapter of the rollout policy.
    """

    size: Size
    model: MMDiT
    params: Params
    current: Adapter
    rollout: Adapter

    @property
    def objective(self) -> Nft:
        """DiffusionNFT with the size's constants."""
        return Nft(self.size.nft_beta, self.size.clip, self.size.kl_weight)

    def batch(self, num_rewards: int) -> RolloutBatch:
        """n rollouts with advantages under K rewards: some clipped, a fifth missing, none missing for K = 1."""
        size, config = self.size, self.size.config
        draw = np.random.default_rng(num_rewards)
        advantages = draw.normal(size=(size.num, num_rewards)) * 3
        valid = draw.random((size.num, num_rewards)) < (0.8 if num_rewards > 1 else 2.0)
        valid[0] = True
        draw = np.random.default_rng(0)  # the same images for every K

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(draw.standard_normal(shape, np.float32))

        return RolloutBatch(
            kept=normal(size.num, size.side, size.side, config.in_channels),
            prompt=jnp.arange(size.num, dtype=jnp.int32),
            cond={
                "embeds": normal(size.num, size.tokens, config.joint_attention_dim),
                "pooled": normal(size.num, config.pooled_projection_dim),
            },
            advantages=jnp.asarray(np.where(valid, advantages, 0), jnp.float32),
            valid=jnp.asarray(valid),
        )


@partial(jax.jit, static_argnums=(1, 2))
def _drawn(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, mean: float, spread: float
) -> jax.Array:
    """Normal numbers, drawn where they are used: 2.5 billion take minutes on a host, and as long on their way."""
    return (mean + spread * jax.random.normal(key, shape)).astype(dtype)


def make_problem(size: Size) -> Problem:
    """Random weights: products keep the scale of their input, norm weights are near one."""
    dtype = jnp.dtype(size.dtype)
    model = MMDiT(
        size.config,
        dtype=dtype,
        remat=size.remat,
        unroll=size.unroll,
        attention=size.attention,
        lora_scale=size.spec.scale,
        table_side=size.table_side,
    )
    shapes = abstract_params(model)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        seed = zlib.crc32(name.encode())
        if "kernel" in name:
            spread = (leaf.shape[-2] if len(leaf.shape) < 4 else np.prod(leaf.shape[:3])) ** -0.5
        else:
            spread = 0.1
        return _drawn(jax.random.key(seed), leaf.shape, dtype, float("scale" in name), spread)

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    adapter = jax.eval_shape(
        lambda key: lora.init_adapter(key, FAMILY.layers_at, shapes, size.spec), jax.random.key(0)
    )

    def low_rank(seed: int) -> Adapter:
        leaves, structure = jax.tree.flatten(adapter)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = []
        for key, leaf in zip(keys, leaves, strict=True):
            spread = 0.2 * leaf.shape[-2] ** -0.5
            drawn.append(_drawn(key, leaf.shape, jnp.dtype(jnp.float32), 0.0, spread))
        return jax.tree.unflatten(structure, drawn)

    base, step = low_rank(1), low_rank(2)
    return Problem(size, model, params, jax.tree.map(lambda a, b: a + 0.3 * b, base, step), base)
