"""How well an image spells the text its prompt quotes.

The target is what stands between the prompt's first two straight double quotes; what a reader finds in the image is
compared with it by edit distance, after spaces and case are dropped. Prompts without quoted text have no OCR score.

Source: `flow_grpo/ocr.py` of aim-uofa/MARBLE. Three deviations: a target of nothing but spaces is missing (there a
division by zero); a reader that fails makes the sample missing (there a score of 0, kept under `upstream`); the
reader gets its channels in the order it was trained on (there red and blue are swapped).
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.workers.ocr_engines import PaddleEngine, RapidEngine
from marble_jax.rewards.workers.processes import ProcessPool
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params


def quoted_text(prompt: str) -> str | None:
    """What an image of `prompt` should spell, or None if that is nothing.

    The text between the first and the second `"`, or all that follows a single one. None without a quotation mark,
    with nothing quoted, and with only spaces quoted.
    """
    _, mark, rest = prompt.partition('"')
    text = rest.partition('"')[0]
    return text if mark and text.replace(" ", "") else None


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of one character, each at cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def spelling_score(recognised: str, target: str) -> float:
    """1 - d / len(target) in [0, 1], where d is 0 if the target is contained, else the capped edit distance.

    ASCII spaces and case do not count.

    Args:
      recognised: text found in the image.
      target: text that should be there; not only spaces.
    """
    recognised, target = (text.replace(" ", "").lower() for text in (recognised, target))
    if target in recognised:
        return 1.0
    return 1.0 - min(edit_distance(recognised, target), len(target)) / len(target)


class Reader(Protocol):
    """Reads text from images; `read` may be called from several threads at once."""

    def read(self, images: np.ndarray) -> list[str | None]:
        """Texts in `images` uint8 [N, H, W, 3], RGB: lines joined without separator, None where reading failed."""
        ...


class EngineReader:
    """Spreads images over several engines, in threads or in processes.

    Threads start at once and share memory, but an engine's Python part takes turns and a hung engine stays. Processes
    use every core and are replaced when they die or take too long.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[np.ndarray], str]],
        workers: int = 2,
        processes: bool = False,
        timeout: float = 60.0,
    ):
        """Loads the engines.

        Args:
          make: makes an engine, a function of one image.
          workers: engines.
          processes: whether each has a process of its own.
          timeout: seconds an image may take, in a process.

        Raises:
          InputError: an engine cannot be made.
        """
        self._processes = ProcessPool(make, workers, timeout) if processes else None
        if processes:
            return
        self._engines: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(workers):
            self._engines.put(make())
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")

    def read(self, images: np.ndarray) -> list[str | None]:
        """See `Reader.read`."""
        return (
            self._processes.map(images)
            if self._processes
            else list(self._pool.map(self._read_one, images))
        )

    def close(self) -> None:
        """Ends the threads, which finish their images, or the processes, which do not."""
        self._processes.close() if self._processes else self._pool.shutdown()

    def _read_one(self, image: np.ndarray) -> str | None:
        engine = self._engines.get()
        try:
            return engine(image)
        except Exception:  # whatever the backend raises, this one image has no reading
            return None
        finally:
            self._engines.put(engine)


class RapidReader(EngineReader):
    """Reads with RapidOCR."""

    def __init__(
        self,
        detect: bool = True,
        scale: int = 1,
        workers: int = 2,
        processes: bool = False,
        timeout: float = 60.0,
    ):
        """Loads the engines.

        Args:
          detect: find lines first, for images in which text is a part. False hands the whole image to the
            recogniser as one line, for small images that are a sign: about eight times faster.
          scale: factor by which images are enlarged (bicubic) before reading; 3 suits 64 px images.
          workers: see `EngineReader`.
          processes: see `EngineReader`.
          timeout: see `EngineReader`.
        """
        super().__init__(functools.partial(RapidEngine, detect, scale), workers, processes, timeout)


class PaddleReader(EngineReader):
    """Reads with PaddleOCR, in processes: its predictors are not thread-safe and hold the interpreter lock."""

    def __init__(
        self,
        scale: int = 1,
        workers: int = 2,
        timeout: float = 60.0,
        lang: str = "en",
        version: str = "PP-OCRv4",
    ):
        """Loads the engines.

        Args:
          scale: factor by which images are enlarged (bicubic) before reading.
          workers: see `EngineReader`.
          timeout: see `EngineReader`.
          lang: language of the recogniser.
          version: generation of the models, "PP-OCRv3" to "PP-OCRv5".
        """
        super().__init__(
            functools.partial(PaddleEngine, scale, lang, version), workers, True, timeout
        )


class OCRReward(Reward):
    """Spelling of the quoted text, in [0, 1]. A host reward."""

    def __init__(self, name: str, reader: Reader, upstream: bool = False):
        """Builds the reward.

        Args:
          name: key of the reward.
          reader: finds the text in images.
          upstream: score 0 where reading failed, as upstream, instead of leaving the sample out.
        """
        super().__init__(name=name, kind="host")
        self.reader, self.upstream = reader, upstream

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """True for prompts that quote some text."""
        return quoted_text(prompt) is not None

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`; images of prompts without quoted text are not read."""
        targets = [quoted_text(p) for p in prompts]
        asked = [i for i, target in enumerate(targets) if target is not None]
        values, valid = np.zeros(len(targets), np.float32), np.zeros(len(targets), bool)
        if not asked:
            return values, valid
        for i, text in zip(
            asked, self.reader.read(to_uint8(np.asarray(images)[asked])), strict=True
        ):
            if text is not None:
                values[i] = spelling_score(text, targets[i])
            valid[i] = text is not None or self.upstream
        return values, valid
