"""Measured steps as what every figure is made of: the inner products of all their gradients with each other.

A direction is a weighted sum of a step's gradients, and so is a mean over steps; every length and cosine of such sums
follows from the matrix of inner products, float64 [T, R, T, R], and no gradient is looked at again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from marble_jax.errors import InputError
from marble_jax.storage.files import read_json
from tools.harmony.collect import DESCRIPTION, measured, step_file
from tools.harmony.units import Units

_COLUMNS = 65_536
"""Parameters whose products are taken at once: a block of all gradients in float64 stays below 200 MB."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """T steps at one policy under R objectives, of which the first K are the rewards.

    Attributes:
      rewards: names of the K rewards.
      cross: float64 [T, R, T, R] inner products of the whole-step gradients.
      active: bool [T, R], the objective has a valid sample and a gradient other than 0 in the step.
      advantages: float32 [T, N, R] of every image, 0 where missing.
      units: by number of samples, those of all steps: gram [T, U, R, R] and counts [T, U, R].
    """

    rewards: tuple[str, ...]
    cross: np.ndarray
    active: np.ndarray
    advantages: np.ndarray
    units: Mapping[int, Units]

    def __len__(self) -> int:
        return len(self.cross)

    @property
    def num_rewards(self) -> int:
        """K."""
        return len(self.rewards)

    @property
    def grams(self) -> Float[np.ndarray, "t r r"]:
        """Gram matrix of every step."""
        index = np.arange(len(self))
        return self.cross[index, :, index, :]

    def vectors(self) -> Float[np.ndarray, "t r m"]:
        """Short vectors with the inner products of the gradients, M = T R, for rules that want gradients to add up."""
        num_steps, num_objectives = self.cross.shape[:2]
        size = num_steps * num_objectives
        both = self.active[:, :, None, None] & self.active[None, None]
        gram = np.where(both, self.cross, 0.0).reshape(size, size)
        values, basis = np.linalg.eigh(gram)
        # Rounding can leave an eigenvalue slightly below 0.
        rows = basis * np.sqrt(np.maximum(values, 0.0))
        return rows.reshape(num_steps, num_objectives, size)

    def take(self, index: Sequence[int] | np.ndarray) -> Steps:
        """Some of the steps, in the order asked for."""
        index = np.asarray(index)
        units = {
            size: Units(units.gram[index], units.counts[index])
            for size, units in self.units.items()
        }
        cross = self.cross[index][:, :, index]
        return Steps(self.rewards, cross, self.active[index], self.advantages[index], units)

    def halves(self) -> tuple[Steps, Steps]:
        """The first half and the second; of an odd number the last step is left out."""
        half = len(self) // 2
        return self.take(range(half)), self.take(range(half, 2 * half))


def steps_of(
    rewards: Sequence[str],
    gradients: Float[np.ndarray, "t r p"],
    counts: Float[np.ndarray, "t r"] | None = None,
    advantages: Float[np.ndarray, "t n r"] | None = None,
    units: Mapping[int, Units] | None = None,
) -> Steps:
    """Steps from their gradients, the rewards' first.

    Args:
      rewards: names of the K rewards.
      gradients: of R >= K objectives.
      counts: valid samples; one each if None.
      advantages: of every image; none if None.
      units: see `Steps`; none if None.
    """
    num_steps, num_objectives = gradients.shape[:2]
    cross = products(gradients)
    square = np.einsum("trtr->tr", cross)
    active = np.isfinite(square) & (square > 0)
    if counts is not None:
        active &= counts > 0
    if advantages is None:
        advantages = np.zeros((num_steps, 0, num_objectives), np.float32)
    return Steps(tuple(rewards), cross, active, advantages, units or {})


def products(gradients: Float[np.ndarray, "t r p"]) -> Float[np.ndarray, "t r t r"]:
    """Inner products of all gradients with each other, summed in float64."""
    num_steps, num_objectives, num_parameters = gradients.shape
    rows = gradients.reshape(num_steps * num_objectives, num_parameters)
    total = np.zeros((len(rows), len(rows)))
    for start in range(0, num_parameters, _COLUMNS):
        block = rows[:, start : start + _COLUMNS].astype(np.float64)
        total += block @ block.T
    return total.reshape(num_steps, num_objectives, num_steps, num_objectives)


def read_steps(folder: Path, num_steps: int | None = None) -> Steps:
    """Reads the measured steps of a folder.

    Args:
      folder: as `collect` fills it.
      num_steps: the first so many; all if None.

    Raises:
      InputError: fewer than four steps, which make no halves with pairs in them.
    """
    numbers = measured(folder)[:num_steps]
    if len(numbers) < 4:
        raise InputError(
            f"harmony: expected at least 4 measured steps; received {len(numbers)} in {folder}"
        )
    description = read_json(folder / DESCRIPTION)
    loaded = [dict(np.load(step_file(folder, number))) for number in numbers]

    def stacked(name: str) -> np.ndarray:
        return np.stack([step.pop(name) for step in loaded])

    units = {}
    for size in description["units"]:
        units[size] = Units(stacked(f"gram_{size}"), stacked(f"counts_{size}"))
    return steps_of(
        description["rewards"],
        stacked("gradients"),
        stacked("counts"),
        stacked("advantages"),
        units,
    )
