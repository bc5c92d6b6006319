"""How fast rewards are and how much memory they hold, measured on the golden images."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.platform import peak_memory
from marble_jax.rewards import base
from marble_jax.rewards.base import Reward
from marble_jax.rewards.checks import Samples, golden_frames
from marble_jax.rewards.workers.host_scorer import HostScorer

MIN_SECONDS = 1.0
"""For which the throughput is measured."""


def throughput(
    reward: Reward, side: int, batch_size: int, timeout: float = 120.0, num_frames: int = 1
) -> float:
    """Returns images, or clips, per second in batches of golden ones; NaN where the reward fails.

    Counts images that the reward applies to; what is compiled or loaded on first use is not counted.

    Args:
      reward: measured here and now.
      side: pixels of the images.
      batch_size: images at once.
      timeout: seconds a call of a host reward may take.
      num_frames: of clips, for a reward that takes them.
    """
    samples = Samples.golden(side, golden_frames(reward, num_frames))
    asked = np.flatnonzero(samples.applicable(reward))
    if not asked.size:
        return float("nan")
    batch = samples.select(asked[np.arange(batch_size) % asked.size])
    try:
        if reward.kind == "host":
            with HostScorer([reward], 1, "fail") as scorer:
                return batch_size * _rounds_per_second(
                    lambda: _score_on_host(scorer, reward, batch, timeout)
                )
        images = jnp.asarray(batch.pixels)
        return batch_size * _rounds_per_second(
            lambda: base.score(reward, images, batch.texts, batch.metadata)
        )
    # `run_checks` says why it fails.
    except Exception:
        return float("nan")


def _score_on_host(scorer: HostScorer, reward: Reward, batch: Samples, timeout: float) -> None:
    pending = scorer.submit(batch.pixels, batch.texts, batch.metadata)
    pending.result(timeout)


def _rounds_per_second(run: Callable[[], object]) -> float:
    """Returns how often a function runs in a second, its first call left out."""
    run()
    start, rounds, seconds = time.perf_counter(), 0, 0.0
    while seconds < MIN_SECONDS:
        run()
        rounds += 1
        seconds = time.perf_counter() - start
    return rounds / seconds


def weight_bytes(reward: Reward) -> int:
    """Returns the bytes of the reward's weights; rewards that share a tower each count it."""
    total = 0
    for leaf in jax.tree.leaves(reward.params):
        total += getattr(leaf, "nbytes", 0)
    return total


def memory_line() -> str:
    """Returns the largest memory of this process so far, and of the device where it tells, as text."""
    text = f"peak memory {peak_memory() / 1e9:.2g} GB"
    device_statistics = jax.local_devices()[0].memory_stats() or {}
    on_device = device_statistics.get("peak_bytes_in_use")
    if on_device:
        text += f", {on_device / 1e9:.2g} GB on the device"
    return text
