"""Whether rewards work: they load, score the golden images as expected, and tell images apart.

A reward that is installed wrongly often looks as if it worked: the same number for every image, or numbers that have
nothing to do with it. What is known of a reward is held against its scores: numbers on record (`golden.json` beside
`rewards.json`), or at least that it answers, that different images get different scores, and that an image's own
prompt beats another's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError, one_line
from marble_jax.rewards import base
from marble_jax.rewards.base import CLIPS, Metadata, Result, Reward
from marble_jax.rewards.toy_world import golden_clips, golden_images
from marble_jax.rewards.workers.host_scorer import HostScorer, Pending

TOLERANCE, LEAST_TOLERANCE = 0.05, 1e-3
"""Largest difference from a recorded score: a share of the reward's spread over the golden images, and in itself."""
ATTEMPTS = 3
"""Calls that a host reward, which may hang on a network, gets."""

Status = Literal["ok", "failed", "differs", "constant", "disordered", "not asked"]
BROKEN = {
    "failed": "fails",
    "differs": "scores otherwise",
    "constant": "gives every image the same score",
}
"""What a reward does that does not work, by status."""


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """What the check says of one reward.

    Attributes:
      name: of the reward.
      kind: "device" or "host".
      status: "ok"; "failed", "differs" or "constant", which mean that it does not work; "disordered" or "not asked",
        which mean that it may not.
      note: the reason, in one line.
      result: its scores of the golden samples.
      num_frames: of the golden clips it was given; 0 for images.
    """

    name: str
    kind: str
    status: Status
    note: str
    result: Result
    num_frames: int = 0

    @property
    def broken(self) -> bool:
        """Whether the reward must not be trained on."""
        # A host reward may well be constant on images as plain as these: an OCR engine that reads none of them. So may
        # a reward of clips, as what is as slow as in a long golden clip counts as still.
        if self.status == "constant":
            return self.kind == "device" and not self.num_frames
        return self.status in BROKEN

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the reward."""
        return self.status in ("ok", "not asked")

    def mean(self, own_prompts: bool) -> float:
        """Returns the mean score with the images' own prompts, or with their partners'; NaN without any."""
        # Samples alternate: every image with its own prompt, then with its partner's.
        first = 1
        if own_prompts:
            first = 0
        values, valid = self.result.values[first::2], self.result.valid[first::2]
        if not valid.any():
            return float("nan")
        return float(values[valid].mean())


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images float32 [N, H, W, 3] or clips [N, F, H, W, 3] in [0, 1] with their N texts and metadata."""

    pixels: np.ndarray
    texts: list[str]
    metadata: list[Metadata]

    @classmethod
    def golden(cls, side: int, num_frames: int = 0) -> Samples:
        """Returns the golden images at a size in pixels; clips of them where there is a number of frames."""
        if num_frames > 1:
            pixels, prompts = golden_clips.samples(side, num_frames)
        else:
            pixels, prompts = golden_images.samples(side)
        if num_frames == 1:
            pixels = pixels[:, None]
        texts = [prompt.text for prompt in prompts]
        return cls(pixels, texts, [prompt.metadata for prompt in prompts])

    def select(self, index: np.ndarray) -> Samples:
        """Returns the samples int [n], in their order, perhaps repeated."""
        numbers = index.tolist()
        texts = [self.texts[number] for number in numbers]
        return Samples(self.pixels[index], texts, [self.metadata[number] for number in numbers])

    def applicable(self, reward: Reward) -> np.ndarray:
        """Returns bool [N]: which samples the reward applies to."""
        return base.applicable(reward, self.texts, self.metadata)


def golden_frames(reward: Reward, num_frames: int) -> int:
    """Returns the frames of the golden clips that a reward is given; 0 for images, where it takes these.

    Args:
      reward: that is checked.
      num_frames: of the clips that it is for.
    """
    if reward.takes == CLIPS:
        return max(num_frames, reward.min_frames)
    return 0


def is_on_record(num_frames: int) -> bool:
    """Whether scores of golden clips of so many frames, 0 for images, are comparable with recorded ones."""
    return num_frames in (0, golden_clips.NUM_FRAMES)


def run_checks(
    rewards: Sequence[Reward],
    side: int,
    expected: Mapping[str, Sequence[float | None]],
    timeout: float = 120.0,
    batch_size: int = 0,
    num_frames: int = 1,
) -> list[CheckResult]:
    """Scores the golden samples with every reward, host rewards beside those on the device.

    Rewards that take images score images, whatever frames of clips they are to see later.

    Args:
      rewards: with distinct names.
      side: pixels of the images.
      expected: recorded scores by reward.
      timeout: seconds a call of a host reward may take.
      batch_size: on the device the samples are cut or filled up to it, so that a program is compiled that the run
        needs anyway; 0 takes them as they are.
      num_frames: of clips, for rewards that take them.

    Returns:
      A result for each reward, in order.
    """
    lengths = {reward.name: golden_frames(reward, num_frames) for reward in rewards}
    samples = {length: Samples.golden(side, length) for length in set(lengths.values())}
    results: dict[str, Result] = {}
    reasons: dict[str, str] = {}
    with _HostChecks(rewards, lengths, samples) as host:
        for reward in rewards:
            if reward.kind == "device":
                own = samples[lengths[reward.name]]
                results[reward.name] = _score_on_device(reward, own, batch_size, reasons)
        results |= host.results(timeout)
        reasons |= host.reasons()
    checked = []
    for reward in rewards:
        result = results[reward.name]
        reason = reasons.get(reward.name, "no number")
        length = lengths[reward.name]
        recorded = expected.get(reward.name) if is_on_record(length) else None
        status, note = _judge(result, recorded, reason)
        checked.append(CheckResult(reward.name, reward.kind, status, note, result, length))
    return checked


class _HostChecks:
    """Scores of the samples by host rewards, under way; a scorer for those that take images, one a length of clips."""

    def __init__(
        self, rewards: Sequence[Reward], lengths: Mapping[str, int], samples: Mapping[int, Samples]
    ):
        self._scorers: list[HostScorer] = []
        self._pending: list[Pending] = []
        for length, own in samples.items():
            chosen = []
            for reward in rewards:
                if reward.kind == "host" and lengths[reward.name] == length:
                    chosen.append(reward)
            # A thread for each: one that hangs must not keep the others from an answer.
            scorer = HostScorer(chosen, max(1, len(chosen)), "retry", ATTEMPTS - 1)
            self._scorers.append(scorer)
            self._pending.append(scorer.submit(own.pixels, own.texts, own.metadata))

    def __enter__(self) -> _HostChecks:
        return self

    def __exit__(self, *_: object) -> None:
        for scorer in self._scorers:
            scorer.close()

    def results(self, timeout: float) -> dict[str, Result]:
        """Waits for every reward, each call at most `timeout` seconds."""
        results: dict[str, Result] = {}
        for pending in self._pending:
            results |= pending.result(timeout)
        return results

    def reasons(self) -> dict[str, str]:
        """Returns why scores failed, by reward."""
        reasons: dict[str, str] = {}
        for scorer in self._scorers:
            reasons |= scorer.errors
        return reasons


def _score_on_device(
    reward: Reward, samples: Samples, batch_size: int, reasons: dict[str, str]
) -> Result:
    """Returns the scores of the samples; those that a small batch leaves out count as not asked for.

    Why the reward raised, if it did, goes into `reasons`.
    """
    count = len(samples.texts)
    index = np.arange(batch_size or count) % count
    batch = samples.select(index)
    num_scored = min(len(index), count)
    try:
        result = base.score(reward, jnp.asarray(batch.pixels), batch.texts, batch.metadata)
    # A reward is foreign code: whatever it raises is what the check is about.
    except Exception as error:
        reasons[reward.name] = one_line(error)
        scored = np.arange(count) < num_scored
        return base.all_failed(samples.applicable(reward) & scored)
    columns = []
    for column in result:
        padding = np.zeros(count - num_scored, column.dtype)
        columns.append(np.concatenate([column[:num_scored], padding]))
    return Result(*columns)


def _judge(
    result: Result, expected: Sequence[float | None] | None, reason: str
) -> tuple[Status, str]:
    """Returns status and note of a reward's scores.

    Args:
      result: of the golden samples.
      expected: scores on record; None where there are none.
      reason: why scores failed, if any did.
    """
    num_failed = int(result.failed.sum())
    num_asked = num_failed + int(result.valid.sum())
    if num_failed:
        return (
            "failed",
            f"{num_failed} of {num_asked} golden images without a score: {reason}",
        )
    values = result.values.astype(np.float64)
    if expected is not None:
        return _compare(values, result.valid, expected)
    if not num_asked:
        return "not asked", "applies to none of the golden images"
    scores = values[result.valid]
    largest = max(1.0, float(np.abs(scores).max()))
    # Two equal scores may be chance; float32 rounds at 1e-7 of the largest.
    if len(scores) > 2 and np.ptp(scores) <= 1e-6 * largest:
        return "constant", f"{scores[0]:.4g} for every golden image"
    return _check_order(values, result.valid)


def _check_order(values: np.ndarray, valid: np.ndarray) -> tuple[Status, str]:
    """Returns status and note by whether images score higher with their own prompts than with their partners'."""
    both = valid[::2] & valid[1::2]
    lead = (values[::2] - values[1::2])[both]
    # A reward that does not look at the prompt has no lead at all, and nothing is wrong with it.
    if not np.any(lead != 0):
        return "ok", ""
    mean = lead.mean()
    # One or two pairs may be the other way round by chance.
    if len(lead) > 2 and mean <= 0:
        return "disordered", f"own prompts score {mean:+.3g} against other images' prompts"
    return "ok", f"own prompts lead by {mean:.3g}"


def _compare(
    values: np.ndarray, valid: np.ndarray, expected: Sequence[float | None]
) -> tuple[Status, str]:
    """Returns status and note of scores [N] against those on record."""
    recorded = np.array([value is not None for value in expected])
    wanted = np.array([value or 0.0 for value in expected], np.float64)
    both = recorded & valid
    if np.any(valid & ~recorded) or not np.any(both):
        return "differs", "scores golden images other than those on record"
    spread = float(np.ptp(wanted[recorded]))
    allowed = max(TOLERANCE * spread, LEAST_TOLERANCE)
    # What is only on record, or only scored, has no difference: a small batch leaves samples out.
    difference = np.abs(np.where(both, values - wanted, 0.0))
    worst = int(np.argmax(difference))
    if difference[worst] > allowed:
        return "differs", (
            f"golden image {worst}: expected {wanted[worst]:.4g} within {allowed:.2g}; received "
            f"{values[worst]:.4g}; if the weights are new, reward check --write records them"
        )
    return "ok", f"as on record, within {difference[worst]:.1g}"


def recorded_scores(checked: Sequence[CheckResult]) -> dict[str, list[float | None]]:
    """Returns the scores as `golden_images.write_expected` takes them; those that no later check could be held against
    are left out."""
    scores: dict[str, list[float | None]] = {}
    for check in checked:
        if not is_on_record(check.num_frames):
            continue
        row: list[float | None] = []
        for value, valid in zip(check.result.values, check.result.valid, strict=True):
            row.append(float(value) if valid else None)
        scores[check.name] = row
    return scores


def before_training(
    rewards: Sequence[Reward],
    side: int,
    directory: Path | None,
    batch_size: int,
    timeout: float,
    num_frames: int = 1,
) -> list[str]:
    """Checks rewards at the start of a run.

    Args:
      rewards: of the run.
      side, batch_size, timeout, num_frames: see `run_checks`.
      directory: where recorded scores may lie; None to do without.

    Returns:
      A line for each reward that may not work.

    Raises:
      InputError: a reward is broken.
    """
    expected = golden_images.read_expected(directory, side)
    remarks = []
    for check in run_checks(rewards, side, expected, timeout, batch_size, num_frames):
        if check.broken:
            raise InputError(
                f"reward {check.name}: expected sound scores of the golden images; received a reward "
                f"that {BROKEN[check.status]} ({check.note}); see marble-jax reward check, or "
                "rewards.check=false"
            )
        if not check.passed:
            remarks.append(
                f"reward {check.name}: {check.status} on the golden images ({check.note}); right for some rewards, "
                "else a sign of a faulty installation"
            )
    return remarks
