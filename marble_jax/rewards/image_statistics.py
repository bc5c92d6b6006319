"""Rewards by formula, without weights: file size as JPEG, brightness, colourfulness. For experiments and sanity checks.

They apply to every prompt and are easy to maximise, which is what they are for: a run that does not raise them has a
fault elsewhere, and one that raises them too far shows what over-optimisation looks like.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.formula import FormulaReward
from marble_jax.rewards.registration import BuildContext, NoOptions, register_reward
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params

QUALITY = 95
KILOBYTE = 1000
COMPRESSIBILITY_SCALE = 500.0
"""Kilobytes of a large image, by which compressibility is divided: about -0.3 to 0 at 512 pixels."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue. Source: ITU-R BT.601."""


def jpeg_kilobytes(image: np.ndarray) -> float:
    """Returns the size of an image uint8 [H, W, 3] as a JPEG file of quality 95, in thousands of bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / KILOBYTE


class JpegReward(Reward):
    """How well an image compresses, or how badly. A host reward.

    Compressibility is -kilobytes / 500, incompressibility is kilobytes.
    Source: Black et al. 2023 (arXiv 2305.13301); the scales are those of NVlabs/DiffusionNFT.
    """

    def __init__(self, name: str, compressible: bool = True, workers: int = 2):
        """Builds the reward: `compressible` says which of the two; `workers` images are encoded at the same time."""
        super().__init__(name=name, kind="host")
        self.factor = 1.0
        if compressible:
            self.factor = -1 / COMPRESSIBILITY_SCALE
        # Threads are enough: the encoder releases the interpreter lock.
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="jpeg")

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Reward.score`."""
        # `map` keeps the order, whichever image is done first.
        sizes_in_order = self._pool.map(jpeg_kilobytes, to_uint8(images))
        sizes = np.fromiter(sizes_in_order, np.float32, len(images))
        return sizes * np.float32(self.factor), np.ones(len(images), bool)


def brightness(images: jax.Array) -> jax.Array:
    """Returns the mean luma [N] in [0, 1] of images [N, H, W, 3] in [0, 1]."""
    # Full precision: accelerators would round the factors to ten bits.
    luma = jnp.dot(images, jnp.asarray(LUMA), precision="highest")
    return jnp.mean(luma, (1, 2))


def colourfulness(images: jax.Array) -> jax.Array:
    """Returns the spread of colours [N] of images [N, H, W, 3] in [0, 1]: 0 for grey, about 0.6 for the most colourful.

    With rg = R - G and yb = (R + G) / 2 - B: the length of their standard deviations plus 0.3 times that of their
    means. On [0, 255] instead of [0, 1], as usually given, it is 255 times as large.
    Source: Hasler and Suesstrunk 2003, "Measuring colourfulness in natural images".
    """
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    opponents = jnp.stack([red - green, (red + green) / 2 - blue])
    spread = jnp.std(opponents, (2, 3))
    mean = jnp.mean(opponents, (2, 3))
    return _length(spread) + 0.3 * _length(mean)


def _length(vectors: jax.Array) -> jax.Array:
    """Returns the lengths [N] of vectors [2, N]."""
    return jnp.sqrt(jnp.sum(vectors**2, 0))


@register_reward("jpeg_compressibility")
def build_compressibility(name: str, options: NoOptions, context: BuildContext) -> JpegReward:
    """Builds the negative size as JPEG."""
    return JpegReward(name, True, context.num_workers)


@register_reward("jpeg_incompressibility")
def build_incompressibility(name: str, options: NoOptions, context: BuildContext) -> JpegReward:
    """Builds the size as JPEG."""
    return JpegReward(name, False, context.num_workers)


@register_reward("brightness")
def build_brightness(name: str, options: NoOptions, context: BuildContext) -> FormulaReward:
    """Builds the mean luma."""
    return FormulaReward(name, brightness)


@register_reward("colourfulness")
def build_colourfulness(name: str, options: NoOptions, context: BuildContext) -> FormulaReward:
    """Builds the spread of colours."""
    return FormulaReward(name, colourfulness)
