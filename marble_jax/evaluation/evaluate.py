"""Scores of a policy on held-out prompts: the same prompts and the same noise every time, no prompt dropped.

Image i starts from noise of (seed, i) whatever the batch size, so two policies differ by their weights alone
and gains are paired. Several images of a prompt are not independent: `groups` says which belong together. Where a
reward compares them, they are drawn in one batch; the noise of image i stays that of (seed, i).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from marble_jax import distributed
from marble_jax.batches import UnderWay, batch_indices, pack_groups
from marble_jax.distributed.waiting import call_beside, wait_for
from marble_jax.errors import InputError
from marble_jax.flow.policy_sampler import Sampler, image_noise
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import concatenate
from marble_jax.rewards.scorer import Scorer
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
      rows_together: images of a batch, side by side, that one host scores; a divisor of `batch_size`, 0 for all.
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
    rows_together: int = 0

    @property
    def comparing(self) -> list[str]:
        """Names of the rewards that compare the images of a prompt; none where there is one image of each."""
        texts = self._texts()
        if len(set(texts)) == len(texts):
            return []
        return [reward.name for reward in self.scorer.rewards if reward.needs_full_group]

    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the numbers of each batch's images, int [batch_size], and which of them count, bool [batch_size].

        Raises:
          InputError: images of a prompt that are compared do not fit on one host.
        """
        texts, compared = self._texts(), self.comparing
        if not compared:
            batches = []
            for index in batch_indices(len(texts), self.batch_size):
                # An image that was drawn again to fill the last batch up counts once.
                counts = np.append(True, index[1:] != index[:-1])
                batches.append((index, counts))
            return batches
        room = self.rows_together or self.batch_size
        parts = pack_groups(texts, room)
        largest = max(len(part) for part in parts)
        if largest > room:
            raise InputError(
                f"evaluation.images_per_prompt: expected at most {room} images of a prompt, which one host scores at "
                f"once, as {compared[0]} compares them; received {largest} of {texts[parts[0][0]]!r} or another "
                "(rollout.batch_size sets how many are scored at once)"
            )
        return _filled(parts, room, self.batch_size)

    def _texts(self) -> list[str]:
        """Every image's prompt."""
        return [self.prompts[prompt].text for prompt in self.groups]

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
        batches, compared = self.batches(), self.comparing
        under_way: UnderWay[Scores] = UnderWay(lambda: progress(0))
        images: dict[int, np.ndarray | None] = {}
        for index, counts in batches:
            prompts = [self.prompts[self.groups[i]] for i in index]
            decoded = self._sample(params, adapter, index, prompts, lambda: progress(0))
            # Scores are collected after the last batch: host rewards run while the device goes on sampling.
            # An image that fills a batch up would be one more of its prompt.
            pending = self.scorer.submit(decoded, prompts, counts if compared else None)
            under_way.add(pending, decoded.nbytes // jax.process_count())
            self._keep(images, decoded, index)
            progress(int(counts.sum()))
        scores = _in_order(under_way.results(), batches)
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


def _filled(
    parts: Sequence[Sequence[int]], room: int, batch_size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns batches of parts, each in a room of its own, which its last image fills up; see `Evaluator.batches`."""
    batches = []
    for start in range(0, len(parts), batch_size // room):
        numbers: list[int] = []
        counts: list[bool] = []
        for part in parts[start : start + batch_size // room]:
            numbers += [*part, *[part[-1]] * (room - len(part))]
            counts += [True] * len(part) + [False] * (room - len(part))
        missing = batch_size - len(numbers)
        numbers += [numbers[-1]] * missing
        counts += [False] * missing
        batches.append((np.array(numbers), np.array(counts)))
    return batches


def _in_order(parts: Sequence[Scores], batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Scores:
    """Returns the scores of batches by number of image."""
    numbers = np.concatenate([index for index, _ in batches])
    counts = np.concatenate([of_batch for _, of_batch in batches])
    scores = concatenate(parts, len(numbers))
    rows = np.flatnonzero(counts)
    rows = rows[np.argsort(numbers[rows])]
    return Scores(scores.names, scores.values[rows], scores.valid[rows], scores.failed[rows])
