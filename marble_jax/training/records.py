"""From a step's arrays to one flat record: keys `room/name` or `room/name/reward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax import distributed
from marble_jax.errors import InputError
from marble_jax.objectives.advantages import Advantages
from marble_jax.types import Scores


def flat_metrics(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Scalars under their key, [K] under `key/reward`, [K, K] (upper triangle) under `key/reward|other`."""
    record: dict[str, float] = {}
    for key, value in metrics.items():
        value = distributed.to_host(value).astype(np.float64)
        if value.ndim == 0:
            record[key] = float(value)
        elif value.ndim == 1:
            record |= {f"{key}/{name}": float(v) for name, v in zip(names, value, strict=True)}
        else:
            record |= {
                f"{key}/{a}|{b}": float(value[i, j])
                for i, a in enumerate(names)
                for j, b in enumerate(names)
                if i < j
            }
    return record


def score_metrics(scores: Scores, advantages: Advantages) -> dict[str, float]:
    """Mean and spread of the rollouts' scores, missing share, failed share of those it applies to and their number,
    share of groups without a signal."""
    record: dict[str, float] = {}
    for k, name in enumerate(scores.names):
        valid = scores.values[scores.valid[:, k], k]
        failed = int(scores.failed[:, k].sum())
        record |= {
            f"rollout/score_mean/{name}": float(valid.mean()) if valid.size else float("nan"),
            f"rollout/score_std/{name}": float(valid.std()) if valid.size else float("nan"),
            f"rollout/missing_share/{name}": float(1 - scores.valid[:, k].mean()),
            f"rollout/failed/{name}": failed / max(valid.size + failed, 1),
            f"rollout/failed_count/{name}": failed,
            f"rollout/zero_std_share/{name}": float(advantages.tied[k]),
            f"advantages/abs_mean/{name}": float(
                np.abs(advantages.values[advantages.valid[:, k], k]).mean()
            )
            if advantages.valid[:, k].any()
            else float("nan"),
        }
    return record


class Events:
    """The same records as TensorBoard events and, if asked for, in wandb."""

    def __init__(
        self,
        directory: str,
        tensorboard: bool,
        wandb_project: str,
        name: str,
        config: dict[str, Any],
    ):
        self._writer = self._wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            try:
                self._writer = SummaryWriter(directory)
            except ImportError as error:  # for a bucket, which it writes to in its own way
                raise InputError(
                    f"logging.tensorboard: expected the package that tensorboardX needs for {directory}; "
                    f"received none ({error} --config.logging.tensorboard=false goes without)"
                ) from error
        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise InputError(
                    "logging.wandb: expected the package wandb; received none (pip install wandb)"
                ) from error
            self._wandb = wandb.init(project=wandb_project, name=name, config=config)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the record's numbers at `step`."""
        numbers = {
            k: v for k, v in record.items() if isinstance(v, (int, float)) and np.isfinite(v)
        }
        if self._writer:
            for key, value in numbers.items():
                self._writer.add_scalar(key.replace("|", "."), value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flushes and closes."""
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()
