"""Rooflines of a plan's programs on the terminal: seconds by source in the model, and the MFU that they cap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marble_jax.console import Console
from marble_jax.plan.aot import MICRO_BATCH, Program
from marble_jax.plan.planned import Plan
from marble_jax.plan.roofline import Roofline, roofline
from marble_jax.programs.open_model import decode_size

COLUMNS = ("source", "ms", "share", "TFLOP", "GB", "bound by")


def show_rooflines(
    programs: Mapping[str, Program], planned: Plan, console: Console
) -> dict[str, Any]:
    """Prints the roofline of every compiled program and returns them as plain values, for JSON."""
    # A topology names its chip.
    assert planned.accelerator is not None
    record = {}
    for name, program in programs.items():
        if not program.text:
            continue
        bound = roofline(program.text, planned.accelerator)
        useful = useful_flops(planned, name)
        _show(name, bound, useful, console)
        record[name] = bound.record(useful)
    return record


def useful_flops(planned: Plan, name: str) -> float:
    """Returns the FLOPs that the method asks one device for in one run of a program, nothing recomputed or padded."""
    flops, sizes, mesh = planned.flops, planned.sizes, planned.mesh
    rollout = planned.settings.rollout
    if name == "rollout":
        total = flops.rollout * rollout.batch_size / sizes.images
    elif name == "decode":
        frames = planned.shapes.networks.frames_decoded_at_once(planned.shapes.size.num_frames)
        total = flops.decode * decode_size(rollout.batch_size, mesh, frames) / sizes.images
    elif name == MICRO_BATCH:
        total = flops.signal
    elif name == "train, between":
        total = flops.between
    else:
        total = flops.solve
    return total / mesh.size


def _show(name: str, bound: Roofline, useful: float, console: Console) -> None:
    """Prints a program's roofline."""
    device = bound.accelerator
    console.say(
        f"\nroofline of {name} on a {device.name} ({device.flops / 1e12:.0f} TFLOP/s, "
        f"{device.bandwidth / 1e12:.2f} TB/s): at least {1e3 * bound.seconds:.4g} ms; "
        f"{bound.flops / 1e12:.4g} TFLOP executed for {useful / 1e12:.4g}, {bound.bytes / 1e9:.4g} GB moved; "
        f"MFU of at most {bound.mfu_cap(useful):.0%}"
    )
    rows = []
    for cost in bound.by_source():
        share = cost.seconds / bound.seconds
        rows.append(
            (
                cost.source,
                f"{1e3 * cost.seconds:.2f}",
                f"{share:.1%}",
                f"{cost.flops / 1e12:.3g}",
                f"{cost.bytes / 1e9:.3g}",
                cost.bound,
            )
        )
    console.table(rows, COLUMNS)
