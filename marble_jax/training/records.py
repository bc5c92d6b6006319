"""From a step's arrays to one flat record: keys `room/name` or `room/name/reward`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from marble_jax import distributed
from marble_jax.errors import InputError, one_line
from marble_jax.objectives.advantages import Advantages
from marble_jax.training.event_file import EventFile
from marble_jax.types import Scores


def flat_metrics(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Scalars under their key, [K] under `key/reward`, [K, K] (upper triangle) under `key/reward|other`."""
    record: dict[str, float] = {}
    for key, array in metrics.items():
        values = distributed.to_host(array).astype(np.float64)
        if values.ndim == 0:
            record[key] = float(values)
        elif values.ndim == 1:
            record |= _of_rewards(key, values, names)
        else:
            record |= _of_pairs(key, values, names)
    return record


def _of_rewards(
    key: str, values: Float[np.ndarray, " k"], names: Sequence[str]
) -> dict[str, float]:
    record = {}
    for name, value in zip(names, values, strict=True):
        record[f"{key}/{name}"] = float(value)
    return record


def _of_pairs(key: str, values: Float[np.ndarray, "k k"], names: Sequence[str]) -> dict[str, float]:
    """Every pair of rewards once: the matrix is symmetric, its diagonal says nothing."""
    record = {}
    for i, first in enumerate(names):
        for j, second in enumerate(names[i + 1 :], i + 1):
            record[f"{key}/{first}|{second}"] = float(values[i, j])
    return record


def score_metrics(scores: Scores, advantages: Advantages) -> dict[str, float]:
    """Mean and spread of the rollouts' scores, missing share, failed share of those it applies to and their number,
    share of groups without a signal. Means over nothing are NaN."""
    record: dict[str, float] = {}
    for k, name in enumerate(scores.names):
        valid = scores.values[scores.valid[:, k], k]
        failed = int(scores.failed[:, k].sum())
        sizes = np.abs(advantages.values[advantages.valid[:, k], k])
        record |= {
            f"rollout/score_mean/{name}": float(valid.mean()) if valid.size else float("nan"),
            f"rollout/score_std/{name}": float(valid.std()) if valid.size else float("nan"),
            f"rollout/missing_share/{name}": float(1 - scores.valid[:, k].mean()),
            f"rollout/failed/{name}": failed / max(valid.size + failed, 1),
            f"rollout/failed_count/{name}": failed,
            f"rollout/zero_std_share/{name}": float(advantages.tied[k]),
            f"advantages/abs_mean/{name}": float(sizes.mean()) if sizes.size else float("nan"),
        }
    return record


class MetricWriter:
    """The same records as TensorBoard events and, if asked for, in wandb.

    They are copies of what is on record: one that cannot be written is said once and given up, and the run goes on.

    Args:
      directory: of the events.
      tensorboard: whether to write events.
      wandb_project: project of a wandb run; empty for none.
      name: of the wandb run.
      config: flat configuration, shown in wandb.
      first_step: steps done before this session.
      say: called with a line about a tracker that is given up.

    Raises:
      InputError: a package that this needs is not there.
    """

    def __init__(
        self,
        directory: str,
        tensorboard: bool,
        wandb_project: str,
        name: str,
        config: dict[str, Any],
        first_step: int = 0,
        say: Callable[[str], object] = print,
    ):
        self._say = say
        self._trackers: dict[str, Any] = {}
        if tensorboard:
            self._start("TensorBoard", lambda: EventFile(directory, first_step))
        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise InputError(
                    "logging.wandb: expected the package wandb; received none (pip install wandb)"
                ) from error
            self._start("wandb", lambda: _Wandb(wandb, wandb_project, name, config))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the record's numbers at `step`."""
        numbers = {}
        for key, value in record.items():
            if isinstance(value, (int, float)) and np.isfinite(value):
                numbers[key] = value
        for tracker in list(self._trackers):
            self._attempt(tracker, lambda writer: writer.add(step, numbers))

    def close(self) -> None:
        """Closes what is still written to."""
        for tracker in list(self._trackers):
            self._attempt(tracker, lambda writer: writer.close())
        self._trackers.clear()

    def _start(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self._trackers[name] = make()
        except InputError:
            raise
        except Exception as error:  # whatever a disk or a tracker's service raises
            self._give_up(name, error)

    def _attempt(self, name: str, call: Callable[[Any], object]) -> None:
        try:
            call(self._trackers[name])
        except Exception as error:
            self._trackers.pop(name, None)
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._say(f"{name} is given up, the records are not: {one_line(error, 200)}")


class _Wandb:
    """A wandb run."""

    def __init__(self, wandb: Any, project: str, name: str, config: dict[str, Any]):
        self._run = wandb.init(project=project, name=name, config=config)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
