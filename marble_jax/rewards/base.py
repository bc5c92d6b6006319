"""What a reward is: images and prompts in, one number per image and a mask of the numbers that mean something out.

Two kinds share one signature. A *device* reward takes and returns jax arrays and runs where its parameters lie; a
*host* reward works on NumPy arrays and runs beside the device (`workers.host_scorer`). A score can be absent for two
reasons, which stay apart: the reward does not apply to the prompt, or it should have applied and failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards import frames
from marble_jax.rewards.frames import CHOICES, FrameChoice, PixelBatch, Reduction
from marble_jax.types import Params, Scores

Metadata = Mapping[str, Any]
Takes = Literal["images", "clips"]
IMAGES: Takes = "images"
CLIPS: Takes = "clips"


class RewardError(InputError):
    """A reward could not be computed and the run asked not to go on without it; the message is one line."""


class SharedNetwork(Protocol):
    """A network that several rewards may look through."""

    params: Params


@dataclasses.dataclass(eq=False, kw_only=True)
class Reward:
    """Base of all rewards; subclasses implement `score` and, where not every prompt qualifies, `applies`.

    Attributes:
      name: key of the reward in configs, records and logs.
      kind: "device" (jax arrays) or "host" (NumPy arrays, called from a worker thread, hence thread-safe).
      params: frozen weights handed to `score` by default; None for rewards without any.
      takes: "images" [N, H, W, 3] or "clips" [N, F, H, W, 3]; an image is a clip of one frame.
      min_frames: frames that a clip needs at least, for a reward that takes clips.
      frames: which frames of a clip it sees; None for all of them if it takes clips, else for no choice, without which
        clips are refused.
      reduction: how a reward that takes images makes one score of a clip's frames: "mean" or "min".
      needs_full_group: an image's score depends on the other images of its prompt, which have to be in its batch.
      sources: sources of the prompts that the reward is for; empty for all prompts that it applies to.
      frames_per_second: of the clips that `score` is given, fewer than the model's where it sees some frames; None
        where nobody says.
    """

    name: str
    kind: Literal["device", "host"]
    params: Params = None
    takes: Takes = IMAGES
    min_frames: int = 1
    frames: FrameChoice | None = None
    reduction: Reduction = "mean"
    needs_full_group: bool = False
    sources: tuple[str, ...] = ()
    frames_per_second: float | None = None

    def is_for(self, source: str) -> bool:
        """Whether the reward is for prompts of a source."""
        return not self.sources or source in self.sources

    def inquire(self) -> None:
        """Asks whoever computes the reward elsewhere for what only they know, `needs_full_group`; nothing for others.

        Raises:
          RewardError: there is no answer.
        """

    def networks(self) -> Sequence[SharedNetwork]:
        """Returns the networks whose weights are part of `params`; they move to the devices with it."""
        return ()

    def host_networks(self) -> Sequence[SharedNetwork]:
        """Returns the networks that `score` runs from worker threads; their weights stay on this host."""
        return ()

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """Whether an image of this prompt can be scored at all."""
        return True

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[Any, ...]:
        """Scores a batch.

        Args:
          params: the reward's weights (`self.params`, or a copy laid out over a mesh).
          images: float32 [N, H, W, 3] in [0, 1], or [N, F, H, W, 3] for a reward that takes clips; a jax array for a
            device reward, NumPy for a host reward.
          prompts: N texts.
          metadata: N mappings; empty where the prompt came without.

        Returns:
          (values float32 [N], valid bool [N]). Where the reward applies and `valid` is False, or the value is not
          finite, the reward failed on that image. A host reward that learns only from its backend what it applies
          to returns a third array, bool [N], that narrows `applies`.
        """
        raise NotImplementedError


class Result(NamedTuple):
    """One reward on N images: `values` float32 [N] (0 where not valid), `valid` bool [N], `failed` bool [N]."""

    values: np.ndarray
    valid: np.ndarray
    failed: np.ndarray


def check_frames(reward: Reward, num_frames: int) -> tuple[int, ...]:
    """Returns the frames that a reward sees of clips of `num_frames`.

    Raises:
      InputError: a reward of images has no choice of frames, or there are too few for the choice or for the reward.
    """
    what = f"reward {reward.name}"
    indices = tuple(range(num_frames))
    if reward.frames is not None and num_frames > 1:
        indices = reward.frames.indices(f"{what}: frames", num_frames)
    elif reward.takes == IMAGES and num_frames > 1:
        raise InputError(
            f"{what}: expected a choice of frames, as it takes images and is given clips: rewards.frames, or "
            f"frames of its entry, one of {CHOICES}; received none for clips of {num_frames} frames"
        )
    if reward.takes == CLIPS and len(indices) < reward.min_frames:
        of_them = ""
        if len(indices) < num_frames:
            of_them = f" of {num_frames} ({reward.frames})"
        raise InputError(
            f"{what}: expected clips of at least {reward.min_frames} frames; received "
            f"{len(indices)}{of_them}"
        )
    return indices


def seen_rate(reward: Reward, num_frames: int, rate: float | None) -> float | None:
    """Returns frames a second of the frames that a reward sees, on average where they are not evenly spread.

    Args:
      reward: that sees clips.
      num_frames: of a clip.
      rate: of the whole clip; None where it is not known.

    Raises:
      InputError: see `check_frames`.
    """
    indices = check_frames(reward, num_frames)
    # Of one frame there is no rate.
    if rate is None or len(indices) < 2:
        return None
    return rate * (len(indices) - 1) / (indices[-1] - indices[0])


def seen_frames(reward: Reward) -> str:
    """Returns which frames of a clip a reward sees, in words: "all", "count:3, mean of scores"; "-" for no choice."""
    if reward.takes == CLIPS:
        return str(reward.frames or "all")
    if reward.frames is None:
        return "-"
    # One frame has one score.
    if reward.frames.word == "first":
        return "first"
    return f"{reward.frames}, {reward.reduction} of scores"


def check_default_frames(rewards: Sequence[Reward], frames: str, num_frames: int) -> None:
    """Checks that a run's choice of frames is one that a reward goes by.

    Args:
      rewards: of the run, loaded with that choice.
      frames: the choice; empty for none.
      num_frames: of a sample.

    Raises:
      InputError: each reward that takes images has a choice of its own, and that is another one.
    """
    choices = {str(reward.frames) for reward in rewards if reward.takes == IMAGES}
    # Images, and rewards of clips alone, have no use for a choice: a preset's may stand.
    if num_frames == 1 or not choices or frames in ("", *choices):
        return
    own = " or ".join(sorted(choices))
    raise InputError(
        f"rewards.frames: expected {own} or nothing, as each reward of images has a choice of its own (frames of its "
        f"entry in rewards.json); received {frames!r}"
    )


def call(
    reward: Reward,
    params: Params,
    batch: PixelBatch,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> tuple[Any, ...]:
    """Returns `Reward.score` of images or clips, whichever of them the reward takes.

    Raises:
      InputError: see `check_frames`.
      RewardError: see `Reward.inquire`.
    """
    # Only a run asks before the first call.
    reward.inquire()
    indices = check_frames(reward, batch.num_frames)
    if reward.takes == CLIPS:
        return reward.score(params, batch.clips(indices), prompts, metadata)
    if batch.num_frames == 1:
        return reward.score(params, batch.images(), prompts, metadata)

    def score_images(
        images: Any, texts: Sequence[str], mappings: Sequence[Metadata]
    ) -> tuple[Any, ...]:
        return reward.score(params, images, texts, mappings)

    return frames.score_frames(
        score_images,
        batch,
        indices,
        reward.reduction,
        reward.needs_full_group,
        prompts,
        metadata,
    )


def applicable(reward: Reward, prompts: Sequence[str], metadata: Sequence[Metadata]) -> np.ndarray:
    """Returns bool [N]: which prompts `reward` applies to."""
    pairs = zip(prompts, metadata, strict=True)
    return np.array([reward.applies(prompt, mapping) for prompt, mapping in pairs], bool)


def to_result(values: Any, valid: Any, applies: np.ndarray) -> Result:
    """Turns what `score` returned into a Result: numbers that are not finite count as failures, not as scores.

    Args:
      values: [N] scores.
      valid: bool [N] as returned by the reward.
      applies: bool [N] from `applicable`.

    Raises:
      RewardError: another number of scores than N.
    """
    # A number that float32 cannot hold becomes infinite and is a failure below: no cause for a warning.
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    if values.shape != applies.shape:
        raise RewardError(f"reward scores: expected shape {applies.shape}; received {values.shape}")
    valid = np.asarray(valid, bool) & np.isfinite(values) & applies
    # Invalid values become 0 rather than NaN, which would survive a multiplication with a mask.
    return Result(np.where(valid, values, np.float32(0)), valid, applies & ~valid)


def without_broken_images(result: Result, finite: np.ndarray) -> Result:
    """Returns a Result in which images that hold NaN or infinity have failed, whatever a reward made of them.

    Args:
      result: of N images.
      finite: bool [N], from `finite_images`.
    """
    failed = result.failed | (result.valid & ~finite)
    valid = result.valid & finite
    return Result(np.where(valid, result.values, np.float32(0)), valid, failed)


def of_sources(result: Result, asked: np.ndarray) -> Result:
    """Returns a Result in which the reward applies only where `asked`, bool [N], is True."""
    valid = result.valid & asked
    return Result(np.where(valid, result.values, np.float32(0)), valid, result.failed & asked)


def spread_out(result: Result, rows: np.ndarray, count: int) -> Result:
    """Returns a Result of `count` samples from one of those at `rows`, int [n]; the reward applies to no other."""
    columns = []
    for column in result:
        whole = np.zeros(count, column.dtype)
        whole[rows] = column
        columns.append(whole)
    return Result(*columns)


def finite_images(images: Any) -> Any:
    """Returns bool [N]: which of N images or clips hold nothing but finite numbers; traceable."""
    library: Any = jnp
    if isinstance(images, np.ndarray):
        # No way to a device and back for what lies on the host.
        library = np
    return library.isfinite(images).all(axis=tuple(range(1, images.ndim)))


def all_failed(applies: np.ndarray) -> Result:
    """Returns the Result of a call that gave nothing: failed wherever the reward applies."""
    return to_result(np.zeros(applies.shape), np.zeros(applies.shape, bool), applies)


def score(
    reward: Reward,
    images: Any,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    params: Params = None,
) -> Result:
    """Scores images or clips with one reward, here and now; `params` replaces the reward's own when given."""
    applies = applicable(reward, prompts, metadata)
    if not applies.any():
        return all_failed(applies)
    if reward.kind == "host":
        images = np.asarray(images, np.float32)
    if params is None:
        params = reward.params
    values, valid, *narrower = call(reward, params, PixelBatch(images), prompts, metadata)
    for narrow in narrower:
        applies = applies & np.asarray(narrow, bool)
    finite = np.asarray(finite_images(images))
    return without_broken_images(to_result(values, valid, applies), finite)


def stack(results: Mapping[str, Result]) -> Scores:
    """Returns results by reward name as one `Scores`, in the mapping's order."""
    # Samples are the first axis of every array of scores, rewards the second.
    values, valid, failed = (np.stack(column, axis=1) for column in zip(*results.values()))
    return Scores(tuple(results), values, valid, failed)


def concatenate(parts: Sequence[Scores], count: int) -> Scores:
    """Returns the scores of several batches as one, cut to `count` samples (the last batch may have been filled up)."""
    # Samples are the first axis.
    values = np.concatenate([part.values for part in parts])[:count]
    valid = np.concatenate([part.valid for part in parts])[:count]
    failed = np.concatenate([part.failed for part in parts])[:count]
    return Scores(parts[0].names, values, valid, failed)
