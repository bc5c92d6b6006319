"""GenEval as a reward: a detector's findings under the rules of `geneval_rules`, for prompts with metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.base import Metadata, Reward, SharedNetwork
from marble_jax.rewards.geneval_rules import (
    ClassifyColours,
    Detector,
    GenEvalResult,
    detector_colours,
    evaluate_image,
)
from marble_jax.rewards.registration import DTYPES, BuildContext, option, register_reward
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params
from marble_jax.validation import short


class GenEvalReward(Reward):
    """GenEval's partial score of images whose prompt came with its metadata. A host reward."""

    def __init__(
        self,
        name: str,
        detector: Detector,
        classify: ClassifyColours = detector_colours,
        upstream: bool = False,
        host_networks: Sequence[SharedNetwork] = (),
    ):
        """Builds the reward.

        Args:
          name: key of the reward.
          detector: finds the objects.
          classify: names their colours; by default the detector does.
          upstream: score as MARBLE's released code, unbounded below and with its position bug.
          host_networks: networks that `classify` runs.
        """
        super().__init__(name=name, kind="host")
        self.detector, self.classify, self.upstream = detector, classify, upstream
        self._host_networks = tuple(host_networks)

    def host_networks(self) -> Sequence[SharedNetwork]:
        """See `Reward.host_networks`."""
        return self._host_networks

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """True where the metadata says what to include."""
        return isinstance(metadata, Mapping) and "include" in metadata

    def unknown_classes(self, metadata: Metadata) -> list[str]:
        """Returns the classes of a prompt's clauses that the detector does not know; images of it have no score."""
        known = getattr(self.detector, "labels", None)
        if known is None:
            return []
        clauses = [*metadata["include"], *metadata.get("exclude", ())]
        labels = {clause["class"] for clause in clauses}
        return sorted(labels - set(known))

    def results(
        self, images: Any, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[GenEvalResult | None]:
        """Returns all three scores of each image; None where GenEval does not apply or detection failed.

        Args:
          images: float in [0, 1] or uint8 [N, H, W, 3].
          prompts: N texts.
          metadata: N mappings.
        """
        asked = []
        for index, (prompt, mapping) in enumerate(zip(prompts, metadata, strict=True)):
            # What the detector has no word for would count as not there, whatever the image shows.
            if self.applies(prompt, mapping) and not self.unknown_classes(mapping):
                asked.append(index)
        results: list[GenEvalResult | None] = [None] * len(prompts)
        if not asked:
            return results
        # The detector is slow: it sees only images that have metadata.
        asked_images = to_uint8(np.asarray(images)[asked])
        detected = self.detector.detect(asked_images)
        for index, image, detections in zip(asked, asked_images, detected, strict=True):
            if detections is not None:
                results[index] = evaluate_image(
                    image, detections, metadata[index], self.classify, self.upstream
                )
        return results

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Reward.score`."""
        values, valid = np.zeros(len(prompts), np.float32), np.zeros(len(prompts), bool)
        for index, result in enumerate(self.results(images, prompts, metadata)):
            if result is not None:
                values[index], valid[index] = result.partial, True
        return values, valid


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenEvalOptions:
    """Options of the kind "geneval"."""

    detector: str = option(
        "shapes",
        "'shapes', of the small synthetic world, or 'mask2former', of COCO's objects",
        choices=("shapes", "mask2former"),
    )
    model: str = option("", "folder or Hub name of the Mask2Former network")
    clip: str = option("", "folder or Hub name of the CLIP pair that names colours")
    tokenizer: str = option("", "folder or Hub name of its tokenizer, where its own has none")
    dtype: str = option("", "of the CLIP pair; the run's by default", choices=DTYPES)
    device: str | None = option(
        None, "where PyTorch runs the detector; the GPU of this process by default"
    )
    batch_size: int = option(8, "images a forward pass of the detector", least=1)


def _check(options: GenEvalOptions) -> None:
    if options.detector == "mask2former":
        from marble_jax.rewards.models.mask2former import require_torch

        require_torch()


@register_reward("geneval", GenEvalOptions, _check)
def build_geneval(name: str, options: GenEvalOptions, context: BuildContext) -> GenEvalReward:
    """Builds GenEval over one of its detectors."""
    if options.detector == "shapes":
        # Each detector is imported where it is asked for: one needs PyTorch, the other SciPy.
        from marble_jax.rewards.toy_world.shape_detector import ShapeDetector

        for without_effect in ("model", "clip", "tokenizer", "dtype", "device"):
            if getattr(options, without_effect):
                raise InputError(
                    f"reward {name}: {without_effect}: expected with the detector 'mask2former' alone; received "
                    f"{short(getattr(options, without_effect))} with 'shapes'"
                )
        return GenEvalReward(name, ShapeDetector(), detector_colours, context.upstream_scoring)
    from marble_jax.rewards.models import published
    from marble_jax.rewards.models.clip_colours import ClipColours
    from marble_jax.rewards.models.mask2former import Mask2FormerDetector

    # Required only with this detector, which the options alone cannot say.
    for needed in ("model", "clip"):
        if not getattr(options, needed):
            raise context.missing(name, needed)
    # The colours' pair runs in the reward's worker thread, hence it is declared as a network of the host.
    folder = published.find_folder(name, context.directory, options.model, "mask2former")
    encoder = context.encoders.get(
        name, options.clip, options.tokenizer, options.dtype or context.dtype
    )
    detector = Mask2FormerDetector.load(folder, options.device, batch_size=options.batch_size)
    return GenEvalReward(name, detector, ClipColours(encoder), context.upstream_scoring, (encoder,))
