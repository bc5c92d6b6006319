"""Beside measured times, the least that the compiled programs could take by their roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from marble_jax.distributed.accelerators import Accelerator
from marble_jax.plan.roofline import roofline
from tools.benchmark import cases
from tools.benchmark.sizes import Size


def bounds(
    programs: Mapping[str, Any],
    size: Size,
    accelerator: Accelerator | None,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Lower bounds of times in seconds, by name, of programs and of the averages of `cases.mixtures`.

    Args:
      programs: by name, each with the executable as `compiled`.
      size: what the averages are made by.
      accelerator: the device; None where it is not in the table of chips, of which no bound is known.
      say: is told of a program without a bound.
    """
    if accelerator is None:
        return {}
    found: dict[str, float] = {}
    for name, program in programs.items():
        # Whatever a compiler's text makes the reader raise: times that took minutes of a device are kept without it.
        try:
            found[name] = roofline(program.compiled.as_text(), accelerator).seconds
        except Exception as error:
            say(f"no roofline of {name}: {type(error).__name__}: {error}")
    for name, parts in cases.mixtures(size).items():
        if set(parts) <= set(found):
            found[name] = sum(share * found[part] for part, share in parts.items())
    return found
