"""Frames of clips for rewards that take images: which of them a reward sees, and how their scores become one.

    "all"      every frame
    "first"    the first one alone
    "every:K"  frames 0, K, 2 K and so on
    "count:M"  M frames, evenly spread, the first and the last among them

The chosen frames are folded into the batch, prompts and metadata repeated, and a clip's score is the mean or the
smallest of theirs. A clip has failed if one of its chosen frames has; the reward does not apply to a clip of which it
does not apply to one. A clip of one frame is an image, whatever is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from marble_jax.errors import InputError, nearest, one_of

Reduction = Literal["mean", "min"]
REDUCTIONS = ("mean", "min")
CHOICES = "all, first, every:K, count:M"
"""Choices of frames, as messages list them."""
MAX_IMAGES_PER_CALL = 256
"""Images that frames are folded into at most, unless there are more clips than that: a batch of clips then takes no
more memory in a reward than a batch of images does."""
_LEAST = {"every": 1, "count": 2}
"""Smallest number behind a word; one frame has a word of its own, "first"."""
_CHOICE = re.compile(r"(\w*)(?::([0-9]{1,9}))?", re.ASCII)

Answer = tuple[Any, ...]
"""What `Reward.score` returns: values [N], valid [N] and perhaps a third array [N]."""
ScoreImages = Callable[[Any, Sequence[str], Sequence[Mapping[str, Any]]], Answer]
"""(images, prompts, metadata) -> answer."""


@dataclasses.dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip a reward sees.

    Attributes:
      word: "all", "first", "every" or "count".
      number: K of "every:K", M of "count:M"; 0 for the others.
    """

    word: str
    number: int = 0

    def __str__(self) -> str:
        if self.word in _LEAST:
            return f"{self.word}:{self.number}"
        return self.word

    def indices(self, what: str, num_frames: int) -> tuple[int, ...]:
        """Returns the chosen frames of a clip of `num_frames`, in order.

        Args:
          what: name of the choice, for the message.
          num_frames: of the clip.

        Raises:
          InputError: the clip has too few frames for the choice.
        """
        if self.word == "first":
            return (0,)
        if self.word == "all":
            return tuple(range(num_frames))
        if self.word == "every":
            # A larger step leaves the first frame alone, which has a name.
            if self.number >= max(num_frames, 2):
                raise InputError(
                    f"{what}: expected every:K with K below the {num_frames} frames of a clip; "
                    f"received {self}; did you mean 'first'?"
                )
            return tuple(range(0, num_frames, self.number))
        if self.number > num_frames:
            raise InputError(
                f"{what}: expected count:M with M at most the {num_frames} frames of a clip; "
                f"received {self}; did you mean 'all'?"
            )
        gaps = self.number - 1
        # i (F - 1) / (M - 1), rounded half up; in whole numbers, so that every machine agrees.
        return tuple((2 * i * (num_frames - 1) + gaps) // (2 * gaps) for i in range(self.number))


def parse_frames(what: str, text: str) -> FrameChoice:
    """Returns the choice that a text such as "every:4" names.

    Args:
      what: name of the choice, for the message.
      text: see the module.

    Raises:
      InputError: anything else.
    """
    match = _CHOICE.fullmatch(text)
    word, number = match.groups() if match else ("", None)
    if word in ("all", "first") and number is None:
        return FrameChoice(word)
    if word in _LEAST and number is not None and int(number) >= _LEAST[word]:
        return FrameChoice(word, int(number))
    if word in _LEAST:
        example = {"every": "K of at least 1", "count": "M of at least 2"}[word]
        raise InputError(
            f"{what}: expected {word}: and a whole number {example}; received {text!r}"
        )
    likely = nearest(text.partition(":")[0], ("all", "first", "every", "count"))
    raise InputError(f"{what}: expected one of {CHOICES}; received {text!r}{likely}")


class PixelBatch:
    """A batch of images or clips, cut as rewards take it.

    Each cut is made once: rewards that look through one network know by the array that they see the same images.

    Attributes:
      pixels: as given.
      num_frames: of a clip; 1 for images.
    """

    def __init__(self, pixels: Any):
        """Takes float32 [N, H, W, 3] or [N, F, H, W, 3], of jax or of NumPy."""
        self.pixels = pixels
        self.is_clips = np.ndim(pixels) == 5
        self.num_frames = pixels.shape[1] if self.is_clips else 1
        self._folded: dict[tuple[int, ...], Any] = {}
        self._chosen: dict[tuple[int, ...], Any] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, frames: tuple[int, ...] = (0,)) -> Any:
        """Returns frames as images [N * len(frames), H, W, 3]: those of the first clip, then those of the second."""
        if not self.is_clips:
            return self.pixels
        if frames not in self._folded:
            self._folded[frames] = _fold(self.pixels, frames)
        return self._folded[frames]

    def clips(self, frames: tuple[int, ...] | None = None) -> Any:
        """Returns clips [N, F, H, W, 3], of some of their frames; images are clips of one."""
        if not self.is_clips:
            return self.pixels[:, None]
        if frames is None or frames == tuple(range(self.num_frames)):
            return self.pixels
        if frames not in self._chosen:
            self._chosen[frames] = _choose(self.pixels, frames)
        return self._chosen[frames]


def _choose(clips: Any, frames: tuple[int, ...]) -> Any:
    if isinstance(clips, np.ndarray):
        return clips[:, list(frames)]
    return _choose_on_device(clips, frames)


@functools.partial(jax.jit, static_argnames="frames")
def _choose_on_device(clips: jax.Array, frames: tuple[int, ...]) -> jax.Array:
    return jnp.take(clips, np.array(frames), axis=1)


def _fold(clips: Any, frames: tuple[int, ...]) -> Any:
    """Returns frames of clips [N, F, H, W, 3] as images; every device keeps those of its clips."""
    if isinstance(clips, np.ndarray):
        return clips[:, list(frames)].reshape(-1, *clips.shape[2:])
    sharding = None
    # A tracer lies nowhere yet.
    if not isinstance(clips, jax.core.Tracer) and isinstance(clips.sharding, NamedSharding):
        first_axis = PartitionSpec(*clips.sharding.spec[:1])
        sharding = NamedSharding(clips.sharding.mesh, first_axis)
    return _fold_on_device(clips, frames, sharding)


@functools.partial(jax.jit, static_argnames=("frames", "sharding"))
def _fold_on_device(
    clips: jax.Array, frames: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    chosen = jnp.take(clips, np.array(frames), axis=1)
    images = chosen.reshape(-1, *clips.shape[2:])
    if sharding is None:
        return images
    return jax.lax.with_sharding_constraint(images, sharding)


def frames_per_call(num_clips: int, num_frames: int, needs_full_group: bool) -> int:
    """Returns how many frames of every clip are folded into one call, a divisor of `num_frames`.

    Args:
      num_clips: of the batch.
      num_frames: chosen of every clip.
      needs_full_group: the reward compares the images of a prompt: it sees one frame of each clip at a time, so that
        its groups are made of the same moment.
    """
    if needs_full_group:
        return 1
    most = max(1, MAX_IMAGES_PER_CALL // max(1, num_clips))
    # A divisor, so that all calls have one shape and compile one program.
    return max(k for k in range(1, num_frames + 1) if num_frames % k == 0 and k <= most)


def score_frames(
    score: ScoreImages,
    batch: PixelBatch,
    frames: tuple[int, ...],
    reduction: str,
    needs_full_group: bool,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
) -> Answer:
    """Scores clips with a reward that takes images; traceable where the reward is.

    Args:
      score: the reward.
      batch: N clips.
      frames: that it sees.
      reduction: "mean" or "min" of a clip's frames.
      needs_full_group: see `frames_per_call`.
      prompts: N texts.
      metadata: N mappings.

    Returns:
      See `Reward.score`: of the N clips.

    Raises:
      InputError: another number of scores than images.
    """
    one_of("frame_reduction", reduction, REDUCTIONS)
    size = frames_per_call(len(batch), len(frames), needs_full_group)
    # A clip's frames are neighbours, as `PixelBatch.images` has them.
    texts = [prompt for prompt in prompts for _ in range(size)]
    mappings = [mapping for mapping in metadata for _ in range(size)]
    answers = []
    for start in range(0, len(frames), size):
        images = batch.images(frames[start : start + size])
        answers.append(score(images, texts, mappings))
    return _combine(answers, len(batch), size, reduction)


def _combine(answers: Sequence[Answer], num_clips: int, size: int, reduction: str) -> Answer:
    """Returns one answer for the clips from the answers for `size` frames of each at a time."""
    on_device = any(isinstance(answer[0], jax.Array) for answer in answers)
    columns = []
    for parts in zip(*answers, strict=True):
        columns.append(tuple(_per_clip(part, num_clips, size, on_device) for part in parts))
    if on_device:
        return _reduce_on_device(tuple(columns), reduction)
    return _reduce(np, columns, reduction)


def _per_clip(column: Any, num_clips: int, size: int, on_device: bool) -> Any:
    """Returns what a reward says of images [num_clips * size] as [num_clips, size]."""
    library: Any = jnp if on_device else np
    column = library.asarray(column)
    if column.shape != (num_clips * size,):
        raise InputError(
            f"reward scores: expected shape ({num_clips * size},); received {column.shape}"
        )
    return column.reshape(num_clips, size)


def _reduce(library: Any, columns: Sequence[Sequence[Any]], reduction: str) -> Answer:
    """Returns values, valid and perhaps applies [N] of parts [N, size] of each."""
    values, valid, *narrower = (library.concatenate(parts, 1) for parts in columns)
    # The smallest of a clip's scores would hide one that is infinite, or that stands where there is none.
    is_valid = (valid.astype(bool) & library.isfinite(values)).all(1)
    values = values.mean(1) if reduction == "mean" else values.min(1)
    values = library.where(is_valid, values, 0)
    return (values, is_valid, *(column.astype(bool).all(1) for column in narrower))


@functools.partial(jax.jit, static_argnames="reduction")
def _reduce_on_device(columns: Sequence[Sequence[jax.Array]], reduction: str) -> Answer:
    return _reduce(jnp, columns, reduction)
