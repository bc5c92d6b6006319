"""Whether rewards work: they load, score the golden images as expected, and tell images apart.

A reward that is installed wrongly often looks as if it worked: the same number for every image, or numbers that have
nothing to do with it. What is known of a reward is held against its scores: numbers on record (`golden.json` beside
`rewards.json`), or at least that it answers, that different images get different scores, and that an image's own
prompt beats another's.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError, one_line
from marble_jax.prompts.files import Prompt
from marble_jax.rewards import base
from marble_jax.rewards.base import Result, Reward
from marble_jax.rewards.toy_world import golden_images
from marble_jax.rewards.workers.host_scorer import HostScorer

TOLERANCE, LEAST_TOLERANCE = 0.05, 1e-3
"""Largest difference from a recorded score: a share of the reward's spread over the golden images, and in itself."""
ATTEMPTS = 3
MIN_SECONDS = 1.0
"""For which the throughput is measured."""
BROKEN = {
    "failed": "fails",
    "differs": "scores otherwise",
    "constant": "gives every image the same score",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the check says of one reward.

    Attributes:
      name: of the reward.
      kind: "device" or "host".
      status: "ok"; "failed", "differs" or "constant", which mean that it does not work; "disordered" or "not asked",
        which mean that it may not.
      note: the reason, in one line.
      result: its scores of the golden samples.
    """

    name: str
    kind: str
    status: str
    note: str
    result: Result

    @property
    def broken(self) -> bool:
        """Whether the reward must not be trained on. A host reward may be constant on images as plain as these."""
        return (
            self.status in ("failed", "differs")
            or self.status == "constant"
            and self.kind == "device"
        )

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the reward."""
        return self.status in ("ok", "not asked")

    def mean(self, own: bool) -> float:
        """Mean score with the images' own prompts, or with their partners'; NaN without any."""
        values, valid = (
            self.result.values[0 if own else 1 :: 2],
            self.result.valid[0 if own else 1 :: 2],
        )
        return float(values[valid].mean()) if valid.any() else float("nan")


def look(
    rewards: Sequence[Reward],
    side: int,
    expected: Mapping[str, Sequence[float | None]],
    timeout: float = 120.0,
    batch_size: int = 0,
) -> list[Finding]:
    """Scores the golden samples with every reward, host rewards beside those on the device.

    Args:
      rewards: with distinct names.
      side: pixels of the images.
      expected: recorded scores by reward.
      timeout: seconds a call of a host reward may take.
      batch_size: on the device the samples are cut or filled up to it, so that a program is compiled that the run
        needs anyway; 0 takes them as they are.

    Returns:
      A finding for each reward, in order.
    """
    images, prompts = golden_images.samples(side)
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    applies = {reward.name: base.applicable(reward, texts, metadata) for reward in rewards}
    host = HostScorer(
        [r for r in rewards if r.kind == "host"], max(1, len(rewards)), "retry", ATTEMPTS - 1
    )
    reasons: dict[str, str] = {}
    try:
        pending = host.submit(images, texts, metadata)
        results = {
            r.name: _on_device(r, images, prompts, batch_size, reasons)
            for r in rewards
            if r.kind == "device"
        }
        results |= pending.result(timeout)
        reasons |= host.errors
    finally:
        host.close()
    return [
        _finding(
            reward,
            results[reward.name],
            applies[reward.name],
            expected.get(reward.name),
            reasons.get(reward.name, "no number"),
        )
        for reward in rewards
    ]


def _on_device(
    reward: Reward,
    images: np.ndarray,
    prompts: Sequence[Prompt],
    batch_size: int,
    reasons: dict[str, str],
) -> Result:
    """The scores of the samples; those that a small batch leaves out count as not asked for."""
    count = len(prompts)
    index = np.arange(batch_size or count) % count
    scored = min(len(index), count)
    try:
        result = base.score(
            reward,
            jnp.asarray(images[index]),
            [prompts[i].text for i in index],
            [prompts[i].metadata for i in index],
        )
    except Exception as error:  # a reward is foreign code
        reasons[reward.name] = one_line(error)
        asked = base.applicable(reward, [p.text for p in prompts], [p.metadata for p in prompts])
        return base.all_failed(asked & (np.arange(count) < scored))
    return Result(
        *(
            np.concatenate([column[:scored], np.zeros(count - scored, column.dtype)])
            for column in result
        )
    )


def _finding(
    reward: Reward,
    result: Result,
    applies: np.ndarray,
    expected: Sequence[float | None] | None,
    reason: str,
) -> Finding:
    status, note = _verdict(result, expected, reason)
    return Finding(reward.name, reward.kind, status, note, result)


def _verdict(
    result: Result, expected: Sequence[float | None] | None, reason: str
) -> tuple[str, str]:
    values, valid = result.values.astype(np.float64), result.valid
    asked = int((valid | result.failed).sum())
    if result.failed.any():
        return (
            "failed",
            f"{int(result.failed.sum())} of {asked} golden images without a score: {reason}",
        )
    if expected is not None:
        return _compared(values, valid, expected)
    if not asked:
        return "not asked", "applies to none of the golden images"
    scores = values[valid]
    if len(scores) > 2 and np.ptp(scores) <= 1e-6 * max(1.0, float(np.abs(scores).max())):
        return "constant", f"{scores[0]:.4g} for every golden image"
    own, other = valid[::2] & valid[1::2], values[1::2]
    lead = (values[::2] - other)[own]
    if len(lead) > 2 and np.any(lead != 0) and lead.mean() <= 0:
        return "disordered", f"own prompts score {lead.mean():+.3g} against other images' prompts"
    return "ok", "" if not len(lead) or not np.any(
        lead != 0
    ) else f"own prompts lead by {lead.mean():.3g}"


def _compared(
    values: np.ndarray, valid: np.ndarray, expected: Sequence[float | None]
) -> tuple[str, str]:
    known = np.array([v is not None for v in expected])
    wanted = np.array([0.0 if v is None else v for v in expected], np.float64)
    both = known & valid
    if np.any(valid & ~known) or not np.any(both):
        return "differs", "scores golden images other than those on record"
    spread = float(np.ptp(wanted[known]))
    difference = np.abs(np.where(both, values - wanted, 0.0))
    worst, allowed = int(np.argmax(difference)), max(TOLERANCE * spread, LEAST_TOLERANCE)
    if difference[worst] > allowed:
        return "differs", (
            f"golden image {worst}: expected {wanted[worst]:.4g} within {allowed:.2g}; received "
            f"{values[worst]:.4g}; if the weights are new, reward check --write records them"
        )
    return "ok", f"as on record, within {difference[worst]:.1g}"


def throughput(reward: Reward, side: int, batch_size: int, timeout: float = 120.0) -> float:
    """Images per second in batches of golden images; NaN where the reward fails.

    Counts images that the reward applies to; what is compiled or loaded on first use is not counted.
    """
    images, prompts = golden_images.samples(side)
    asked = np.flatnonzero(
        base.applicable(reward, [p.text for p in prompts], [p.metadata for p in prompts])
    )
    if not asked.size:
        return float("nan")
    index = asked[np.arange(batch_size) % asked.size]
    texts, metadata = [prompts[i].text for i in index], [prompts[i].metadata for i in index]
    batch: Any = jnp.asarray(images[index]) if reward.kind == "device" else images[index]
    scorer = HostScorer([reward] if reward.kind == "host" else [], 1, "fail")

    def once() -> None:
        if reward.kind == "host":
            scorer.submit(batch, texts, metadata).result(timeout)
        else:
            base.score(reward, batch, texts, metadata)

    try:
        once()
        start, rounds = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < MIN_SECONDS or not rounds:
            once()
            rounds += 1
    except Exception:  # `look` says why
        return float("nan")
    finally:
        scorer.close()
    return rounds * batch_size / seconds


def weight_bytes(reward: Reward) -> int:
    """Bytes of the reward's weights; rewards that share a tower each count it."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(reward.params) if hasattr(leaf, "nbytes"))


def recorded(findings: Sequence[Finding]) -> dict[str, list[float | None]]:
    """The scores as `golden.write_expected` takes them."""
    return {
        f.name: [float(v) if good else None for v, good in zip(f.result.values, f.result.valid)]
        for f in findings
    }


def memory() -> str:
    """Largest memory of this process so far, and of the device where it tells."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return f"peak memory {peak / 1e9:.2g} GB" + (
        f", {device / 1e9:.2g} GB on the device" if device else ""
    )


def before_training(
    rewards: Sequence[Reward], side: int, directory: Path | None, batch_size: int, timeout: float
) -> list[str]:
    """The check at the start of a run.

    Args:
      rewards: of the run.
      side, batch_size, timeout: see `look`.
      directory: where recorded scores may lie; None to do without.

    Returns:
      A line for each reward that may not work.

    Raises:
      InputError: a reward is broken.
    """
    findings = look(
        rewards, side, golden_images.read_expected(directory, side), timeout, batch_size
    )
    for finding in findings:
        if finding.broken:
            raise InputError(
                f"reward {finding.name}: expected sound scores of the golden images; received a reward "
                f"that {BROKEN[finding.status]} ({finding.note}); see marble-jax reward check, or "
                "rewards.check=false"
            )
    return [
        f"reward {f.name}: {f.status} on the golden images ({f.note}); right for some rewards, else a sign of a "
        "faulty installation"
        for f in findings
        if not f.passed
    ]
