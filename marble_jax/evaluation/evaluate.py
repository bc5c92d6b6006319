"""Scores of a policy on held-out prompts: the same prompts and the same noise every time, no prompt dropped.

Image i starts from noise drawn with (seed, i) whatever the batch size, so two policies differ by their weights alone
and gains are paired. Several images of a prompt are not independent: `groups` says which belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax import distributed
from marble_jax.flow.policy_sampler import Sampler, batches, image_noise
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.scorer import Scorer, concatenate
from marble_jax.types import Adapter, Conditioning, Params, Scores


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Held-out prompts and how to draw and score their images.

    Attributes:
      prompts: the held-out prompts.
      sampler: compiled sampler of the evaluation's solver.
      encode: prompts to conditioning.
      decode: latents [n, h, w, C] to images [n, H, W, 3].
      scorer: every reward, the held-out ones too.
      latent_shape: (h, w, C).
      batch_size: images at once.
      seed: of the noise.
      num_images: images kept, spread evenly over the prompts.
      images_per_prompt: images drawn of every prompt; image i is of prompt i modulo their number.
      place: puts arrays with a leading batch axis on the devices.
    """

    prompts: Sequence[Prompt]
    sampler: Sampler
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[jax.Array], jax.Array]
    scorer: Scorer
    latent_shape: tuple[int, int, int]
    batch_size: int
    seed: int
    num_images: int
    images_per_prompt: int = 1
    place: Callable[[Any], Any] = lambda tree: tree

    @property
    def groups(self) -> np.ndarray:
        """int [prompts * images_per_prompt]: the prompt of every image."""
        return np.arange(len(self.prompts) * self.images_per_prompt) % len(self.prompts)

    @property
    def kept(self) -> list[int]:
        """Indices of the prompts whose images are kept."""
        count = min(self.num_images, len(self.prompts))
        return (
            sorted({int(i) for i in np.linspace(0, len(self.prompts) - 1, count)}) if count else []
        )

    def __call__(
        self,
        params: Params,
        adapter: Adapter | None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[Scores, np.ndarray]:
        """Draws and scores `images_per_prompt` images of every prompt.

        Args:
          params: base weights.
          adapter: the policy; None is the base model.
          progress: called with the number of images of every finished batch.

        Returns:
          Scores of all images, and the kept images uint8 [num_images, H, W, 3].
        """
        pending, images, kept, groups = [], {}, set(self.kept), self.groups
        key = jax.random.key(self.seed)
        for index in batches(len(groups), self.batch_size):
            chosen = [self.prompts[groups[i]] for i in index]
            noise = image_noise(key, index, self.latent_shape)
            cond = distributed.run_on_all(
                "prompts", lambda chosen=chosen: self.encode([p.text for p in chosen])
            )
            decoded = self.decode(self.sampler(params, adapter, *self.place((cond, noise))))
            pending.append(self.scorer.submit(decoded, chosen))
            for row, i in enumerate(index):
                if int(i) in kept and int(i) not in images:
                    images[int(i)] = distributed.to_host(jnp.round(decoded[row] * 255)).astype(
                        np.uint8
                    )
            progress(len(set(index.tolist())))
        scores = concatenate([p.result() for p in pending], len(groups))
        return scores, np.stack([images[i] for i in self.kept]) if kept else np.zeros(
            (0, 1, 1, 3), np.uint8
        )
