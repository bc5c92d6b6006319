"""How well an image spells the text its prompt quotes.

The target is what stands between the prompt's first two quotation marks (`prompts.quotations`); what a reader finds in
the image is compared with it by edit distance, after spaces and case are dropped. Prompts without quoted text have no
OCR score.

Source: `flow_grpo/ocr.py` of aim-uofa/MARBLE. Deviations, of which `upstream` keeps the last two: a target of nothing
but spaces is missing (there a division by zero); the reader gets its channels in the order it was trained on (there red
and blue are swapped); a reader that fails makes the sample missing (there a score of 0); texts are compared by what
they look like, and an unmatched mark quotes nothing (there characters are compared as they are stored, and a single
mark quotes the rest).
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from marble_jax.prompts.quotations import quoted_text
from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.frames import FrameChoice
from marble_jax.rewards.registration import BuildContext, option, register_reward
from marble_jax.rewards.workers.ocr_engines import PaddleEngine, RapidEngine, require_engine
from marble_jax.rewards.workers.processes import ProcessPool
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params

_LOOKALIKES = {
    ord(character): plain
    for plain, characters in {
        "'": "\u2018\u2019\u201a\u201b\u02bc\u02b9\u2032\u00b4`",
        '"': "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb",
        "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212",
    }.items()
    for character in characters
}
"""Apostrophes, quotation marks and dashes that compatibility forms keep apart and recognisers do not."""


def edit_distance(a: str, b: str) -> int:
    """Returns the Levenshtein distance: insertions, deletions and substitutions of one character, each at cost 1."""
    # Distances of the part of `a` read so far to every beginning of `b`, row by row of the usual table.
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            substituted = diagonal + (x != y)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def spelling_score(recognised: str, target: str, upstream: bool = False) -> float:
    """Returns 1 - d / len(target) in [0, 1], where d is 0 if the target is contained, else the capped edit distance.

    Spaces and case do not count, nor how a character is stored: composed or not, full-width, as a ligature, with a
    typographic apostrophe.

    Args:
      recognised: text found in the image.
      target: text that should be there; not only spaces.
      upstream: drop ASCII spaces and case alone, as MARBLE's released code.
    """
    form = _upstream_form if upstream else _plain_form
    recognised, target = form(recognised), form(target)
    if target in recognised:
        return 1.0
    distance = min(edit_distance(recognised, target), len(target))
    return 1.0 - distance / len(target)


def _upstream_form(text: str) -> str:
    return text.replace(" ", "").lower()


def _plain_form(text: str) -> str:
    """A text as it is compared: what looks the same is the same."""
    # Twice, as folding the case of a composed letter may decompose it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    letters = []
    for character in folded.translate(_LOOKALIKES):
        # White space of every kind, and what takes no room.
        if not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf"):
            letters.append(character)
    return "".join(letters) or text.casefold()


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
        self._processes: ProcessPool | None = None
        if processes:
            self._processes = ProcessPool(make, workers, timeout)
            return
        self._engines: queue.SimpleQueue[Callable[[np.ndarray], str]] = queue.SimpleQueue()
        for _ in range(workers):
            self._engines.put(make())
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")

    def read(self, images: np.ndarray) -> list[str | None]:
        """See `Reader.read`."""
        if self._processes is not None:
            return self._processes.map(list(images))
        return list(self._pool.map(self._read_one, images))

    def close(self) -> None:
        """Ends the threads, which finish their images, or the processes, which do not."""
        if self._processes is not None:
            self._processes.close()
        else:
            self._pool.shutdown()

    def _read_one(self, image: np.ndarray) -> str | None:
        # Waits for an engine that is free: none serves two images at a time.
        engine = self._engines.get()
        try:
            return engine(image)
        # Whatever the backend raises, this one image has no reading.
        except Exception:
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
          upstream: score as MARBLE's released code: 0 where reading failed, instead of leaving the sample out.
        """
        super().__init__(name=name, kind="host")
        self.reader, self.upstream = reader, upstream

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """True for prompts that quote some text."""
        return quoted_text(prompt, self.upstream) is not None

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Reward.score`; images of prompts without quoted text are not read."""
        targets = _targets(prompts, self.upstream)
        values, valid = np.zeros(len(prompts), np.float32), np.zeros(len(prompts), bool)
        if not targets:
            return values, valid
        # Reading is slow: only images of which a text is wanted.
        texts = self.reader.read(to_uint8(np.asarray(images)[list(targets)]))
        for (index, target), text in zip(targets.items(), texts, strict=True):
            if text is not None:
                values[index] = spelling_score(text, target, self.upstream)
            valid[index] = text is not None or self.upstream
        return values, valid


def _targets(prompts: Sequence[str], upstream: bool) -> dict[int, str]:
    """Returns what images should spell, by the index of their prompt; prompts without quoted text are left out."""
    targets = {}
    for index, prompt in enumerate(prompts):
        target = quoted_text(prompt, upstream)
        if target is not None:
            targets[index] = target
    return targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class OCROptions:
    """Options of the kind "ocr"."""

    engine: str = option("rapidocr", "text recogniser", choices=("rapidocr", "paddleocr"))
    detect: bool = option(True, "find lines first; false takes the image as one line (RapidOCR)")
    scale: int = option(1, "factor by which images are enlarged before reading", least=1, most=16)
    processes: bool = option(False, "an engine in each process rather than thread (RapidOCR)")
    timeout: float = option(60.0, "seconds an image may take, in a process", above=0)


def _check(options: OCROptions) -> None:
    require_engine(options.engine)


@register_reward("ocr", OCROptions, _check)
def build_ocr(name: str, options: OCROptions, context: BuildContext) -> OCRReward:
    """Builds the reward over one of the text recognisers."""
    reader: Reader
    if options.engine == "paddleocr":
        reader = PaddleReader(options.scale, context.num_workers, options.timeout)
    else:
        reader = RapidReader(
            options.detect,
            options.scale,
            context.num_workers,
            options.processes,
            options.timeout,
        )
    return OCRReward(name, reader, context.upstream_scoring)


VIDEO_FRAMES = FrameChoice("count", 3)
"""Frames that are read of a clip where nothing else is said. Flow-GRPO's video OCR reads every fourth and takes the
mean, as "frames": "every:4" does."""


@register_reward("video_ocr", OCROptions, _check)
def build_video_ocr(name: str, options: OCROptions, context: BuildContext) -> Reward:
    """Builds the reward with a choice of frames of its own: mean, or smallest, of the first, middle and last frame."""
    reward = build_ocr(name, options, context)
    reward.frames = VIDEO_FRAMES
    return reward
