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
from marble_jax.rewards.geneval_rules import MAX_OBJECTS, Detection
from marble_jax.rewards.models.encoder import ClipEncoder

GREY = 0x99
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)


class ClipColours:
    """Names the colours of detections of one class; a `geneval_rules.ClassifyColours`."""

    def __init__(self, encoder: ClipEncoder):
        """Builds the classifier over a CLIP pair, possibly shared with rewards."""
        self.encoder = encoder
        self.preprocess = encoder.preprocess(crop="round")
        self._heads = functools.lru_cache(maxsize=None)(self._head)

    def __call__(self, image: np.ndarray, detections: Sequence[Detection]) -> list[str | None]:
        """Returns the colours of objects of one class in `image` uint8 [H, W, 3]."""
        if not detections:
            return []
        # Filled up with zeros to one number of cut-outs, so that the tower is compiled once.
        count = max(len(detections), MAX_OBJECTS)
        size = self.preprocess.size
        pixels = np.zeros((count, size, size, 3), np.float32)
        for index, detection in enumerate(detections):
            pixels[index] = self.preprocess.on_host(cut_out(image, detection))
        features = self.encoder.pixel_features(pixels)[: len(detections)]
        # All are of one class, hence one set of texts.
        head = self._heads(detections[0].label)
        similarities = features @ head.T
        return [COLOURS[index] for index in similarities.argmax(-1)]

    def _head(self, name: str) -> np.ndarray:
        """Returns [10, D]: a unit vector per colour, the mean of its templates'."""
        texts = []
        for colour in COLOURS:
            for template in TEMPLATES:
                texts.append(template.format(colour=colour, name=name))
        features = self.encoder.text_features(self.encoder.params, texts)
        by_colour = features.reshape(len(COLOURS), len(TEMPLATES), -1)
        mean = by_colour.mean(1)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def cut_out(image: np.ndarray, detection: Detection) -> np.ndarray:
    """Returns the object's box of an image uint8 [H, W, 3], grey where its mask is not."""
    left, top, right, bottom = (int(round(edge)) for edge in detection.box)
    if detection.mask is not None:
        # Grey rather than black: a neighbouring object must not lend its colour, nor the filling one of the ten.
        image = np.where(detection.mask[..., None], image, np.uint8(GREY))
    return image[top:bottom, left:right]
