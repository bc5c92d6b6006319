"""GenEval's colour classifier: zero-shot CLIP on each object, cut out of its image.

What is not the object becomes grey, the box around it is cropped and prepared as OpenCLIP does, and the colour whose
texts lie nearest wins. Weights and towers are those of `encoder.ClipEncoder` (openai/clip-vit-large-patch14 in the
benchmark, whose activation is the quick GELU).

Source: `evaluation/evaluate_images.py` of djghosh13/geneval; `clip_benchmark` for how templates are averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from marble_jax.prompts.composition import COLOURS
from marble_jax.rewards.geneval import MAX_PER_CLASS, Detection
from marble_jax.rewards.models.encoder import ClipEncoder

GREY = 0x99
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)


class ClipColours:
    """Names the colours of detections of one class; a `geneval.ClassifyColours`."""

    def __init__(self, encoder: ClipEncoder):
        """Builds the classifier over a CLIP pair, possibly shared with rewards."""
        self.encoder = encoder
        self.preprocess = encoder.preprocess(crop="round")
        self._heads = functools.lru_cache(maxsize=None)(self._head)

    def __call__(self, image: np.ndarray, detections: Sequence[Detection]) -> list[str | None]:
        """Colours of objects of one class in `image` uint8 [H, W, 3]."""
        if not detections:
            return []
        count, size = max(len(detections), MAX_PER_CLASS), self.preprocess.size
        pixels = np.zeros((count, size, size, 3), np.float32)
        for row, detection in zip(
            pixels, detections
        ):  # filled up, so that the tower is compiled once
            row[:] = self.preprocess.on_host(cut_out(image, detection))
        features = self.encoder.pixel_features(pixels)[: len(detections)]
        return [COLOURS[i] for i in (features @ self._heads(detections[0].label).T).argmax(-1)]

    def _head(self, name: str) -> np.ndarray:
        """[10, D]: a unit vector per colour, the mean of its templates'."""
        texts = [t.format(colour=colour, name=name) for colour in COLOURS for t in TEMPLATES]
        features = self.encoder.text_features(self.encoder.params, texts).reshape(
            len(COLOURS), len(TEMPLATES), -1
        )
        mean = features.mean(1)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def cut_out(image: np.ndarray, detection: Detection) -> np.ndarray:
    """The object's box of an image uint8 [H, W, 3], grey where its mask is not."""
    left, top, right, bottom = (int(round(edge)) for edge in detection.box)
    if detection.mask is not None:
        image = np.where(detection.mask[..., None], image, np.uint8(GREY))
    return image[top:bottom, left:right]
