"""Which prompts a training step draws, and how its images form groups.

A step takes a share of its prompts from every source and asks for several images of each; the images of one draw
are a group, within which they are compared. All of it is a pure function of (seed, step): nothing to save, nothing that
depends on how many devices there are. Two draws of equal texts are two groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from marble_jax.errors import InputError, one_of
from marble_jax.prompts.files import Prompt
from marble_jax.streams import Stream, stream_generator


@dataclasses.dataclass(frozen=True)
class Draw:
    """The N = num_prompts * images_per_prompt samples of a step, the images of a group side by side.

    Attributes:
      prompts: N prompts.
      groups: int32 [N], the draw each sample belongs to, 0 to num_prompts - 1.
      sources: N source names.
    """

    prompts: tuple[Prompt, ...]
    groups: np.ndarray
    sources: tuple[str, ...]


def shares(
    sources: Sequence[str], num_prompts: int, weights: Mapping[str, float] | None = None
) -> dict[str, int]:
    """How many of a step's prompts each source gives: in proportion to its weight, the largest fractions rounded up.

    Args:
      sources: names; ties in the fraction go to the earlier one.
      num_prompts: total to give out.
      weights: relative weights, not negative; None weighs all alike.

    Raises:
      InputError: a weight for an unknown source or none for a known one, a negative weight, or all weights zero.
    """
    if not sources:
        raise InputError("prompt sources: expected at least one; received none")
    if num_prompts < 1:
        raise InputError(f"prompts per step: expected at least 1; received {num_prompts}")
    weights = dict.fromkeys(sources, 1.0) if weights is None else dict(weights)
    for name in weights:
        one_of("source weights", name, sources)
    for name in sources:
        if name not in weights:
            raise InputError(f"source weights: expected a weight for {name!r}; received none")
        if not 0 <= weights[name] < float("inf"):
            raise InputError(
                f"source weights: expected a number >= 0 for {name!r}; received {weights[name]}"
            )
    total = sum(weights[name] for name in sources)
    if total == 0:
        raise InputError("source weights: expected one above 0; received only zeros")
    exact = [num_prompts * weights[name] / total for name in sources]
    counts = [int(x) for x in exact]
    by_fraction = sorted(range(len(sources)), key=lambda i: (-round(exact[i] - counts[i], 9), i))
    for i in by_fraction[: num_prompts - sum(counts)]:
        counts[i] += 1
    return dict(zip(sources, counts))


def draw(
    prompts: Mapping[str, Sequence[Prompt]],
    seed: int,
    step: int,
    num_prompts: int,
    images_per_prompt: int,
    weights: Mapping[str, float] | None = None,
) -> Draw:
    """The samples of a step.

    Every source gives the first prompts of a fresh permutation of its own, which starts again where the source has
    too few; the draws of all sources are then shuffled.

    Args:
      prompts: by source, as from `files.read_directory`.
      seed: of the run, not negative.
      step: not negative.
      num_prompts: groups in the step.
      images_per_prompt: samples in a group.
      weights: see `shares`.

    Raises:
      InputError: as `shares`, an empty source that should give prompts, or images_per_prompt below 1.
    """
    if images_per_prompt < 1:
        raise InputError(f"images_per_prompt: expected at least 1; received {images_per_prompt}")
    names = sorted(prompts)
    counts = shares(names, num_prompts, weights)
    # A generator per source: a source's draw does not depend on the sizes of the others.
    drawn = [
        p
        for i, name in enumerate(names)
        for p in _take(
            prompts[name], name, counts[name], stream_generator(seed, Stream.PROMPTS, step, i)
        )
    ]
    order = stream_generator(seed, Stream.PROMPT_ORDER, step).permutation(num_prompts)
    picked = [drawn[i] for i in order for _ in range(images_per_prompt)]
    groups = np.repeat(np.arange(num_prompts, dtype=np.int32), images_per_prompt)
    return Draw(tuple(picked), groups, tuple(p.source for p in picked))


def _take(
    prompts: Sequence[Prompt], name: str, count: int, generator: np.random.Generator
) -> list[Prompt]:
    if count and not prompts:
        raise InputError(f"source {name!r}: expected at least one prompt; received none")
    if not count:
        return []
    order = generator.permutation(len(prompts))
    return [prompts[order[i % len(prompts)]] for i in range(count)]
