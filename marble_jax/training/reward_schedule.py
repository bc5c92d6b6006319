"""Which rewards teach on which samples of a step: schedules of stages, and reward dropout.

Both only take validity away. A reward outside its stage, or a sample it is to ignore, counts as missing, as if the
reward did not apply there; scores are measured and logged all the same. Everything is a function of (seed, step), so
a resumed run goes on with the same draws.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence

import numpy as np

from marble_jax.errors import InputError, one_of
from marble_jax.streams import Stream, stream_generator

_STAGE = re.compile(r"([^@:]+)(?:@([^@:]+))?(?::(\d+))?")
_FORM = "reward+reward[@source+source][:steps]"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run in which only some rewards are trained on.

    Attributes:
      rewards: the rewards of the stage; all others are missing in it.
      sources: prompt sources drawn from in it; empty for those of the run.
      first: optimiser steps done when it begins. It lasts until the next one begins, the last one to the end.
    """

    rewards: tuple[str, ...]
    sources: tuple[str, ...]
    first: int


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Now and then a reward leaves the samples of others alone.

    At each step every target is dropped with some probability, independently. A dropped reward ignores the samples on
    which a reward that is no target has a score: specialists then have these samples to themselves.

    Attributes:
      targets: rewards that may be dropped.
      probability: of dropping a target, in [0, 1], once warmed up.
      warmup: steps over which the probability rises linearly from 0; 0 for none.

    Source: reward dropout in the released code of MARBLE (arXiv 2605.06507), `max * min(step / warmup, 1)`.
    Deviation: a target's draw is seeded by (seed, step, its name), there by 1000 step + its number alone.
    """

    targets: tuple[str, ...]
    probability: float
    warmup: int = 0

    def dropped(self, seed: int, step: int) -> tuple[str, ...]:
        """The targets that are dropped in a step."""
        chance = self.probability * (min(step / self.warmup, 1.0) if self.warmup else 1.0)
        return tuple(name for name in self.targets if self._draw(seed, step, name) < chance)

    @staticmethod
    def _draw(seed: int, step: int, name: str) -> float:
        return stream_generator(
            seed, Stream.REWARD_DROPOUT, step, zlib.crc32(name.encode())
        ).random()


@dataclasses.dataclass(frozen=True)
class Presence:
    """What takes part in which step; with neither stages nor dropout everything does.

    Attributes:
      stages: in the order of the run, the first from step 0.
      dropout: None for none.
    """

    stages: tuple[Stage, ...] = ()
    dropout: Dropout | None = None

    def stage(self, step: int) -> Stage | None:
        """The stage that the step after `step` steps belongs to."""
        return ([s for s in self.stages if s.first <= step] or [None])[-1]

    def begins(self, step: int) -> bool:
        """Whether that step is the first of a stage other than the first: what alpha knows is of other rewards."""
        return any(s.first == step for s in self.stages[1:])

    def sources(self, step: int) -> tuple[str, ...]:
        """Prompt sources the step draws from; empty for all of the run."""
        stage = self.stage(step)
        return stage.sources if stage else ()

    def mask(self, names: Sequence[str], valid: np.ndarray, seed: int, step: int) -> np.ndarray:
        """Which scores are trained on.

        Args:
          names: the K rewards.
          valid: bool [N, K] scores that are there.
          seed: of the run.
          step: optimiser steps done.

        Returns:
          bool [N, K], `valid` without what is taken away.
        """
        kept, stage = np.array(valid, bool), self.stage(step)
        if stage is not None:
            kept &= np.array([name in stage.rewards for name in names])
        if self.dropout is not None:
            is_target = np.array([name in self.dropout.targets for name in names])
            others = kept[:, ~is_target].any(axis=1, keepdims=True)
            dropped = self.dropout.dropped(seed, step)
            kept &= ~(others & np.array([name in dropped for name in names]))
        return kept

    def metrics(
        self, names: Sequence[str], valid: np.ndarray, mask: np.ndarray
    ) -> dict[str, float]:
        """Share of each reward's scores that the step ignores; empty without stages and dropout."""
        if not self.stages and self.dropout is None:
            return {}
        ignored = (valid & ~mask).sum(axis=0) / np.maximum(valid.sum(axis=0), 1)
        return {
            f"advantages/ignored_share/{name}": float(share)
            for name, share in zip(names, ignored, strict=True)
        }


def parse_stages(
    texts: Sequence[str], rewards: Sequence[str], sources: Sequence[str], num_steps: int
) -> tuple[Stage, ...]:
    """Stages from `reward+reward[@source+source][:steps]`, one text a stage, in their order.

    Either every stage has its steps, and the last one goes on until the run ends, or none has, and they share the
    run evenly.

    Raises:
      InputError: another form, an unknown or repeated name, a reward without a stage, or a stage the run does not
        reach.
    """
    stages: list[Stage] = []
    found = [_parse(text, rewards, sources) for text in texts]
    lengths = [length for _, _, length in found]
    if None in lengths and any(length is not None for length in lengths):
        raise InputError(
            f"reward_schedule.stages: expected steps for every stage or for none; received {tuple(texts)}"
        )
    for i, (own, from_sources, _) in enumerate(found):
        first = i * num_steps // len(found) if None in lengths else sum(lengths[:i])
        if first >= num_steps or stages and stages[-1].first == first:
            raise InputError(
                f"reward_schedule.stages: expected every stage to begin within training.num_steps = "
                f"{num_steps}; received {texts[i]!r} after {first} steps"
            )
        stages.append(Stage(own, from_sources, first))
    for name in rewards if stages else ():
        if not any(name in stage.rewards for stage in stages):
            raise InputError(
                f"reward_schedule.stages: expected every reward of rewards.train in a stage; received none "
                f"with {name!r}"
            )
    return tuple(stages)


def _parse(
    text: str, rewards: Sequence[str], sources: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...], int | None]:
    match = _STAGE.fullmatch(text)
    if not match or match[3] is not None and int(match[3]) < 1:
        raise InputError(
            f"reward_schedule.stages: expected {_FORM} with at least 1 step; received {text!r}"
        )
    own, from_sources = (
        tuple(p.strip() for p in part.split("+")) if part else () for part in (match[1], match[2])
    )
    for what, parts, choices in (("reward", own, rewards), ("source", from_sources, sources)):
        for name in parts:
            one_of(f"reward_schedule.stages: {what}", name, choices)
        if len(set(parts)) < len(parts):
            raise InputError(
                f"reward_schedule.stages: expected every {what} once a stage; received {text!r}"
            )
    return own, from_sources, None if match[3] is None else int(match[3])


def make_dropout(
    targets: Sequence[str], probability: float, warmup: int, rewards: Sequence[str]
) -> Dropout | None:
    """Reward dropout, or None at probability 0.

    Raises:
      InputError: no target, an unknown one, or no reward left that is none.
    """
    for name in targets:
        one_of("reward_schedule.dropout_targets", name, rewards)
    if probability == 0:
        return None
    if not targets or set(targets) >= set(rewards):
        raise InputError(
            "reward_schedule.dropout_targets: expected some of the rewards trained on, but not all; received "
            f"{', '.join(targets) or 'none'}"
        )
    return Dropout(tuple(targets), probability, warmup)
