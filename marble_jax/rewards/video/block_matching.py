"""Displacements between frames by comparing blocks: for each pixel the shift under which its surroundings agree best.

No network, whole pixels only, and a search that ends at a radius: good enough to tell what moves from what does not,
and no substitute for an optical flow network.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 7
"""Edge of the compared surroundings, in pixels; odd."""
PENALTY = 2e-3
"""Of a pixel of shift, in mean absolute difference: where many shifts agree alike, as on plain ground, the least
wins."""
MIN_SHORT_SIDE = 64
"""Pixels of the shorter side: larger frames are reduced by a whole factor before they are compared, down to this at
most, and `enlarged` makes smaller ones as large at least."""


def reduction_factor(height: int, width: int) -> int:
    """Returns the whole number by which frames are reduced before they are compared."""
    return max(1, min(height, width) // MIN_SHORT_SIDE)


def reduced(frames: jax.Array) -> jax.Array:
    """Returns frames [N, H, W, 3] reduced to a shorter side below 2 MIN_SHORT_SIDE; what is left over is cut off."""
    height, width = frames.shape[1:3]
    factor = reduction_factor(height, width)
    rows, columns = height // factor, width // factor
    cut = frames[:, : rows * factor, : columns * factor]
    blocks = cut.reshape(len(frames), rows, factor, columns, factor, 3)
    return blocks.mean((2, 4))


def enlarged(frames: jax.Array) -> jax.Array:
    """Returns frames [N, H, W, 3] enlarged, bilinear, by the least whole factor that gives MIN_SHORT_SIDE.

    Shifts in whole pixels are then told as finely as in larger frames.
    """
    count, height, width, channels = frames.shape
    factor = math.ceil(MIN_SHORT_SIDE / min(height, width))
    if factor <= 1:
        return frames
    shape = (count, height * factor, width * factor, channels)
    return jax.image.resize(frames, shape, "linear")


def shifts(radius: int) -> np.ndarray:
    """Returns int [S, 2], (down, right): every shift of at most `radius` pixels in length, shortest first."""
    reach = np.arange(-radius, radius + 1)
    down, right = np.meshgrid(reach, reach, indexing="ij")
    pairs = np.stack([down.ravel(), right.ravel()], 1)
    lengths = np.hypot(pairs[:, 0], pairs[:, 1])
    order = np.argsort(lengths, kind="stable")
    return pairs[order][lengths[order] <= radius]


def _box_mean(values: jax.Array) -> jax.Array:
    """Returns the mean of each pixel's BLOCK x BLOCK surroundings, of [N, H, W]; edges repeat outwards."""
    margin = BLOCK // 2
    padded = jnp.pad(values, ((0, 0), (margin, margin), (margin, margin)), mode="edge")
    # One axis after the other: 2 BLOCK sums a pixel instead of BLOCK squared.
    for window in ((1, BLOCK, 1), (1, 1, BLOCK)):
        padded = jax.lax.reduce_window(padded, 0.0, jax.lax.add, window, (1, 1, 1), "valid")
    return padded / BLOCK**2


def _shifted(padded: jax.Array, shift: jax.Array, shape: tuple[int, ...], margin: int) -> jax.Array:
    """Returns what lies `shift` (down, right) from each pixel, of frames padded by `margin`."""
    start = (0, margin + shift[0], margin + shift[1], 0)
    return jax.lax.dynamic_slice(padded, start, shape)


_Best = tuple[jax.Array, jax.Array, jax.Array]
"""Of each pixel so far: least cost [N, H, W], its shift [N, H, W, 2] and what lies there [N, H, W, 3]."""


@functools.partial(jax.jit, static_argnames=("radius", "symmetric"))
def best_shifts(
    first: jax.Array, second: jax.Array, radius: int, symmetric: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Finds each pixel's shift between two frames.

    Args:
      first: float32 [N, H, W, 3].
      second: of the same shape.
      radius: longest shift, in pixels.
      symmetric: compare `first` at -d with `second` at +d, as seen from the middle between them, instead of `first`
        at 0 with `second` at +d.

    Returns:
      (shift float32 [N, H, W, 2], down and right; what lies there, float32 [N, H, W, 3]: `second` at +d, or the mean of
      both frames if symmetric).
    """
    margins = ((0, 0), (radius, radius), (radius, radius), (0, 0))
    padded_first = jnp.pad(first, margins, mode="edge")
    padded_second = jnp.pad(second, margins, mode="edge")
    shape = first.shape

    def compare(best: _Best, shift: jax.Array) -> tuple[_Best, None]:
        least, chosen, seen = best
        there = _shifted(padded_second, shift, shape, radius)
        here = first
        matched = there
        if symmetric:
            here = _shifted(padded_first, -shift, shape, radius)
            matched = (here + there) / 2
        length = jnp.sqrt(jnp.sum(shift.astype(jnp.float32) ** 2))
        cost = _box_mean(jnp.mean(jnp.abs(here - there), -1)) + PENALTY * length
        is_better = cost < least
        least = jnp.where(is_better, cost, least)
        chosen = jnp.where(is_better[..., None], shift.astype(jnp.float32), chosen)
        seen = jnp.where(is_better[..., None], matched, seen)
        return (least, chosen, seen), None

    start = (jnp.full(shape[:3], jnp.inf), jnp.zeros((*shape[:3], 2)), jnp.zeros(shape))
    # One shift after the other: all costs at once would be as many times the frames.
    (_, chosen, seen), _ = jax.lax.scan(compare, start, jnp.asarray(shifts(radius)))
    return chosen, seen


def search_radius(threshold: float) -> int:
    """Returns the pixels to search for shifts of which it matters whether they exceed `threshold` pixels."""
    # Twice as far: a mean of shifts has to be able to rise above it.
    return max(2, math.ceil(2 * threshold))
