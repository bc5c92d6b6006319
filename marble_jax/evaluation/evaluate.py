"""Scores of a policy on held-out prompts: the same prompts and the same noise every time, no prompt dropped.

Image i starts from noise of (seed, i) whatever the batch size, so two policies differ by their weights alone
and gains are paired. Several images of a prompt are not independent: `groups` says which belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from marble_jax import distributed
from marble_jax.batches import UnderWay, batch_indices
from marble_jax.distributed.waiting import call_beside, wait_for
from marble_jax.flow.policy_sampler import Sampler, image_noise
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.scorer import Scorer, concatenate
from marble_jax.storage.images import to_uint8
from marble_jax.types import Adapter, Conditioning, Params, Scores


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Held-out prompts and how to draw and score their samples, which are images or clips.

    Attributes:
      prompts: the held-out prompts.
      sampler: compiled sampler of the evaluation's solver.
      encode: prompts to conditioning.
      decode: latents [n, *latent] to images [n, H, W, 3] or clips [n, F, H, W, 3].
      scorer: every reward, the held-out ones too.
      latent_shape: of one image's latents.
      batch_size: images at once.
      seed: of the noise.
      num_images: images kept, spread evenly over the prompts.
      images_per_prompt: images sampled of every prompt; image i is of prompt i modulo their number.
      shard_batch: puts arrays with a leading batch axis on the devices.
    """

    prompts: Sequence[Prompt]
    sampler: Sampler
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[jax.Array], jax.Array]
    scorer: Scorer
    latent_shape: tuple[int, ...]
    batch_size: int
    seed: int
    num_images: int
    images_per_prompt: int = 1
    shard_batch: Callable[[Any], Any] = lambda tree: tree

    @property
    def groups(self) -> np.ndarray:
        """int [prompts * images_per_prompt]: the prompt of every image."""
        return np.arange(len(self.prompts) * self.images_per_prompt) % len(self.prompts)

    @property
    def kept(self) -> list[int]:
        """Indices of the prompts whose images are kept."""
        count = min(self.num_images, len(self.prompts))
        positions = np.linspace(0, len(self.prompts) - 1, count)
        # Rounded down, and each index once: with few prompts two positions may fall on one.
        return sorted(set(positions.astype(int).tolist()))

    def __call__(
        self,
        params: Params,
        adapter: Adapter | None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[Scores, list[np.ndarray | None]]:
        """Samples and scores `images_per_prompt` images of every prompt.

        Args:
          params: base weights.
          adapter: the policy; None is the base model.
          progress: called with the number of images of every finished batch.

        Returns:
          Scores of all images, and of every kept prompt its image uint8 [H, W, 3] or clip [F, H, W, 3]; None in place
          of one with numbers that are not finite, of which there is nothing to show.
        """
        groups = self.groups
        under_way: UnderWay[Scores] = UnderWay(lambda: progress(0))
        images: dict[int, np.ndarray | None] = {}
        for index in batch_indices(len(groups), self.batch_size):
            prompts = [self.prompts[groups[i]] for i in index]
            decoded = self._sample(params, adapter, index, prompts, lambda: progress(0))
            # Scores are collected after the last batch: host rewards run while the device goes on sampling.
            under_way.add(
                self.scorer.submit(decoded, prompts), decoded.nbytes // jax.process_count()
            )
            self._keep(images, decoded, index)
            # The last batch repeats its last image to be full; an image counts once.
            progress(len(set(index.tolist())))
        scores = concatenate(under_way.results(), len(groups))
        return scores, [images[number] for number in self.kept]

    def _sample(
        self,
        params: Params,
        adapter: Adapter | None,
        index: np.ndarray,
        prompts: Sequence[Prompt],
        poll: Callable[[], object],
    ) -> jax.Array:
        """Returns images or clips of n prompts, float, from the noise that belongs to the samples' numbers."""
        noise = image_noise(jax.random.key(self.seed), index, self.latent_shape)
        texts = [prompt.text for prompt in prompts]
        # Text encoders may refuse a prompt on one process; the others must not go on to wait for it.
        cond = distributed.run_on_all("prompts", partial(self.encode, texts))
        cond, noise = self.shard_batch((cond, noise))

        def draw() -> jax.Array:
            return self.decode(self.sampler(params, adapter, cond, noise))

        # The first batch compiles, which takes minutes, and a run is to stop in less.
        decoded = call_beside(draw, poll)
        wait_for(decoded, poll)
        return decoded

    def _keep(
        self, images: dict[int, np.ndarray | None], decoded: jax.Array, index: np.ndarray
    ) -> None:
        """Adds a batch's kept images to `images`, as uint8 by number, None for one that is not finite."""
        kept = set(self.kept)
        for row, number in enumerate(index.tolist()):
            if number not in kept or number in images:
                continue
            # All processes reach this line for the same rows: a sharded image is gathered by all of them.
            image = distributed.to_host(decoded[row])
            # 8 bits have no NaN: it would come out as black.
            images[number] = to_uint8(image) if np.isfinite(image).all() else None
