"""HPSv3, a human preference score of a 7-billion-parameter vision-language model, by its authors' package.

    {"hpsv3": {"kind": "hpsv3"}}

`pip install hpsv3` brings the model's code, PyTorch and a GPU's libraries: it is meant for a machine of its own, behind
`marble-jax reward serve --rewards=hpsv3`, which a run reaches by `{"kind": "remote", "urls": [...]}`.

Source: HPSv3 (arXiv 2508.03789), `HPSv3RewardInferencer` of the package hpsv3 1.0.0, which scores an image and a text
by a mean and a spread; the mean, a number without bounds, is the reward.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError, one_line
from marble_jax.rewards.base import Metadata, Reward, RewardError
from marble_jax.rewards.registration import BuildContext, option, register_reward
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class HPSv3Options:
    """Options of the kind "hpsv3"."""

    device: str = option("cuda", "PyTorch device of the model")
    checkpoint: str = option("", "file of its weights; those of the Hub unless given")
    batch_size: int = option(8, "images at once", least=1)


class HPSv3Reward(Reward):
    """The mean of HPSv3's preference score. A host reward."""

    def __init__(self, name: str, inferencer: Any, batch_size: int = 8):
        """Builds the reward.

        Args:
          name: key of the reward.
          inferencer: `HPSv3RewardInferencer`, or what answers like it.
          batch_size: images at once.
        """
        super().__init__(name=name, kind="host")
        self._inferencer = inferencer
        self._batch_size = batch_size
        # One model, which holds one batch at a time.
        self._lock = threading.Lock()

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Reward.score`.

        Raises:
          RewardError: the model answers in another form.
        """
        from PIL import Image

        pictures = [Image.fromarray(pixels) for pixels in to_uint8(images)]
        parts = []
        for start in range(0, len(pictures), self._batch_size):
            end = start + self._batch_size
            with self._lock:
                parts.append(self._means(pictures[start:end], list(prompts[start:end])))
        values = np.concatenate(parts)
        return values, np.isfinite(values)

    def _means(self, pictures: list[Any], prompts: list[str]) -> np.ndarray:
        # By name: programs disagree about which of the two comes first.
        scores = self._inferencer.reward(image_paths=pictures, prompts=prompts)
        if hasattr(scores, "detach"):
            scores = scores.detach().float().cpu().numpy()
        table = np.asarray(scores, np.float64)
        if table.shape != (len(pictures), 2):
            raise RewardError(
                f"HPSv3: expected a mean and a spread of {len(pictures)} images; received shape {table.shape}"
            )
        return table[:, 0].astype(np.float32)


@register_reward("hpsv3", HPSv3Options)
def build_hpsv3(name: str, options: HPSv3Options, context: BuildContext) -> HPSv3Reward:
    """Builds HPSv3, with its weights."""
    try:
        from hpsv3 import HPSv3RewardInferencer
    except ImportError as error:
        raise InputError(
            f"reward {name}: expected the package hpsv3; received none (pip install hpsv3; {one_line(error)})"
        ) from None
    checkpoint = options.checkpoint or None
    inferencer = HPSv3RewardInferencer(checkpoint_path=checkpoint, device=options.device)
    # Its gradients are never asked for, and what they need would fill memory.
    inferencer.model.requires_grad_(False)
    return HPSv3Reward(name, inferencer, options.batch_size)
