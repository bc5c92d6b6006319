"""What the compiler says of a plan's programs: memory, exchanges, and whether the largest one fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from marble_jax.config import Settings
from marble_jax.console import Console, duration
from marble_jax.families.base import Family
from marble_jax.plan import aot, memory
from marble_jax.plan.hlo import Collective, Kernels
from marble_jax.plan.hlo_costs import reason_of
from marble_jax.plan.planned import Plan
from marble_jax.plan.request import Request
from marble_jax.plan.topology import compiler_of

GB = 1e9


def compile_jobs(
    jobs: Mapping[str, aot.Job], planned: Plan, request: Request, console: Console
) -> dict[str, aot.Program]:
    """Compiles the programs that were asked for, prints what the compiler says of each and returns it by name."""
    # A topology names its chip.
    assert planned.accelerator is not None
    compiler = compiler_of(planned.accelerator)
    console.say(
        f"\ncompiling for {request.topology} with {compiler}, jax {jax.__version__}; GB a device"
    )
    programs: dict[str, aot.Program] = {}
    for name, job in jobs.items():
        wanted = name in request.programs
        if not request.programs:
            wanted = name != aot.MICRO_BATCH
        if not wanted:
            continue
        program = aot.compile_program(name, job)
        programs[name] = program
        _announce(program, _reckoned(planned, name), planned.shapes.family, console)
    return programs


def _reckoned(planned: Plan, name: str) -> float:
    """Bytes of a program by source; a micro-batch is reckoned as the step that it is a part of."""
    return memory.total(planned.sources.get(name, planned.sources["train, solving"]))


def _announce(program: aot.Program, reckoned: float, family: Family, console: Console) -> None:
    """Prints what the compiler says of one program, beside the bytes that were reckoned by source."""
    parts = ""
    if program.arguments is not None and program.temporaries is not None:
        arguments, temporaries = program.arguments / GB, program.temporaries / GB
        parts = f" (arguments {arguments:.2f}, temporaries {temporaries:.2f})"
    difference = reckoned / program.needed - 1
    console.say(
        f"  {program.name}: {program.needed / GB:.2f} GB{parts}; by source {reckoned / GB:.2f} "
        f"({difference:+.0%}); compiled in {duration(program.seconds)}"
    )
    if program.flops is not None and program.bytes is not None:
        console.say(
            f"    XLA's cost analysis, bodies of loops once: {program.flops / 1e12:.3g} TFLOP, "
            f"{program.bytes / GB:.3g} GB read and written"
        )
    console.say(f"    {_kernels_line(program.kernels)}")
    for collective in program.collectives:
        console.say(_collective_line(collective, family))


def _kernels_line(kernels: Kernels) -> str:
    """What the program has of fused attention."""
    if not kernels:
        return "no fused attention in the program"
    return (
        f"fused attention is in the program: {kernels.forward} forward and {kernels.backward} backward kernels, "
        "those in loops once"
    )


def _collective_line(collective: Collective, family: Family) -> str:
    """Collectives of one kind with the reason for the largest."""
    looped = " in a loop" if collective.looped else ""
    origin = collective.origin or "the compiler"
    reason = reason_of(collective.kind, collective.origin, family) or "not explained"
    return (
        f"    {collective.kind} x {collective.count}{looped}: {collective.bytes / 1e6:.4g} MB, "
        f"the largest from {origin} ({reason})"
    )


def judge(
    programs: Mapping[str, aot.Program], planned: Plan, count: int, console: Console
) -> dict[str, Any]:
    """Prints whether the program that takes most fits a device, and what would help if it does not.

    Args:
      programs: compiled programs by name.
      planned: the plan, for a known accelerator.
      count: devices of the run.
      console: where the verdict goes.

    Returns:
      The verdict and the programs as plain values, for JSON.
    """
    # A topology names its chip.
    assert planned.accelerator is not None
    usable = planned.accelerator.usable
    solving = planned.resident["train, solving"]
    resident = {name: memory.total(planned.resident.get(name, solving)) for name in programs}
    largest = max(programs.values(), key=lambda program: program.needed + resident[program.name])
    beside = resident[largest.name]
    free = usable - largest.needed - beside
    fits = free >= 0
    answer, margin = "does not fit", "too much"
    if fits:
        answer, margin = "fits", "left for reward models"
    verdict = (
        f"{answer}: {largest.name} needs {largest.needed / GB:.2f} GB and "
        f"{beside / GB:.2f} GB lie beside it, of {usable / GB:.2f} GB a device: {abs(free) / GB:.2f} GB "
        f"{margin}"
    )
    console.say(verdict)
    if not fits:
        for hint in _hints(planned.settings, count):
            console.say(f"  would help: {hint}")
    return {
        "programs": aot.as_record(programs),
        "verdict": verdict,
        "fits": fits,
        "free_bytes": free,
        "compiler": compiler_of(planned.accelerator),
        "jax": jax.__version__,
    }


def _hints(settings: Settings, count: int) -> list[str]:
    """Settings that take less memory, the most effective first."""
    hints = []
    if settings.model.remat != "full":
        hints.append("--config.model.remat=full (about a third more time)")
    if settings.mesh.fsdp < count:
        hints.append(f"--config.mesh.fsdp={count} (base weights sharded; the same mathematics)")
    # A device needs a sample of its own, so a micro-batch has at least as many as there are devices.
    if settings.training.micro_batch_size > count:
        hints.append(
            f"--config.training.micro_batch_size={count} (the same mathematics, smaller products)"
        )
    if not settings.prompts.embedding_cache:
        hints.append("--config.prompts.embedding_cache=DIR (no text encoder in memory)")
    return hints
