"""Rollouts of one optimiser step: sample a batch, hand it to the rewards, sample the next one, then collect."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from marble_jax import distributed
from marble_jax.batches import UnderWay, batch_indices
from marble_jax.distributed.waiting import call_beside, wait_for
from marble_jax.errors import InputError
from marble_jax.flow.policy_sampler import Sampler
from marble_jax.flow.trajectory import Transitions
from marble_jax.objectives.base import Kept
from marble_jax.prompts.groups import Draw
from marble_jax.rewards.base import concatenate
from marble_jax.rewards.scorer import Scorer
from marble_jax.training.profile import phase
from marble_jax.types import Adapter, Conditioning, Params, Scores


@dataclasses.dataclass(frozen=True)
class NoisyPath:
    """Noise along the way of a batch's rollouts.

    Attributes:
      key: PRNG key of it.
      start: first step that has it.
    """

    key: jax.Array
    start: int


NoisySampler = Callable[
    [Params, Adapter | None, Conditioning, jax.Array, NoisyPath], tuple[jax.Array, Transitions]
]
"""sampler(params, adapter or None, cond of n samples, noise [n, *latent], path) -> clean latents float32 [n, *latent],
and the steps that have noise."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """N samples, which are images or clips, and their scores.

    Attributes:
      kept: pytree of what is left to train on: float32 clean latents, or `Transitions` of rollouts with noise along
        the way. Leaves are [N, ...] on every device, or where `is_split` [batches, n, ...], each batch split over the
        devices.
      scores: of the training rewards.
      cond: conditioning of the P distinct draws.
      prompt: int32 [N] index of each sample's prompt in `cond`.
      health: see `sample_health`.
      seconds: {"rollout", "rewards_wait"}.
      is_split: see `latent_layout`.
    """

    kept: Any
    scores: Scores
    cond: Conditioning
    prompt: np.ndarray
    health: dict[str, float]
    seconds: dict[str, float]
    is_split: bool = False

    def checked_for(self, needed: Kept) -> Any:
        """What an objective trains on, as `kept` is laid out.

        Args:
          needed: what the objective needs of a rollout.

        Raises:
          InputError: rollouts of this solver keep something else.
        """
        has = Kept.TRANSITIONS if isinstance(self.kept, Transitions) else Kept.CLEAN_LATENTS
        if has is not needed:
            raise InputError(
                f"rollout.solver: expected one that keeps {needed.value}; received one that keeps {has.value}"
            )
        return self.kept


@dataclasses.dataclass(frozen=True)
class Collector:
    """Samples and scores the draws of a step.

    Attributes:
      sampler: compiled sampler of the rollout's solver; a `NoisySampler` is one that is called with a path.
      encode: prompts to conditioning.
      decode: latents [n, *latent] to images [n, H, W, 3] or clips [n, F, H, W, 3], in [0, 1].
      scorer: the training rewards.
      latent_shape: of one sample's latents.
      batch_size: samples drawn at once.
      place: puts host arrays with a leading batch axis on the mesh.
      spread: puts a batch's latents whole on every device. They are small (302 MB for 1152 images of 512 px), every
        device trains on images of all, and while the next batch is sampled nobody waits for it.
      stack: puts the latents of all batches together where they are too large for that (1 GB for 1152 clips of
        33 x 240 x 416, 4 GB of 33 x 480 x 832): [batches, n, *latent], still split over the devices. None spreads.
    """

    sampler: Sampler | NoisySampler
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[jax.Array], jax.Array]
    scorer: Scorer
    latent_shape: tuple[int, ...]
    batch_size: int
    place: Callable[[Any], Any]
    spread: Callable[[jax.Array], jax.Array] = lambda latents: latents
    stack: Callable[[Sequence[Any]], Any] | None = None

    def __call__(
        self,
        params: Params,
        adapter: Adapter | None,
        draw: Draw,
        key: jax.Array,
        progress: Callable[[int], None] = lambda count: None,
        path: NoisyPath | None = None,
    ) -> Rollout:
        """Draws and scores every sample of `draw`.

        Args:
          params: base weights.
          adapter: the policy; None is what the weights are.
          draw: the samples' prompts.
          key: PRNG key of the noise that rollouts start from.
          progress: called with the number of samples that are done; what it raises goes through.
          path: of rollouts with noise along the way; None for a solver of the ODE.
        """
        start, waited = time.perf_counter(), self.scorer.waited_seconds
        count = len(draw.prompts)
        cond = self._encoded(draw)
        kept_of_batches, health = [], []
        poll = partial(progress, 0)
        # A reward that hangs does not keep a run from stopping.
        under_way: UnderWay[Scores] = UnderWay(poll)
        batches = batch_indices(count, self.batch_size)
        # One number for all batches, so that their figures are one program.
        num_groups = max(len(np.unique(draw.groups[index])) for index in batches)
        for number, index in enumerate(batches):
            group = draw.groups[index]
            noise_key, noisy_path = _batch_key_and_path(key, path, number)
            sampled = partial(
                self._sampled, params, adapter, _rows(cond, group), noise_key, noisy_path
            )
            # A batch may take a minute, its first one several to compile, and a run is to stop in less.
            x0, kept, samples = call_beside(sampled, poll)
            wait_for(samples, poll)
            # Host rewards work on this batch while the next one is sampled.
            pending = self.scorer.submit(samples, [draw.prompts[i] for i in index])
            under_way.add(pending, samples.nbytes // jax.process_count())
            kept_of_batches.append(kept if self.stack is not None else self.spread(kept))
            # Labels within the batch: a global one can be beyond the number of segments.
            _, label = np.unique(group, return_inverse=True)
            health.append(sample_health(x0, samples, label.astype(np.int32), num_groups))
            # A last batch that was filled up repeats a sample.
            progress(len(np.unique(index)))
        finished = time.perf_counter()
        with phase("rewards"):
            scores = concatenate(under_way.results(), count)
        seconds = {"rollout": finished - start, "rewards_wait": self.scorer.waited_seconds - waited}
        return Rollout(
            kept=self._put_together(kept_of_batches, count),
            scores=scores,
            cond=cond,
            prompt=draw.groups,
            health=_mean_health(health),
            seconds=seconds,
            is_split=self.stack is not None,
        )

    def _put_together(self, kept_of_batches: Sequence[Any], count: int) -> Any:
        """What is kept of `count` samples, from that of their batches, of which the last may have been filled up."""
        if self.stack is not None:
            return self.stack(kept_of_batches)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *kept_of_batches)

    def _encoded(self, draw: Draw) -> Conditioning:
        """Conditioning of the P distinct draws, in the order of their labels."""
        _, first = np.unique(draw.groups, return_index=True)
        texts = [draw.prompts[i].text for i in first]
        return distributed.run_on_all("prompts", lambda: self.encode(texts))

    def _sampled(
        self,
        params: Params,
        adapter: Adapter | None,
        cond: Conditioning,
        key: jax.Array,
        path: NoisyPath | None,
    ) -> tuple[jax.Array, Any, jax.Array]:
        """Clean latents of one batch, what is kept of it, and its images or clips."""
        noise = jax.random.normal(key, (self.batch_size, *self.latent_shape))
        drawn = (params, adapter, self.place(cond), self.place(noise))
        sampler: Any = self.sampler
        if path is None:
            x0 = sampler(*drawn)
            return x0, x0, self.decode(x0)
        x0, transitions = sampler(*drawn, path)
        return x0, transitions, self.decode(x0)


def _batch_key_and_path(
    key: jax.Array, path: NoisyPath | None, number: int
) -> tuple[jax.Array, NoisyPath | None]:
    """Key of the noise that a batch starts from, and its noise along the way; `number` counts the batches."""
    start_key = jax.random.fold_in(key, number)
    if path is None:
        return start_key, None
    return start_key, NoisyPath(jax.random.fold_in(path.key, number), path.start)


def _rows(cond: Conditioning, index: np.ndarray) -> Conditioning:
    return jax.tree.map(lambda leaf: leaf[index], cond)


def _mean_health(batches_health: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over batches, read once all of them are on their way: reading waits for the device."""
    names = batches_health[0]
    return {name: float(np.mean([batch[name] for batch in batches_health])) for name in names}


@partial(jax.jit, static_argnames="num_groups")
def sample_health(
    x0: Float[Array, " n *latent"],
    samples: Float[Array, " n *image"],
    group: Int[Array, " n"],
    num_groups: int,
) -> dict[str, Float[Array, ""]]:
    """Figures of one batch that tell when samples degenerate.

    Args:
      x0: clean latents.
      samples: images [n, H, W, 3] or clips [n, F, H, W, 3].
      group: labels in [0, num_groups) of samples of one prompt.
      num_groups: labels that there can be. Every device holds sums of so many whole images: as many as there are
        samples would be the whole batch on each of them.

    Returns:
      `x0_norm` (root mean square), `brightness` (mean pixel), `diversity` (mean standard deviation of a pixel within a
      group) and, of clips, `motion` (mean absolute difference of a pixel between neighbouring frames).
    """
    health = {
        "x0_norm": jnp.sqrt(jnp.mean(jnp.square(x0))),
        "brightness": jnp.mean(samples),
    }
    if samples.ndim == 4:
        return health | {"diversity": _diversity(samples, group, num_groups)}
    # Frame by frame: sums over groups of whole clips would lie on every device.
    diversity = jax.lax.map(
        lambda frame: _diversity(samples[:, frame], group, num_groups),
        jnp.arange(samples.shape[1]),
    )
    motion = jnp.mean(jnp.abs(samples[:, 1:] - samples[:, :-1]))
    return health | {"diversity": jnp.mean(diversity), "motion": motion}


def _diversity(images: jax.Array, group: jax.Array, num_groups: int) -> jax.Array:
    """Mean standard deviation of a pixel of images [n, H, W, 3] within a group."""
    size = group.shape[0]
    flat = images.reshape(size, -1)
    count = jax.ops.segment_sum(jnp.ones(size), group, num_groups)
    divisor = jnp.maximum(count, 1)[:, None]
    mean = jax.ops.segment_sum(flat, group, num_groups) / divisor
    squares = jax.ops.segment_sum(jnp.square(flat - mean[group]), group, num_groups)
    spread = jnp.mean(jnp.sqrt(squares / divisor), axis=1)
    # A group of one has no spread to speak of, and a batch may have fewer groups than another.
    several = count > 1
    return jnp.sum(spread * several) / jnp.maximum(jnp.sum(several), 1)
