"""Clips as MP4 files (H.264), for players and pages that know no animated PNG. Lossy: metrics read the PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from marble_jax.errors import InputError

CODEC = "libx264"
QUALITY = "12"
"""Constant rate factor of H.264, where 0 is lossless and 18 is said to look so."""


def check_mp4() -> None:
    """Raises InputError where no encoder is installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--mp4: expected the package av, which encodes; received none (pip install "
            '"marble-jax[mp4]")'
        ) from error


def mp4(frames: np.ndarray, frames_per_second: int) -> bytes:
    """Returns a clip as the content of an MP4 file.

    Args:
      frames: uint8 [F, H, W, 3], at least one frame; of an odd size, the last row or column is repeated.
      frames_per_second: at which it plays.
    """
    import av

    height, width = frames.shape[1:3]
    # Colours are stored for two by two pixels.
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as file:
        # Streams of sound and of subtitles, too, as far as types know.
        stream: Any = file.add_stream(CODEC, rate=frames_per_second)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": QUALITY}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        # What the encoder has held back.
        file.mux(stream.encode())
    return content.getvalue()
