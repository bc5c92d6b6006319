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

import importlib.util
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.errors import InputError, one_line
from marble_jax.rewards.geneval_rules import SCORE_THRESHOLD, Detection
from marble_jax.rewards.models.torch_device import torch_device

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


def require_torch() -> None:
    """Raises InputError where PyTorch, which runs the detector, is not installed; does not import it."""
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "reward geneval: expected the package torch for the Mask2Former detector; received none "
            "(pip install 'marble-jax[geneval]')"
        )


class Mask2FormerDetector:
    """Finds COCO's objects with box and mask; see `geneval_rules.Detector`."""

    def __init__(
        self,
        model: Any,
        batch_size: int = 8,
        min_score: float = SCORE_THRESHOLD,
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

    @property
    def labels(self) -> tuple[str, ...]:
        """See `geneval_rules.Detector.labels`."""
        return COCO

    @classmethod
    def load(
        cls, directory: Path | str, device: str | None = None, **options: Any
    ) -> Mask2FormerDetector:
        """Loads a directory in transformers' layout (config.json, model.safetensors).

        Args:
          directory: holds the network.
          device: where PyTorch runs it; None is the GPU that JAX has in this process, else PyTorch's own, else the CPU.
          **options: of the constructor.

        Raises:
          InputError: no torch, a missing or malformed directory, or tensors that do not fit the network.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise InputError(
                f"{directory}: expected a Mask2Former directory with config.json; received none"
            )
        require_torch()
        import torch
        from transformers import Mask2FormerForUniversalSegmentation

        # Without a type: the stub does not know that the loading information makes the answer a pair.
        network_class: Any = Mask2FormerForUniversalSegmentation
        try:
            model, loading = network_class.from_pretrained(
                str(directory),
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
        # Whatever a damaged file makes the library raise; the cause stays attached.
        except Exception as error:
            raise InputError(
                f"{directory}: expected a Mask2Former network; received {_shortened(error)}"
            ) from error
        _check_loading(directory, loading)
        if device is None:
            device = torch_device(torch)
        # Evaluation mode: dropout would make scores random.
        model = model.eval()
        return cls(model.to(device), **options)

    def detect(self, images: np.ndarray) -> list[list[Detection] | None]:
        """See `geneval_rules.Detector.detect`; raises what PyTorch raises, such as running out of memory."""
        import torch

        detections: list[list[Detection] | None] = []
        # PyTorch modules are not made for several threads, of which a host reward has some.
        with self._lock, torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = np.ascontiguousarray(images[start : start + self.batch_size])
                detections += self._detect_batch(torch.from_numpy(batch))
        return detections

    def _detect_batch(self, images: Any) -> list[list[Detection]]:
        """Returns the detections of images uint8 [N, H, W, 3], a tensor."""
        pixels, size = self._pixels(images)
        output = self.model(pixel_values=pixels)
        detections = []
        for classes, masks in zip(output.class_queries_logits, output.masks_queries_logits):
            # What a network in half precision gives is scored in float32.
            classes, masks = classes.float(), masks.float()
            queries, labels, likely = self._likeliest(classes)
            if len(queries):
                masks = _resized_masks(masks[queries], pixels.shape[2:], size, images.shape[1:3])
                detections.append(self._from_masks(labels, likely, masks))
            else:
                detections.append([])
        return detections

    def _pixels(self, images: Any) -> tuple[Any, tuple[int, int]]:
        """Returns images uint8 [N, H, W, 3] as padded pixels [N, 3, h, w], and their size before padding."""
        import torch

        # Channels first, PyTorch's layout.
        images = images.to(self.model.device)
        images = images.permute(0, 3, 1, 2).float()
        height, width = images.shape[2:]
        short_edge, long_edge = self._edges
        factor = min(short_edge / min(height, width), long_edge / max(height, width))
        size = int(height * factor + 0.5), int(width * factor + 0.5)
        # Rounded, as the original's resize works on 8-bit images.
        images = _bilinear(images, size).round()
        mean = torch.tensor(MEAN, device=images.device)[:, None, None]
        std = torch.tensor(STD, device=images.device)[:, None, None]
        right, below = -size[1] % DIVISOR, -size[0] % DIVISOR
        images = torch.nn.functional.pad((images - mean) / std, (0, right, 0, below))
        return images.to(self.model.dtype), size

    def _likeliest(self, classes: Any) -> tuple[Any, Any, Any]:
        """Returns the likeliest (query, class) pairs of an image: queries, labels and likelihoods, each [n].

        Args:
          classes: logits [queries, 81], no-object last.
        """
        # Without no-object, which is last.
        of_classes = classes.softmax(-1)[:, :-1]
        likelihoods = of_classes.flatten()
        likely, pairs = likelihoods.topk(min(MAX_DETECTIONS, likelihoods.numel()))
        # Masks only lower a score: what is below the threshold already needs none.
        above = likely > self.min_score
        pairs, likely = pairs[above], likely[above]
        return pairs // len(COCO), pairs % len(COCO), likely

    def _from_masks(self, labels: Any, likely: Any, masks: Any) -> list[Detection]:
        """Returns an image's detections, best first.

        Args:
          labels: [n] indices into COCO.
          likely: [n] their likelihoods.
          masks: logits [n, H, W] of the image as it came.
        """
        inside = masks > 0
        # Mean confidence over the pixels inside; 1e-6 keeps an empty mask at 0.
        total = (masks.sigmoid() * inside).sum((1, 2))
        confidence = total / (inside.sum((1, 2)) + 1e-6)
        scores = (likely * confidence).tolist()
        detections = []
        for label, score, mask in zip(labels.tolist(), scores, inside.cpu().numpy()):
            if score > self.min_score and mask.any():
                detections.append(Detection(COCO[label], score, _box(mask), mask))
        return sorted(detections, key=lambda detection: -detection.score)


def _bilinear(images: Any, size: Sequence[int]) -> Any:
    """Returns images [N, C, h, w] resized as mmdetection does."""
    import torch

    return torch.nn.functional.interpolate(
        images, tuple(size), mode="bilinear", align_corners=False
    )


def _resized_masks(
    masks: Any, padded: Sequence[int], size: Sequence[int], original: Sequence[int]
) -> Any:
    """Returns mask logits at the size of the image as it came.

    Args:
      masks: [n, h, w] of the padded image.
      padded: its height and width.
      size: height and width without padding.
      original: height and width of the image as it came.
    """
    # The padding is cut off between two resizes, as its edge falls on whole pixels only there.
    masks = _bilinear(masks[None], padded)[..., : size[0], : size[1]]
    return _bilinear(masks, original)[0]


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the tight box of a mask bool [H, W] with some True."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    # A pixel is a square: the last one ends where the next would begin.
    right, bottom = columns[-1] + 1, rows[-1] + 1
    return float(columns[0]), float(rows[0]), float(right), float(bottom)


def _check_loading(directory: Path, loading: Mapping[str, Any]) -> None:
    """Raises InputError for tensors that the files lack, or have and the network does not."""
    for problem, key in (
        ("missing", "missing_keys"),
        ("left over", "unexpected_keys"),
        ("misshapen", "mismatched_keys"),
    ):
        if loading[key]:
            first = sorted(loading[key])[0]
            raise InputError(
                f"{directory}: expected exactly the network's tensors; {problem}: {first}"
            )


def _shortened(error: Exception) -> str:
    """Returns an error of the library in one line, which may be very long."""
    return one_line(error)[:200]
