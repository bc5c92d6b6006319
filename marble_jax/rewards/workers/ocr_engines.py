"""Text recognisers behind one call: an image in, the text in it out. Imports no jax, so that processes start fast."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError

PACKAGES = {
    "rapidocr": ("rapidocr", "onnxruntime"),
    "paddleocr": ("paddleocr",),
}
"""Modules of each engine."""


def require_engine(name: str) -> None:
    """Raises InputError where the packages of an engine, a key of PACKAGES, are not installed; imports none."""
    if any(importlib.util.find_spec(module) is None for module in PACKAGES[name]):
        raise _missing(name)


def _missing(name: str) -> InputError:
    if name == "rapidocr":
        return InputError(
            "reward ocr: expected the packages rapidocr and onnxruntime; received neither or one "
            "(pip install 'marble-jax[rewards]')"
        )
    return InputError(
        "reward ocr: expected the packages paddleocr (3.x) and paddlepaddle; received neither "
        "(pip install 'marble-jax[paddle]')"
    )


class RapidEngine:
    """RapidOCR's PP-OCR models in onnxruntime on one core; serves one image at a time."""

    def __init__(self, detect: bool = True, scale: int = 1):
        """Loads the models; arguments as `RapidReader`.

        Raises:
          InputError: RapidOCR is not installed.
        """
        try:
            # Optional, and slow to import.
            import rapidocr
        except ImportError as error:
            raise _missing("rapidocr") from error
        params: dict[str, Any] = {
            # Otherwise there is a line per model, and one per image without text.
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Global.use_det": detect,
            # `_joined` drops lines without any confidence itself, so that both engines do it alike.
            "Global.text_score": 0.0,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.limit_type": "max",
            "Det.limit_side_len": 960,
        }
        if not detect:
            # Lines are padded to at least this width; a square image needs no more than its own.
            params["Rec.rec_img_shape"] = [3, 48, 48]
        self._scale = scale
        self._engine = rapidocr.RapidOCR(params=params)

    def __call__(self, image: np.ndarray) -> str:
        """The text in an image uint8 [H, W, 3], RGB."""
        result = self._engine(_bgr(image, self._scale))
        # Which fields a result has depends on the steps that ran, and they are None where nothing
        # was read.
        texts = getattr(result, "txts", None)
        scores = getattr(result, "scores", None)
        return _joined(texts or (), scores or ())


class PaddleEngine:
    """PaddleOCR 3 on one core, with the PP-OCRv4 models that upstream's PaddleOCR 2.9 has for English."""

    def __init__(self, scale: int = 1, lang: str = "en", version: str = "PP-OCRv4"):
        """Loads the models, which PaddleOCR downloads on first use; arguments as `PaddleReader`.

        Raises:
          InputError: PaddleOCR is not installed.
        """
        try:
            # Optional, and slow to import.
            from paddleocr import PaddleOCR
        except ImportError as error:
            raise _missing("paddleocr") from error
        self._scale = scale
        self._engine = PaddleOCR(
            lang=lang,
            ocr_version=version,
            device="cpu",
            cpu_threads=1,
            text_rec_score_thresh=0.0,
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
        )

    def __call__(self, image: np.ndarray) -> str:
        """The text in an image uint8 [H, W, 3], RGB."""
        (result,) = self._engine.predict(_bgr(image, self._scale))
        return _joined(result["rec_texts"], result["rec_scores"])


def _bgr(image: np.ndarray, scale: int) -> np.ndarray:
    """The image enlarged and in the channel order that both engines' models were trained on."""
    from PIL import Image

    if scale != 1:
        height, width = image.shape[:2]
        size = (width * scale, height * scale)
        enlarged = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        image = np.asarray(enlarged)
    # Red and blue change places; as a copy, since native code need not take a negative stride.
    return np.ascontiguousarray(image[..., ::-1])


def _joined(texts: Sequence[str], scores: Sequence[float]) -> str:
    """The lines read with any confidence, without separator."""
    lines = []
    for text, score in zip(texts, scores, strict=True):
        if score > 0:
            lines.append(text)
    return "".join(lines)
