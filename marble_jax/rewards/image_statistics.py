"""Rewards by formula, without weights: file size as JPEG, brightness, colourfulness. For experiments and sanity checks.

They apply to every prompt and are easy to maximise, which is what they are for: a run that does not raise them has a
fault elsewhere, and one that raises them too far shows what over-optimisation looks like.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.rewards.base import Metadata, Reward
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params

QUALITY = 95
KILOBYTE = 1000
COMPRESSIBILITY_SCALE = 500.0
"""Kilobytes of a large image, by which compressibility is divided: about -0.3 to 0 at 512 pixels."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue. Source: ITU-R BT.601."""


def jpeg_kilobytes(image: np.ndarray) -> float:
    """Size of an image uint8 [H, W, 3] as a JPEG file of quality 95, in thousands of bytes."""
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
        self.factor = -1 / COMPRESSIBILITY_SCALE if compressible else 1.0
        self._pool = ThreadPoolExecutor(
            workers, thread_name_prefix="jpeg"
        )  # the encoder releases the lock

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`."""
        sizes = np.fromiter(
            self._pool.map(jpeg_kilobytes, to_uint8(images)), np.float32, len(images)
        )
        return sizes * np.float32(self.factor), np.ones(len(images), bool)


def brightness(images: jax.Array) -> jax.Array:
    """Mean luma [N] in [0, 1] of images [N, H, W, 3] in [0, 1]."""
    return jnp.mean(jnp.dot(images, jnp.asarray(LUMA), precision="highest"), (1, 2))


def colourfulness(images: jax.Array) -> jax.Array:
    """Spread of colours [N] of images [N, H, W, 3] in [0, 1]: 0 for grey, about 0.6 for the most colourful.

    With rg = R - G and yb = (R + G) / 2 - B: the length of their standard deviations plus 0.3 times that of their
    means. On [0, 255] instead of [0, 1], as usually given, it is 255 times as large.
    Source: Hasler and Suesstrunk 2003, "Measuring colourfulness in natural images".
    """
    red, green, blue = (images[..., i] for i in range(3))
    opposed = jnp.stack([red - green, (red + green) / 2 - blue])
    length = lambda x: jnp.sqrt(jnp.sum(x**2, 0))
    return length(jnp.std(opposed, (2, 3))) + 0.3 * length(jnp.mean(opposed, (2, 3)))


class FormulaReward(Reward):
    """A formula of the images alone. A device reward."""

    def __init__(self, name: str, formula: Callable[[jax.Array], jax.Array]):
        """Builds the reward from a function of images [N, H, W, 3] in [0, 1] to scores [N]."""
        super().__init__(name=name, kind="device")
        self._score = jax.jit(formula)

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`."""
        values = self._score(jnp.asarray(images, jnp.float32))
        return values, jnp.ones(values.shape, bool)
