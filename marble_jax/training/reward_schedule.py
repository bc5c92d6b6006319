"""Which rewards teach on which samples of a step: a curriculum of stages, and reward dropout.

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
from jaxtyping import Bool

from marble_jax.config import RewardScheduleSettings
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

    At each step (under upstream's rules at each of its timesteps) every target is dropped with some probability,
    independently. A dropped reward ignores the samples on which a reward that is no target has a score: specialists
    then have these samples to themselves.

    Attributes:
      targets: rewards that may be dropped.
      probability: of dropping a target, in [0, 1], once warmed up.
      warmup: steps over which the probability rises linearly from 0; 0 for none.

    Source: reward dropout in the released code of MARBLE (arXiv 2605.06507), `max * min(step / warmup, 1)`.
    Deviation: a target's draw is seeded by (seed, step, its name); there by 1000 step + the number of the timestep, so
    that a step has as many draws as timesteps (`training.upstream_rules`).
    """

    targets: tuple[str, ...]
    probability: float
    warmup: int = 0

    def dropped(self, seed: int, step: int) -> tuple[str, ...]:
        """The targets that are dropped in a step."""
        chance = self.probability
        if self.warmup:
            chance = self.probability * min(step / self.warmup, 1.0)
        return tuple(name for name in self.targets if self._draw(seed, step, name) < chance)

    @staticmethod
    def _draw(seed: int, step: int, name: str) -> float:
        # By its name, so that the draw does not depend on which other rewards there are.
        number = zlib.crc32(name.encode())
        return stream_generator(seed, Stream.REWARD_DROPOUT, step, number).random()


@dataclasses.dataclass(frozen=True)
class RewardSchedule:
    """Which rewards are active in which step; with neither stages nor dropout all of them are.

    Attributes:
      stages: in the order of the run, the first from step 0.
      dropout: None for none.
    """

    stages: tuple[Stage, ...] = ()
    dropout: Dropout | None = None

    def stage(self, step: int) -> Stage | None:
        """The stage that the step after `step` steps belongs to."""
        current = None
        for stage in self.stages:
            if stage.first <= step:
                current = stage
        return current

    def begins(self, step: int) -> bool:
        """Whether that step is the first of a stage other than the first: what alpha knows is of other rewards."""
        # The first stage has no alpha of other rewards behind it.
        return any(stage.first == step for stage in self.stages[1:])

    def sources(self, step: int) -> tuple[str, ...]:
        """Prompt sources the step draws from; empty for all of the run."""
        stage = self.stage(step)
        return stage.sources if stage else ()

    def mask(
        self, names: Sequence[str], valid: Bool[np.ndarray, "n k"], seed: int, step: int
    ) -> Bool[np.ndarray, "n k"]:
        """Which scores are trained on.

        Args:
          names: the K rewards.
          valid: scores that are there.
          seed: of the run.
          step: optimiser steps done.

        Returns:
          `valid` without what is taken away.
        """
        kept = np.array(valid, bool)
        stage = self.stage(step)
        if stage is not None:
            kept &= _members(names, stage.rewards)
        if self.dropout is not None:
            is_target = _members(names, self.dropout.targets)
            is_dropped = _members(names, self.dropout.dropped(seed, step))
            # A dropped reward leaves the samples that a reward which cannot be dropped has a score on.
            has_specialist = kept[:, ~is_target].any(axis=1, keepdims=True)
            kept &= ~(has_specialist & is_dropped)
        return kept

    def metrics(
        self,
        names: Sequence[str],
        valid: Bool[np.ndarray, "n k"],
        mask: Bool[np.ndarray, "n k"],
    ) -> dict[str, float]:
        """Share of each reward's scores that the step ignores; empty without stages and dropout."""
        if not self.stages and self.dropout is None:
            return {}
        ignored = (valid & ~mask).sum(axis=0) / np.maximum(valid.sum(axis=0), 1)
        record = {}
        for name, share in zip(names, ignored, strict=True):
            record[f"advantages/ignored_share/{name}"] = float(share)
        return record


def _members(names: Sequence[str], chosen: Sequence[str]) -> Bool[np.ndarray, " k"]:
    return np.array([name in chosen for name in names], bool)


def reward_schedule_of(
    settings: RewardScheduleSettings,
    rewards: Sequence[str],
    sources: Sequence[str],
    num_steps: int,
) -> RewardSchedule:
    """Stages and reward dropout of a run.

    Args:
      settings: the section of settings.
      rewards: the rewards that are trained on.
      sources: the prompt sources of the run.
      num_steps: optimiser steps of the run.

    Raises:
      InputError: as `parse_stages` and `make_dropout`.
    """
    stages = parse_stages(settings.stages, rewards, sources, num_steps)
    dropout = make_dropout(
        settings.dropout_targets, settings.dropout, settings.dropout_warmup, rewards
    )
    return RewardSchedule(stages, dropout)


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
    parsed = [_parse(text, rewards, sources) for text in texts]
    firsts = _first_steps([length for _, _, length in parsed], texts, num_steps)
    stages: list[Stage] = []
    for text, first, (names, from_sources, _) in zip(texts, firsts, parsed, strict=True):
        is_empty = bool(stages) and stages[-1].first == first
        if first >= num_steps or is_empty:
            raise InputError(
                f"reward_schedule.stages: expected every stage to begin within training.num_steps = "
                f"{num_steps}; received {text!r} after {first} steps"
            )
        stages.append(Stage(names, from_sources, first))
    if stages:
        _check_every_reward_has_a_stage(stages, rewards)
    return tuple(stages)


def _first_steps(lengths: Sequence[int | None], texts: Sequence[str], num_steps: int) -> list[int]:
    """Optimiser steps done when each stage begins."""
    known = [length for length in lengths if length is not None]
    if not known:
        return [number * num_steps // len(lengths) for number in range(len(lengths))]
    if len(known) < len(lengths):
        raise InputError(
            f"reward_schedule.stages: expected steps for every stage or for none; received {tuple(texts)}"
        )
    return [sum(known[:number]) for number in range(len(known))]


def _check_every_reward_has_a_stage(stages: Sequence[Stage], rewards: Sequence[str]) -> None:
    staged = {name for stage in stages for name in stage.rewards}
    for name in rewards:
        if name not in staged:
            raise InputError(
                f"reward_schedule.stages: expected every reward of rewards.train in a stage; received none "
                f"with {name!r}"
            )


def _parse(
    text: str, rewards: Sequence[str], sources: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...], int | None]:
    """Rewards, prompt sources and number of steps of one stage; None where it does not say how long it is."""
    match = _STAGE.fullmatch(text)
    length = int(match[3]) if match and match[3] is not None else None
    if match is None or length == 0:
        raise InputError(
            f"reward_schedule.stages: expected {_FORM} with at least 1 step; received {text!r}"
        )
    names = _parse_names("reward", match[1], rewards, text)
    from_sources = _parse_names("source", match[2] or "", sources, text)
    return names, from_sources, length


def _parse_names(what: str, joined: str, choices: Sequence[str], text: str) -> tuple[str, ...]:
    """The names of `name+name`, each one of `choices` and none twice."""
    if not joined:
        return ()
    names = tuple(part.strip() for part in joined.split("+"))
    for name in names:
        one_of(f"reward_schedule.stages: {what}", name, choices)
    if len(set(names)) < len(names):
        raise InputError(
            f"reward_schedule.stages: expected every {what} once a stage; received {text!r}"
        )
    return names


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
        received = ", ".join(targets) or "none"
        raise InputError(
            "reward_schedule.dropout_targets: expected some of the rewards trained on, but not all; "
            f"received {received}"
        )
    return Dropout(tuple(targets), probability, warmup)
