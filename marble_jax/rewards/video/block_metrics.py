"""Dynamic degree and motion smoothness in VBench's sense, by block matching: held-out metrics of clips.

They answer VBench's two questions with its rules, but not with its networks (RAFT and AMT): numbers of this module
are comparable with each other alone.

Source of the rules: VBench (arXiv 2311.17982), `dynamic_degree.py` and `motion_smoothness.py` of Vchitect/VBench.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from marble_jax.rewards.base import CLIPS
from marble_jax.rewards.formula import FormulaReward
from marble_jax.rewards.registration import BuildContext, NoOptions, option, register_reward
from marble_jax.rewards.video.block_matching import (
    best_shifts,
    enlarged,
    reduced,
    reduction_factor,
    search_radius,
)

COMPARED_FPS = 8.0
"""Frames a second between which motion is looked at."""
FASTEST_SHARE = 0.05
"""Of a frame's pixels, those that move most."""
THRESHOLD = 6.0 / 256
"""Mean shift of those pixels, in shorter sides, above which a pair of frames moves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicOptions:
    """Options of the kind "block_dynamic_degree"."""

    fps: float = option(16.0, "frames a second that the clips are meant to be shown at", above=0)


def dynamic_degree(clips: jax.Array, fps: float) -> jax.Array:
    """Returns 1 for clips that move and 0 for those that do not, float32 [N], of clips [N, F, H, W, 3].

    Of frames at about 8 a second, neighbours are compared; a pair moves if the 5 % of its pixels that move most move by
    more than 6 / 256 of the shorter side on average (more, at less than 8 a second). A clip moves if round(4 n / 16) of
    its n frames' pairs do, and at least one (VBench: none is needed for one or two frames).
    """
    interval = max(1, round(fps / COMPARED_FPS))
    # A clip that is shorter than the interval has its ends compared.
    interval = min(interval, clips.shape[1] - 1)
    chosen = clips[:, ::interval]
    count, num_frames, height, width = chosen.shape[:4]
    needed = max(1, round(4 * num_frames / 16))
    frames = enlarged(reduced(chosen.reshape(-1, height, width, 3)))
    frames = frames.reshape(count, num_frames, *frames.shape[1:])
    short_side = min(frames.shape[2:4])
    threshold = max(1.0, COMPARED_FPS / fps) * THRESHOLD * short_side
    num_fastest = max(1, int(frames.shape[2] * frames.shape[3] * FASTEST_SHARE))

    def moves(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        shift, _ = best_shifts(*pair, radius=search_radius(threshold))
        length = jnp.sqrt(jnp.sum(shift**2, -1)).reshape(count, -1)
        fastest, _ = jax.lax.top_k(length, num_fastest)
        return jnp.mean(fastest, -1) > threshold

    # Pair by pair, [pairs, N, ...]: memory stays that of one.
    in_time = jnp.moveaxis(frames, 1, 0)
    moving = jax.lax.map(moves, (in_time[:-1], in_time[1:]))
    return (jnp.sum(moving, 0) >= needed).astype(jnp.float32)


def motion_smoothness(clips: jax.Array) -> jax.Array:
    """Returns (255 - mean |frame - interpolation|) / 255 [N] of clips [N, F, H, W, 3], in 8 bit; 1 is smooth.

    Every second frame is dropped and interpolated from its neighbours: each pixel is the mean of the two that lie
    opposite to each other, along the shift under which their surroundings agree best. What moves evenly is smooth, up
    to what comes into view and to half pixels.
    """
    height, width = clips.shape[2:4]
    # A dropped frame needs a neighbour on either side.
    last = (clips.shape[1] - 1) // 2 * 2
    before, dropped, after = clips[:, :last:2], clips[:, 1:last:2], clips[:, 2 : last + 1 : 2]
    # As far in each direction as the fastest thing may go that a viewer still follows: an eighth of the shorter side.
    factor = reduction_factor(height, width)
    radius = max(2, round(min(height, width) / factor / 8))

    def error(triple: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        first, middle, second = (reduced(frame) for frame in triple)
        _, interpolated = best_shifts(first, second, radius=radius, symmetric=True)
        return jnp.mean(jnp.abs(_eight_bit(middle) - _eight_bit(interpolated)), (1, 2, 3))

    in_time = tuple(jnp.moveaxis(part, 1, 0) for part in (before, dropped, after))
    errors = jax.lax.map(error, in_time)
    return (255 - jnp.mean(errors, 0)) / 255


def _eight_bit(frames: jax.Array) -> jax.Array:
    return jnp.round(jnp.clip(frames, 0, 1) * 255)


@register_reward("block_dynamic_degree", DynamicOptions)
def build_dynamic_degree(
    name: str, options: DynamicOptions, context: BuildContext
) -> FormulaReward:
    """Builds the share of clips that move, as a score of 1 or 0 for each."""
    formula = functools.partial(dynamic_degree, fps=options.fps)
    return FormulaReward(name, formula, CLIPS, 2)


@register_reward("block_motion_smoothness")
def build_motion_smoothness(name: str, options: NoOptions, context: BuildContext) -> FormulaReward:
    """Builds the agreement of dropped frames with their interpolation."""
    return FormulaReward(name, motion_smoothness, CLIPS, 3)
