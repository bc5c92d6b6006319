"""Prompts that a training step draws, and the groups that its images form.

A step takes a share of its prompts from every source and asks for several images of each; the images of one draw
are a group, within which they are compared. What equal shares leave over goes to the sources in turn, from draw to
draw. All of it is a pure function of (seed, step): nothing to save, nothing that depends on how many devices there are.
Two draws of equal texts are two groups, unless they are merged.
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

    def groups_of_equal_prompts(self) -> np.ndarray:
        """int32 [N]: labels that are the same for all images of prompts that are equal but for case and spaces."""
        texts = [" ".join(prompt.text.lower().split()) for prompt in self.prompts]
        _, label = np.unique(texts, return_inverse=True)
        return label.astype(np.int32)


def shares(
    sources: Sequence[str],
    num_prompts: int,
    weights: Mapping[str, float] | None = None,
    order: Sequence[int] | None = None,
) -> dict[str, int]:
    """Number of a draw's prompts from each source, in proportion to its weight; the largest fractions are rounded up.

    Args:
      sources: names.
      num_prompts: total to give out.
      weights: relative weights, not negative; None weighs all alike.
      order: of the sources by number; ties in the fraction go to the earlier one. None is that of `sources`.

    Raises:
      InputError: a weight for an unknown source or none for a known one, a negative weight, or all weights zero.
    """
    if not sources:
        raise InputError("prompt sources: expected at least one; received none")
    if num_prompts < 1:
        raise InputError(f"prompts per step: expected at least 1; received {num_prompts}")
    if weights is None:
        weights = dict.fromkeys(sources, 1.0)
    total = _total_weight(sources, weights)
    exact = [num_prompts * weights[name] / total for name in sources]
    counts = _rounded(exact, num_prompts, order or range(len(sources)))
    return dict(zip(sources, counts))


def check_enough(what: str, num_prompts: int, sources: Sequence[str]) -> None:
    """Raises InputError where prompts of one draw alone are to be shared out and some source would get none.

    Args:
      what: names the setting in the error.
      num_prompts: total to give out.
      sources: names.
    """
    if num_prompts < len(sources):
        raise InputError(
            f"{what}: expected at least {len(sources)}, one for each source ({', '.join(sources)}); received "
            f"{num_prompts}"
        )


def by_source(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts of each source, sources in the order of their first prompts."""
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        found.setdefault(prompt.source, []).append(prompt)
    return found


def spread(total: int, count: int) -> list[int]:
    """`count` indices (all, if there are fewer) evenly from `total`."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def _total_weight(sources: Sequence[str], weights: Mapping[str, float]) -> float:
    """The sum of the sources' weights, which are looked at first."""
    _check_weights(sources, weights)
    total = sum(weights[name] for name in sources)
    if total == 0:
        raise InputError("source weights: expected one above 0; received only zeros")
    return total


def _check_weights(sources: Sequence[str], weights: Mapping[str, float]) -> None:
    for name in weights:
        one_of("source weights", name, sources)
    for name in sources:
        if name not in weights:
            raise InputError(f"source weights: expected a weight for {name!r}; received none")
        # Written so that NaN, which compares as false, is refused.
        if not 0 <= weights[name] < float("inf"):
            raise InputError(
                f"source weights: expected a number >= 0 for {name!r}; received {weights[name]}"
            )


def _rounded(exact: Sequence[float], total: int, order: Sequence[int]) -> list[int]:
    """Integers next to `exact` that sum to `total`: the largest fractions rounded up, earlier ones of `order` first."""
    counts = [int(number) for number in exact]

    def rank(index: int) -> float:
        fraction = exact[index] - counts[index]
        # Rounded, so that fractions which differ by the error of the division are equal and the
        # order decides.
        return -round(fraction, 9)

    # Sorting keeps the order of what ranks alike.
    by_fraction = sorted(order, key=rank)
    num_missing = total - sum(counts)
    for index in by_fraction[:num_missing]:
        counts[index] += 1
    return counts


def draw(
    prompts: Mapping[str, Sequence[Prompt]],
    seed: int,
    step: int,
    num_prompts: int,
    images_per_prompt: int,
    weights: Mapping[str, float] | None = None,
    num_draws: int = 1,
) -> Draw:
    """The samples of a step.

    Every source gives the first prompts of a fresh permutation of its own, which starts again where the source has
    too few; the draws of all sources are then shuffled. With several draws, each gives its part of the prompts in
    this way, so that two of them may give the same prompt. Where the sources do not divide a draw's prompts, those with
    one more change from draw to draw: after as many draws as there are sources, all have given equally many.

    Args:
      prompts: by source, as from `files.read_directory`.
      seed: of the run, not negative.
      step: not negative.
      num_prompts: groups in the step.
      images_per_prompt: samples in a group.
      weights: see `shares`.
      num_draws: parts of the prompts that are drawn apart, a divisor of `num_prompts`.

    Raises:
      InputError: as `shares`, an empty source that should give prompts, images_per_prompt below 1, or a number of
        prompts that the draws do not divide.
    """
    if num_draws > 1:
        parts = _parts(prompts, seed, step, num_prompts, num_draws, weights)
        return _repeated(parts, images_per_prompt)
    if images_per_prompt < 1:
        raise InputError(f"images_per_prompt: expected at least 1; received {images_per_prompt}")
    names = sorted(prompts)
    counts = shares(names, num_prompts, weights, _turns(len(names), num_prompts, seed, step))
    drawn: list[Prompt] = []
    for number, name in enumerate(names):
        # A generator per source: a source's draw does not depend on the sizes of the others.
        generator = stream_generator(seed, Stream.PROMPTS, step, number)
        drawn += _draw_from(prompts[name], name, counts[name], generator)
    # Shuffled, so that a micro-batch or a device holds prompts of every source.
    order = stream_generator(seed, Stream.PROMPT_ORDER, step).permutation(num_prompts)
    return _repeated([drawn[index] for index in order], images_per_prompt)


def _parts(
    prompts: Mapping[str, Sequence[Prompt]],
    seed: int,
    step: int,
    num_prompts: int,
    num_draws: int,
    weights: Mapping[str, float] | None,
) -> list[Prompt]:
    """The prompts of a step whose parts are drawn apart, part by part."""
    if num_prompts % num_draws:
        raise InputError(
            f"prompts per step: expected a multiple of {num_draws} draws; received {num_prompts}"
        )
    names, chosen = sorted(prompts), []
    of_part = num_prompts // num_draws
    for part in range(num_draws):
        drawn: list[Prompt] = []
        order = _turns(len(names), of_part, seed, step * num_draws + part)
        counts = shares(names, of_part, weights, order)
        for number, name in enumerate(names):
            generator = stream_generator(seed, Stream.PROMPTS, step, number, part)
            drawn += _draw_from(prompts[name], name, counts[name], generator)
        places = stream_generator(seed, Stream.PROMPT_ORDER, step, part).permutation(len(drawn))
        chosen += [drawn[index] for index in places]
    return chosen


def _turns(num_sources: int, num_prompts: int, seed: int, number: int) -> list[int]:
    """Numbers of the sources in the order in which a draw's left-over prompts go to them.

    Args:
      num_sources: of the draw.
      num_prompts: of the draw.
      seed: of the run.
      number: of the draw, from the beginning of the run.
    """
    if not num_sources:
        return []
    round_number, turn = divmod(number, num_sources)
    # Another order every round: what happens at every third step, say, would else meet the same sources each time.
    generator = stream_generator(seed, Stream.SOURCE_TURNS, round_number)
    order = generator.permutation(num_sources).tolist()
    # The sources behind those that had the last draw's left-over come first.
    first = turn * (num_prompts % num_sources) % num_sources
    return order[first:] + order[:first]


def _repeated(prompts: Sequence[Prompt], images_per_prompt: int) -> Draw:
    """Every prompt as a group of images."""
    samples: list[Prompt] = []
    for prompt in prompts:
        samples += [prompt] * images_per_prompt
    groups = np.repeat(np.arange(len(prompts), dtype=np.int32), images_per_prompt)
    sources = tuple(prompt.source for prompt in samples)
    return Draw(tuple(samples), groups, sources)


def _draw_from(
    prompts: Sequence[Prompt], name: str, count: int, generator: np.random.Generator
) -> list[Prompt]:
    """`count` prompts of a source, none again before all have been drawn."""
    if not count:
        return []
    if not prompts:
        raise InputError(f"source {name!r}: expected at least one prompt; received none")
    order = generator.permutation(len(prompts))
    return [prompts[order[i % len(prompts)]] for i in range(count)]
