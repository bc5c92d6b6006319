"""What the compiler says of a plan's programs: memory, exchanges, and whether the largest one fits."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax

from marble_jax.config import Settings
from marble_jax.console import Console, duration
from marble_jax.plan import aot, memory
from marble_jax.plan.hlo_costs import reason_of
from marble_jax.plan.planned import Plan
from marble_jax.plan.request import Request

GB = 1e9


def compile_jobs(
    jobs: dict[str, Any], planned: Plan, request: Request, console: Console
) -> dict[str, aot.Program]:
    """Compiles the programs and says what the compiler says of each."""
    console.say(
        f"\ncompiling for {request.topology} with libtpu {importlib.metadata.version('libtpu')}, jax "
        f"{jax.__version__}; GB a chip"
    )
    programs: dict[str, aot.Program] = {}
    for name, (function, arguments) in jobs.items():
        if request.programs and name not in request.programs:
            continue
        programs[name] = aot.compile_program(name, function, arguments)
        _announce(programs[name], memory.total(planned.sources[name]), planned, console)
    return programs


def _announce(program: aot.Program, reckoned: float, planned: Plan, console: Console) -> None:
    """Prints what the compiler says of one program, beside what was reckoned by source."""
    parts = ""
    if program.arguments is not None and program.temporaries is not None:
        arguments, temporaries = program.arguments / GB, program.temporaries / GB
        parts = f" (arguments {arguments:.2f}, temporaries {temporaries:.2f})"
    console.say(
        f"  {program.name}: {program.needed / GB:.2f} GB{parts}; by source {reckoned / GB:.2f} "
        f"({reckoned / program.needed - 1:+.0%}); compiled in {duration(program.seconds)}"
    )
    if program.flops is not None and program.bytes is not None:
        console.say(
            f"    XLA's cost analysis, bodies of loops once: {program.flops / 1e12:.3g} TFLOP, "
            f"{program.bytes / GB:.3g} GB read and written"
        )
    for collective in program.collectives:
        looped = " in a loop" if collective.looped else ""
        origin = collective.origin or "the compiler"
        reason = reason_of(collective.kind, collective.origin, planned.shapes.family)
        console.say(
            f"    {collective.kind} x {collective.count}{looped}: {collective.bytes / 1e6:.4g} MB, "
            f"the largest from {origin} ({reason or 'not explained'})"
        )


def judge(
    programs: dict[str, aot.Program], planned: Plan, count: int, console: Console
) -> dict[str, Any]:
    """Says whether the program that takes most fits a device, and what would help if not."""
    assert planned.accelerator is not None  # a topology names its chip
    resident = {name: memory.total(planned.resident[name]) for name in programs}
    largest = max(programs.values(), key=lambda program: program.needed + resident[program.name])
    beside, usable = resident[largest.name], planned.accelerator.usable
    free = usable - largest.needed - beside
    fits = free >= 0
    verdict = (
        f"{'fits' if fits else 'does not fit'}: {largest.name} needs {largest.needed / GB:.2f} GB and "
        f"{beside / GB:.2f} GB lie beside it, of {usable / GB:.2f} GB a chip: {abs(free) / GB:.2f} GB "
        f"{'left for reward models' if fits else 'too much'}"
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
        "libtpu": importlib.metadata.version("libtpu"),
        "jax": jax.__version__,
    }


def _hints(settings: Settings, count: int) -> list[str]:
    """Settings that take less memory, the most telling first."""
    hints = []
    if settings.model.remat != "full":
        hints.append("--config.model.remat=full (about a third more time)")
    if settings.mesh.fsdp < count:
        hints.append(
            f"--config.mesh.fsdp={count} (base weights sharded; the same mathematics)"
        )
    if settings.training.micro_batch_size > count:
        hints.append(
            f"--config.training.micro_batch_size={count} (the same mathematics, smaller products)"
        )
    if not settings.prompts.embedding_cache:
        hints.append("--config.prompts.embedding_cache=DIR (no text encoder in memory)")
    return hints
