"""All figures of a plan."""

from __future__ import annotations

import dataclasses
from typing import Any

from marble_jax.config import Settings
from marble_jax.distributed.accelerators import Accelerator
from marble_jax.plan import memory
from marble_jax.plan.model_shapes import ModelShapes
from marble_jax.programs.step_flops import StepFlops
from marble_jax.training.batch_sizes import Sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
      settings: settings of the run, with the attention that its devices get.
      shapes: shapes of its model.
      sizes: its batch arithmetic.
      mesh: its devices, real or abstract.
      accelerator: kind of the devices; None for an unknown one.
      flops: FLOPs of an optimiser step.
      sources: memory of a device by source, for each program.
      resident: what lies on a device beside each program.
    """

    settings: Settings
    shapes: ModelShapes
    sizes: Sizes
    mesh: Any
    accelerator: Accelerator | None
    flops: StepFlops
    sources: dict[str, list[memory.Source]]
    resident: dict[str, list[memory.Source]]
