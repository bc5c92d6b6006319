"""Which part of an advantage an objective is to see: its positive or negative side, its sign, or all of it.

Works on advantages and not on the optimality r = A / (2 clip) + 1/2 that they become, so that every objective can use
it: what upstream does to r is done here to the advantage that has this r.

Source: `adv_mode` and `r_normalize_mean` in the released code of DiffusionNFT (arXiv 2509.16117) and MARBLE (arXiv
2605.06507).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.objectives.advantages import STD_EPSILON

ADVANTAGE_CLIP = 5.0
"""The largest advantage that counts, unless something else is asked for.

Source: `adv_clip_max` in the released code of DiffusionNFT (arXiv 2509.16117) and MARBLE (arXiv 2605.06507).
"""


@dataclasses.dataclass(frozen=True)
class AdvantageShape:
    """What is made of advantages before an objective sees them.

    Attributes:
      mode: "all" leaves them; "positive_only" and "negative_only" put 0 for the other side; "one_only" puts 1 for what
        is positive and 0 for the rest; "binary" their signs. Each works on advantages cut off at +-clip.
      clip: the largest advantage that counts (`A_max`), > 0.
      r_normalize_mean: shift and scale r to mean 1/2 and standard deviation 1 over the samples, then cut it off at 0
        and 1 (upstream's name, kept).
    """

    mode: str = "all"
    clip: float = ADVANTAGE_CLIP
    r_normalize_mean: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether advantages stay as they are."""
        return self.mode == "all" and not self.r_normalize_mean

    def __call__(
        self, advantages: Float[Array, "n k"], valid: Bool[Array, "n k"]
    ) -> Float[Array, "n k"]:
        """Shaped advantages, 0 where not `valid`.

        Args:
          advantages: of n samples.
          valid: what counts in the mean and the deviation of r.
        """
        if self.is_identity:
            return advantages
        shaped = self._moded(jnp.clip(advantages, -self.clip, self.clip))
        if self.r_normalize_mean:
            shaped = self._normalized(shaped, valid)
        return jnp.where(valid, shaped, 0.0)

    def _moded(self, clipped: Float[Array, "n k"]) -> Float[Array, "n k"]:
        if self.mode == "positive_only":
            return jnp.maximum(clipped, 0.0)
        if self.mode == "negative_only":
            return jnp.minimum(clipped, 0.0)
        if self.mode == "one_only":
            return (clipped > 0).astype(clipped.dtype)
        if self.mode == "binary":
            return jnp.sign(clipped)
        return clipped

    def _normalized(
        self, shaped: Float[Array, "n k"], valid: Bool[Array, "n k"]
    ) -> Float[Array, "n k"]:
        """The advantages whose r is that of `shaped`, normalised over the valid samples of each reward."""
        r = shaped / (2.0 * self.clip) + 0.5
        count = jnp.sum(valid, axis=0)
        mean = jnp.sum(jnp.where(valid, r, 0.0), axis=0) / jnp.maximum(count, 1)
        squares = jnp.where(valid, jnp.square(r - mean), 0.0)
        # Upstream's deviation is that of a sample, over n - 1.
        std = jnp.sqrt(jnp.sum(squares, axis=0) / jnp.maximum(count - 1, 1))
        normalized = jnp.clip((r - mean) / (std + STD_EPSILON) + 0.5, 0.0, 1.0)
        return (normalized - 0.5) * (2.0 * self.clip)
