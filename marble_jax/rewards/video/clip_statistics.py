"""Rewards of clips by formula, without weights: amount of motion, smoothness, flicker.

All compare neighbouring frames pixel by pixel, look at no prompt and apply to every one. A still clip has the best
smoothness and flicker and the least motion, which is why they belong together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from marble_jax.rewards.base import CLIPS
from marble_jax.rewards.formula import FormulaReward
from marble_jax.rewards.registration import BuildContext, NoOptions, register_reward

_SPACE_AND_CHANNELS = (-3, -2, -1)


def motion(clips: jax.Array) -> jax.Array:
    """Returns the mean absolute difference of neighbouring frames [N], in [0, 1], of clips [N, F, H, W, 3].

    Any change counts, also of brightness; a thing that moves counts by the area that it covers and uncovers.
    """
    return jnp.mean(jnp.abs(jnp.diff(clips, axis=1)), (1, 2, 3, 4))


def smoothness(clips: jax.Array) -> jax.Array:
    """Returns minus the mean absolute second difference over time [N], in [-2, 0], of clips [N, F, H, W, 3].

    The second difference is x[t + 1] - 2 x[t] + x[t - 1]. It is taken of pixels, not of positions: a thing with sharp
    edges that moves evenly is not at 0, only a still clip or one that fades evenly is.
    """
    second = jnp.diff(clips, n=2, axis=1)
    return -jnp.mean(jnp.abs(second), (1, 2, 3, 4))


def flicker(clips: jax.Array) -> jax.Array:
    """Returns (255 - mean |difference of neighbouring frames|) / 255 [N] of clips [N, F, H, W, 3] in 8 bit; 1 is still.

    Source: temporal flickering of VBench (arXiv 2311.17982), which takes it of prompts for still scenes alone and reads
    compressed video files; here every prompt counts, and the pixels are as they were drawn.
    """
    eight_bit = jnp.round(jnp.clip(clips, 0, 1) * 255)
    difference = jnp.mean(jnp.abs(jnp.diff(eight_bit, axis=1)), _SPACE_AND_CHANNELS)
    return (255 - jnp.mean(difference, 1)) / 255


@register_reward("motion")
def build_motion(name: str, options: NoOptions, context: BuildContext) -> FormulaReward:
    """Builds the amount of motion."""
    return FormulaReward(name, motion, CLIPS, 2)


@register_reward("smoothness")
def build_smoothness(name: str, options: NoOptions, context: BuildContext) -> FormulaReward:
    """Builds the negative second difference."""
    return FormulaReward(name, smoothness, CLIPS, 3)


@register_reward("flicker")
def build_flicker(name: str, options: NoOptions, context: BuildContext) -> FormulaReward:
    """Builds VBench's formula of flicker."""
    return FormulaReward(name, flicker, CLIPS, 2)
