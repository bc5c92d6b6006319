"""GenEval's detector without mmcv: Mask2Former (Swin-S, COCO instances) as transformers has it, in PyTorch.

A variant of the original. GenEval's numbers were made with mmdetection 2.x and its own training of the same network;
the weights in transformers' layout (facebook/mask2former-swin-small-coco-instance) are those of the authors. Resizing,
normalisation, padding and the way masks become scores and boxes follow mmdetection's test pipeline. Until
`tools/detector_agreement.py` has measured how often the two agree on one set of images, scores should be compared
within this variant only. Images are RGB, as GenEval's own evaluation has them (DiffusionNFT swaps red and blue).

Source: `configs/mask2former/` and `maskformer_fusion_head.py` of open-mmlab/mmdetection 2.x. (The 384 x 384 that the
weights' preprocessor_config.json names serves transformers' examples and is not used.)
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.geneval import MIN_SCORE, Detection

COCO = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
"""COCO's classes in order, under GenEval's names: three are more explicit than COCO's own."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of RGB in [0, 255]."""
SHORT_EDGE, LONG_EDGE, DIVISOR = 800, 1333, 32
"""Pixels: the shorter edge becomes 800 unless the longer would pass 1333; both are padded to multiples of 32."""
MAX_DETECTIONS = 100
"""(query, class) pairs looked at, the likeliest first; a query may appear under several classes."""


class Mask2FormerDetector:
    """Finds COCO's objects with box and mask; see `geneval.Detector`."""

    def __init__(
        self,
        model: Any,
        batch_size: int = 8,
        min_score: float = MIN_SCORE,
        short_edge: int = SHORT_EDGE,
        long_edge: int = LONG_EDGE,
    ):
        """Wraps a loaded network.

        Args:
          model: transformers' `Mask2FormerForUniversalSegmentation`, in evaluation mode, on its device.
          batch_size: images a forward pass.
          min_score: detections of at most this score are left out.
          short_edge: pixels, see SHORT_EDGE.
          long_edge: pixels, see LONG_EDGE.

        Raises:
          InputError: a network that does not know COCO's 80 classes.
        """
        if model.config.num_labels != len(COCO):
            raise InputError(
                f"detector: expected the {len(COCO)} classes of COCO instances; "
                f"received {model.config.num_labels}"
            )
        self.model, self.batch_size, self.min_score = model, batch_size, min_score
        self._edges = short_edge, long_edge
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, directory: Path | str, device: str | None = None, **options: Any
    ) -> Mask2FormerDetector:
        """Loads a directory in transformers' layout (config.json, model.safetensors).

        Args:
          directory: holds the network.
          device: where PyTorch runs it; None is its GPU if it has one.
          **options: of the constructor.

        Raises:
          InputError: no torch, a missing or malformed directory, or tensors that do not fit the network.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise InputError(
                f"{directory}: expected a Mask2Former directory with config.json; received none"
            )
        try:
            import torch
        except ImportError as error:
            raise InputError(
                "reward geneval: expected the package torch for the Mask2Former detector; received none "
                "(pip install 'marble-jax[torch]')"
            ) from error
        from transformers import Mask2FormerForUniversalSegmentation

        try:
            model, found = Mask2FormerForUniversalSegmentation.from_pretrained(
                str(directory), local_files_only=True, output_loading_info=True
            )
        except (
            Exception
        ) as error:  # whatever a damaged file makes the library raise; the cause stays attached
            raise InputError(
                f"{directory}: expected a Mask2Former network; received {type(error).__name__}: "
                f"{(str(error).strip().splitlines() or [''])[0][:200]}"
            ) from error
        for what, keys in (
            ("missing", found["missing_keys"]),
            ("left over", found["unexpected_keys"]),
            ("misshapen", found["mismatched_keys"]),
        ):
            if keys:
                raise InputError(
                    f"{directory}: expected exactly the network's tensors; {what}: {sorted(keys)[0]}"
                )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.eval().to(device), **options)

    def detect(self, images: np.ndarray) -> list[list[Detection] | None]:
        """See `geneval.Detector.detect`; raises what PyTorch raises, such as running out of memory."""
        import torch

        found: list[list[Detection] | None] = []
        with self._lock, torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                part = np.asarray(images[start : start + self.batch_size])
                pixels, size = self._pixels(torch.from_numpy(np.ascontiguousarray(part)))
                out = self.model(pixel_values=pixels)
                for classes, masks in zip(out.class_queries_logits, out.masks_queries_logits):
                    found.append(
                        self._detections(
                            classes.float(), masks.float(), pixels.shape[2:], size, part.shape[1:3]
                        )
                    )
        return found

    def _pixels(self, images: Any) -> tuple[Any, tuple[int, int]]:
        """Images uint8 [N, H, W, 3] as padded pixels [N, 3, h, w], and their height and width before padding."""
        import torch

        images = images.to(self.model.device).permute(0, 3, 1, 2).float()
        height, width = images.shape[2:]
        factor = min(self._edges[0] / min(height, width), self._edges[1] / max(height, width))
        size = int(height * factor + 0.5), int(width * factor + 0.5)
        images = torch.nn.functional.interpolate(
            images, size, mode="bilinear", align_corners=False
        ).round()
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (MEAN, STD))
        right, below = (-size[1] % DIVISOR), (-size[0] % DIVISOR)
        images = torch.nn.functional.pad((images - mean) / std, (0, right, 0, below))
        return images.to(self.model.dtype), size

    def _detections(
        self,
        classes: Any,
        masks: Any,
        padded: tuple[int, int],
        size: tuple[int, int],
        original: tuple[int, int],
    ) -> list[Detection]:
        """One image's detections, best first.

        Args:
          classes: logits [queries, 81], no-object last.
          masks: logits [queries, h, w] of the padded image.
          padded: its height and width.
          size: height and width without padding.
          original: height and width of the image as it came.
        """
        import torch

        likely, pairs = (
            classes.softmax(-1)[:, :-1].flatten().topk(min(MAX_DETECTIONS, classes[:, :-1].numel()))
        )
        pairs, likely = (
            pairs[likely > self.min_score],
            likely[likely > self.min_score],
        )  # masks only lower a score
        if not len(pairs):
            return []
        masks = torch.nn.functional.interpolate(
            masks[pairs // len(COCO)][None], tuple(padded), mode="bilinear", align_corners=False
        )[..., : size[0], : size[1]]
        masks = torch.nn.functional.interpolate(
            masks, tuple(original), mode="bilinear", align_corners=False
        )[0]
        inside = masks > 0
        scores = likely * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        found = []
        for pair, score, mask in zip(pairs.tolist(), scores.tolist(), inside.cpu().numpy()):
            if score > self.min_score and mask.any():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
                found.append(Detection(COCO[pair % len(COCO)], score, box, mask))
        return sorted(found, key=lambda d: -d.score)
