"""Rollouts of one optimiser step: sample a batch, hand it to the rewards, go on with the next, then collect."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax import distributed
from marble_jax.flow.policy_sampler import Sampler, batches
from marble_jax.prompts.groups import Draw
from marble_jax.rewards.scorer import Scorer, concatenate
from marble_jax.training.profile import phase
from marble_jax.types import Adapter, Conditioning, Params, Scores


@dataclasses.dataclass(frozen=True)
class Rollout:
    """N sampled images and what the rewards say of them.

    Attributes:
      x0: float32 [N, h, w, C] clean latents, on every device.
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


@dataclasses.dataclass(frozen=True)
class Collector:
    """Samples and scores the draws of a step.

    Attributes:
      sampler: compiled sampler of the rollout's solver.
      encode: prompts to conditioning.
      decode: latents [n, h, w, C] to images [n, H, W, 3] in [0, 1].
      scorer: the training rewards.
      latent_shape: (h, w, C).
      batch_size: images sampled at once.
      place: puts host arrays with a leading batch axis on the mesh.
      spread: puts a batch's latents whole on every device. They are small (302 MB for 1152 images of 512 px), every
        device trains on images of all, and while the next batch is sampled nobody waits for it.
    """

    sampler: Sampler
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[jax.Array], jax.Array]
    scorer: Scorer
    latent_shape: tuple[int, int, int]
    batch_size: int
    place: Callable[[object], object]
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
        _, first = np.unique(draw.groups, return_index=True)
        texts = [draw.prompts[i].text for i in first]
        cond = distributed.run_on_all("prompts", lambda: self.encode(texts))
        latents, pending, sums = [], [], []
        for number, index in enumerate(batches(count, self.batch_size)):
            noise = jax.random.normal(
                jax.random.fold_in(key, number), (self.batch_size, *self.latent_shape)
            )
            group = draw.groups[index]
            part = jax.tree.map(lambda leaf, group=group: leaf[group], cond)
            x0 = self.sampler(params, adapter, self.place(part), self.place(noise))
            images = self.decode(x0)
            pending.append(self.scorer.submit(images, [draw.prompts[i] for i in index]))
            latents.append(self.spread(x0))
            # Labels within the batch: a global one can be beyond the number of segments.
            sums.append(
                _image_health(x0, images, np.unique(group, return_inverse=True)[1].astype(np.int32))
            )
            progress(len(np.unique(index)))
        sampled = time.perf_counter()
        with phase("rewards"):
            scores = concatenate([p.result() for p in pending], count)
        health = {name: float(np.mean([s[name] for s in sums])) for name in sums[0]}
        seconds = {"rollout": sampled - start, "rewards_wait": self.scorer.waited_seconds - waited}
        return Rollout(jnp.concatenate(latents)[:count], scores, cond, draw.groups, health, seconds)


@jax.jit
def _image_health(x0: jax.Array, images: jax.Array, group: jax.Array) -> dict[str, jax.Array]:
    """x0 norm, brightness and within-group diversity of one batch."""
    size = group.shape[0]
    flat = images.reshape(size, -1)
    count = jax.ops.segment_sum(jnp.ones(size), group, size)
    mean = jax.ops.segment_sum(flat, group, size) / jnp.maximum(count, 1)[:, None]
    variance = (
        jax.ops.segment_sum(jnp.square(flat - mean[group]), group, size)
        / jnp.maximum(count, 1)[:, None]
    )
    diversity = jnp.sum(jnp.mean(jnp.sqrt(variance), axis=1) * (count > 1)) / jnp.maximum(
        jnp.sum(count > 1), 1
    )
    return {
        "x0_norm": jnp.sqrt(jnp.mean(jnp.square(x0))),
        "brightness": jnp.mean(images),
        "diversity": diversity,
    }
