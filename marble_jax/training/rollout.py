"""Rollouts of one optimiser step: sample a batch, hand it to the rewards, sample the next one, then collect."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax import distributed
from marble_jax.batches import batch_indices
from marble_jax.flow.policy_sampler import Sampler
from marble_jax.objectives.base import Kept
from marble_jax.prompts.groups import Draw
from marble_jax.rewards.scorer import Scorer, concatenate
from marble_jax.training.profile import phase
from marble_jax.types import Adapter, Conditioning, Params, Scores


@dataclasses.dataclass(frozen=True)
class Rollout:
    """N sampled images and their scores.

    Attributes:
      x0: float32 [N, *latent] clean latents, on every device.
      scores: of the training rewards.
      cond: conditioning of the P distinct draws.
      prompt: int32 [N] index of each image's prompt in `cond`.
      health: x0 norm (root mean square), brightness (mean pixel) and diversity (mean standard deviation of a pixel
        within a group), each a float.
      seconds: {"rollout", "rewards_wait"}.
    """

    x0: jax.Array
    scores: Scores
    cond: Conditioning
    prompt: np.ndarray
    health: dict[str, float]
    seconds: dict[str, float]

    def kept(self, what: Kept) -> jax.Array:
        """What an objective trains on, leaves [N, ...]: clean latents are kept of every image."""
        return {Kept.CLEAN_LATENTS: self.x0}[what]


@dataclasses.dataclass(frozen=True)
class Collector:
    """Samples and scores the draws of a step.

    Attributes:
      sampler: compiled sampler of the rollout's solver.
      encode: prompts to conditioning.
      decode: latents [n, *latent] to images [n, H, W, 3] in [0, 1].
      scorer: the training rewards.
      latent_shape: of one image's latents.
      batch_size: images sampled at once.
      place: puts host arrays with a leading batch axis on the mesh.
      spread: puts a batch's latents whole on every device. They are small (302 MB for 1152 images of 512 px), every
        device trains on images of all, and while the next batch is sampled nobody waits for it.
    """

    sampler: Sampler
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[jax.Array], jax.Array]
    scorer: Scorer
    latent_shape: tuple[int, ...]
    batch_size: int
    place: Callable[[Any], Any]
    spread: Callable[[jax.Array], jax.Array] = lambda latents: latents

    def __call__(
        self,
        params: Params,
        adapter: Adapter | None,
        draw: Draw,
        key: jax.Array,
        progress: Callable[[int], None] = lambda count: None,
    ) -> Rollout:
        """Images of every sample in `draw`, from noise drawn with `key`."""
        start, waited = time.perf_counter(), self.scorer.waited_seconds
        count = len(draw.prompts)
        cond = self._encoded(draw)
        latents, pending, health = [], [], []
        for number, index in enumerate(batch_indices(count, self.batch_size)):
            group = draw.groups[index]
            x0, images = self._sampled(
                params, adapter, _rows(cond, group), jax.random.fold_in(key, number)
            )
            # Host rewards work on this batch while the next one is sampled.
            pending.append(self.scorer.submit(images, [draw.prompts[i] for i in index]))
            latents.append(self.spread(x0))
            # Labels within the batch: a global one can be beyond the number of segments.
            _, label = np.unique(group, return_inverse=True)
            health.append(_image_health(x0, images, label.astype(np.int32)))
            # A last batch that was filled up has fewer images than samples.
            progress(len(np.unique(index)))
        sampled = time.perf_counter()
        with phase("rewards"):
            # A reward that hangs does not keep a run from stopping.
            scores = concatenate([p.result(lambda: progress(0)) for p in pending], count)
        seconds = {"rollout": sampled - start, "rewards_wait": self.scorer.waited_seconds - waited}
        # The last batch may have been filled up.
        x0 = jnp.concatenate(latents)[:count]
        return Rollout(x0, scores, cond, draw.groups, _mean_health(health), seconds)

    def _encoded(self, draw: Draw) -> Conditioning:
        """Conditioning of the P distinct draws, in the order of their labels."""
        _, first = np.unique(draw.groups, return_index=True)
        texts = [draw.prompts[i].text for i in first]
        return distributed.run_on_all("prompts", lambda: self.encode(texts))

    def _sampled(
        self, params: Params, adapter: Adapter | None, cond: Conditioning, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Clean latents and images of one batch."""
        noise = jax.random.normal(key, (self.batch_size, *self.latent_shape))
        x0 = self.sampler(params, adapter, self.place(cond), self.place(noise))
        return x0, self.decode(x0)


def _rows(cond: Conditioning, index: np.ndarray) -> Conditioning:
    return jax.tree.map(lambda leaf: leaf[index], cond)


def _mean_health(batches_health: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over batches, read once all of them are on their way: reading waits for the device."""
    names = batches_health[0]
    return {name: float(np.mean([batch[name] for batch in batches_health])) for name in names}


@jax.jit
def _image_health(x0: jax.Array, images: jax.Array, group: jax.Array) -> dict[str, jax.Array]:
    """x0 norm, brightness and within-group diversity of one batch."""
    size = group.shape[0]
    flat = images.reshape(size, -1)
    count = jax.ops.segment_sum(jnp.ones(size), group, size)
    divisor = jnp.maximum(count, 1)[:, None]
    mean = jax.ops.segment_sum(flat, group, size) / divisor
    squares = jax.ops.segment_sum(jnp.square(flat - mean[group]), group, size)
    spread = jnp.mean(jnp.sqrt(squares / divisor), axis=1)
    # A group of one has no spread to speak of, and there are as many segments as images, most of them empty.
    several = count > 1
    diversity = jnp.sum(spread * several) / jnp.maximum(jnp.sum(several), 1)
    return {
        "x0_norm": jnp.sqrt(jnp.mean(jnp.square(x0))),
        "brightness": jnp.mean(images),
        "diversity": diversity,
    }
