"""`marble-jax plan` from end to end: sizes, what runs where, memory, work, and the compiler's word on them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_collections

from marble_jax.config import flatten
from marble_jax.console import Console, duration, joined, quantity
from marble_jax.distributed import accelerators, device_mesh
from marble_jax.distributed.accelerators import Accelerator
from marble_jax.errors import InputError
from marble_jax.families.sd3.flops import decoder, transformer
from marble_jax.harmonize.registry import balancer_of
from marble_jax.networks.attention import choose
from marble_jax.plan import aot, memory
from marble_jax.plan.hlo_costs import reason_of
from marble_jax.plan.model_shapes import Architecture, architecture
from marble_jax.programs import build
from marble_jax.programs.step_flops import StepWork, step_work
from marble_jax.programs.train import method_name
from marble_jax.rewards.function import is_function
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import Sizes, chunk_size, derive_sizes

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
      devices: how many; 0 for those of the topology.
      topology: slice to compile for, such as `v5e:4x4`; empty for none.
      chip: what the devices are; empty for that of the topology, or unknown.
      utilisation: share of the peak at which products are assumed to run, recomputation included.
      file: where the record goes as JSON; empty for nowhere.
      programs: names of the programs to compile; empty for all.
    """

    devices: int = 0
    topology: str = ""
    chip: str = ""
    utilisation: float = 0.4
    file: str = ""
    programs: tuple[str, ...] = ()


def plan(config: ml_collections.ConfigDict, request: Request, console: Console) -> dict[str, Any]:
    """Says what a run of `config` comes to, and returns the same as a record.

    Raises:
      InputError: settings that do not fit each other or the devices; the message names the nearest that do.
    """
    chip, count = _devices(request)
    if request.file and not Path(request.file).resolve().parent.is_dir():
        raise InputError(
            f"--json: expected a file in a folder that is there; received {request.file!r}"
        )
    build.check(config, chip.backend if chip else "")
    balancer_of(config.harmonize, config.rewards.train)
    if chip:
        config = config.copy_and_resolve_references()
        config.model.attention = choose(
            config.model.attention, build.DTYPES[config.model.dtype], chip.backend
        )
    mesh: Any = device_mesh.abstract_mesh(
        count, config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    )
    if request.topology:
        mesh = build.make_mesh(config, aot.slice_devices(request.topology))
    sizes = derive_sizes(config.rollout, config.training, device_mesh.batch_shards(mesh))
    made = architecture(config)
    sample = transformer(
        made.model.config, made.params, made.adapter, made.tokens, made.text_tokens
    )
    work = step_work(
        config, sizes, sample, decoder(made.vae.config, made.vae_params, *made.latent[:2])
    )
    sources = memory.programs(
        config, made, sizes, mesh, memory.LANES if chip and chip.backend == "tpu" else 1
    )
    on_host = min(mesh.size, chip.devices_per_host if chip else mesh.size)
    beside = {name: memory.beside(config, made, mesh, name, on_host) for name in sources}
    _show_sizes(config, made, sizes, mesh, chip, request, console)
    _show_memory(sources, beside, chip, console)
    seconds = _show_work(work, sizes, count, chip, request, console)
    record = {
        "config": flatten(config),
        "devices": count,
        "mesh": dict(mesh.shape),
        "topology": request.topology,
        "chip": chip.name if chip else None,
        "sizes": dataclasses.asdict(sizes),
        "work_flop": dataclasses.asdict(work),
        "sample_flop": dataclasses.asdict(sample),
        "utilisation": request.utilisation,
        "seconds": seconds,
        "memory": memory.as_record(sources),
        "beside": memory.as_record(beside),
    }
    if request.topology:
        programs = _compile(aot.jobs(config, made, sizes, mesh), sources, request, console)
        record["compiled"] = _judge(programs, beside, chip, config, count, console)
    if request.file:
        _write(request.file, record)
    return record


def _devices(request: Request) -> tuple[Accelerator | None, int]:
    chip = accelerators.by_name(request.chip) if request.chip else None
    if not request.topology:
        return chip, request.devices or 1
    sliced, count = aot.check_topology(request.topology)
    if chip not in (None, sliced):
        raise InputError(
            f"--chip: expected {sliced.name}, as in --topology={request.topology}; received {chip.name}"
        )
    if request.devices not in (0, count):
        raise InputError(
            f"--devices: expected the {count} of --topology={request.topology}; received "
            f"{request.devices}"
        )
    return sliced, count


def _show_sizes(
    config: ml_collections.ConfigDict,
    made: Architecture,
    sizes: Sizes,
    mesh: Any,
    chip: Accelerator | None,
    request: Request,
    console: Console,
) -> None:
    count = device_mesh.batch_shards(mesh)
    micro, rollout = config.training.micro_batch_size, config.rollout
    decoded = build.decode_size(rollout.batch_size, mesh) // device_mesh.image_shards(
        mesh, rollout.batch_size
    )
    solves = {
        "exact": "every step",
        "amortized": f"every {config.harmonize.refresh_every} steps",
        "upstream": f"one micro-step every {config.harmonize.refresh_every} steps",
    }[config.harmonize.mode]
    where = f" ({request.topology})" if request.topology else ""
    functions = [name for name in config.rewards.train if is_function(name)]
    console.say(
        f"marble_jax plan: {config.name}, {method_name(config)}, on {mesh.size} x "
        f"{chip.name if chip else 'a device of unknown kind'}{where}"
    )
    console.table(
        [
            ("mesh", " x ".join(f"{name} {size}" for name, size in mesh.shape.items())),
            (
                "model",
                f"{config.model.path}: transformer {quantity(lora.num_parameters(made.params))} "
                f"{config.model.dtype}, adapter {quantity(lora.num_parameters(made.adapter))} (rank "
                f"{config.lora.rank}), {config.model.height} x {config.model.width} px: {made.tokens} + {made.text_tokens} tokens, "
                f"remat {config.model.remat}",
            ),
            (
                "step",
                f"{rollout.prompts_per_step} prompts x {rollout.images_per_prompt} = {sizes.images} images; "
                f"{sizes.timesteps} of {rollout.num_steps} timesteps: {sizes.samples} samples",
            ),
            (
                "rollout",
                f"{sizes.rollout_batches} batches of {rollout.batch_size}, {rollout.batch_size // count} a device; "
                f"decoded {decoded} a device at a time",
            ),
            (
                "train",
                f"{sizes.micro_batches} micro-batches of {micro}, {micro // count} a device; gradients of every reward "
                f"{solves}, {chunk_size(config.training, config.harmonize, count) // count} samples a device at a time",
            ),
            (
                "everywhere",
                "samples split over data x fsdp, images to decode and score over all axes; base weights as "
                "below, autoencoder and rewards with a network whole; adapters, optimiser and the solve for "
                "alpha on every device alike",
            ),
            (
                "hosts",
                "every host runs the same command; rewards that read images (OCR, GenEval"
                + (f", {joined(functions)}" if functions else "")
                + f") in {config.rewards.num_workers} threads; "
                + (
                    "text embeddings from disk, text encoders only to fill it"
                    if config.prompts.embedding_cache
                    else "text encoders stay, split over each host's devices (prompts.embedding_cache takes them away)"
                ),
            ),
        ]
    )


def _show_memory(
    sources: dict[str, list[memory.Source]],
    beside: dict[str, list[memory.Source]],
    chip: Accelerator | None,
    console: Console,
) -> None:
    rows = []
    for name in dict.fromkeys(s.name for found in sources.values() for s in found):
        cells = [next((s for s in found if s.name == name), None) for found in sources.values()]
        note = max((c for c in cells if c), key=lambda c: c.bytes).note
        rows.append((f"{name} ({note})", *(f"{c.bytes / GB:.2f}" if c else "-" for c in cells)))
    rows.append(("the program", *(f"{memory.total(found) / GB:.2f}" for found in sources.values())))
    names = dict.fromkeys(s.name for found in beside.values() for s in found)
    rows.append(
        (
            f"beside it ({joined(names)})",
            *(f"{memory.total(found) / GB:.2f}" for found in beside.values()),
        )
    )
    rows.append(
        (
            "in all"
            + (
                f", of {chip.usable / GB:.2f} that a program can have on a {chip.name}"
                if chip
                else ""
            ),
            *(
                f"{(memory.total(sources[name]) + memory.total(beside[name])) / GB:.2f}"
                for name in sources
            ),
        )
    )
    console.say(
        "\nmemory a device by source, GB (1e9 bytes), reward models apart; activations are estimates"
    )
    console.table(rows, ("source", *sources))


def _show_work(
    work: StepWork,
    sizes: Sizes,
    count: int,
    chip: Accelerator | None,
    request: Request,
    console: Console,
) -> dict[str, float]:
    """The table of FLOPs, and seconds by phase where the chip's peak is known."""
    again = {"rollout": 0.0, "decode": 0.0, "train": work.recomputed}
    flops = {"rollout": work.rollout, "decode": work.decode, "train": work.train}
    seconds: dict[str, float] = {}
    rows = []
    for name in flops:
        row = [
            name,
            f"{flops[name] / 1e15:.1f}",
            f"{again[name] / 1e15:.1f}",
            f"{flops[name] / count / 1e12:.0f}",
        ]
        if chip:
            seconds[name] = (flops[name] + again[name]) / count / (chip.flops * request.utilisation)
            row += [
                f"{seconds[name]:.1f}",
                f"{flops[name] / count / chip.flops / seconds[name]:.0%}",
            ]
        rows.append(tuple(row))
    if chip:
        whole = sum(seconds.values())
        mfu = sum(flops.values()) / count / chip.flops / whole
        rows.append(
            (
                "step",
                f"{sum(flops.values()) / 1e15:.1f}",
                f"{work.recomputed / 1e15:.1f}",
                f"{sum(flops.values()) / count / 1e12:.0f}",
                f"{whole:.1f}",
                f"{mfu:.0%}",
            )
        )
        seconds["step"] = whole
    tail = ("seconds", "MFU") if chip else ()
    console.say(
        "\nwork of an optimiser step, on average over steps"
        + (
            f"; seconds if products run at {request.utilisation:.0%} of the peak of {chip.flops / 1e12:.0f} TFLOP/s, "
            "rewards and transfers apart"
            if chip
            else ""
        )
    )
    console.table(rows, ("phase", "PFLOP", "+ recomputed", "TFLOP a device", *tail))
    if chip:
        console.say(
            f"  {sizes.images / seconds['step']:.2f} images/s, 1000 steps in "
            f"{duration(1000 * seconds['step'])}"
        )
    return seconds


def _compile(
    jobs: dict[str, Any],
    sources: dict[str, list[memory.Source]],
    request: Request,
    console: Console,
) -> dict[str, aot.Program]:
    """Compiles the programs and says what the compiler says of each."""
    console.say(
        f"\ncompiling for {request.topology} with libtpu {importlib.metadata.version('libtpu')}, jax "
        f"{jax.__version__}; GB a chip"
    )
    found: dict[str, aot.Program] = {}
    for name, (function, arguments) in jobs.items():
        if request.programs and name not in request.programs:
            continue
        found[name] = program = aot.compile_program(name, function, arguments)
        reckoned = memory.total(sources[name])
        parts = (
            ""
            if program.temporaries is None
            else (
                f" (arguments {program.arguments / GB:.2f}, temporaries {program.temporaries / GB:.2f})"
            )
        )
        console.say(
            f"  {name}: {program.needed / GB:.2f} GB{parts}; by source {reckoned / GB:.2f} "
            f"({reckoned / program.needed - 1:+.0%}); compiled in {duration(program.seconds)}"
        )
        if program.flops is not None:
            console.say(
                f"    XLA's cost analysis, bodies of loops once: {program.flops / 1e12:.3g} TFLOP, "
                f"{program.bytes / GB:.3g} GB read and written"
            )
        for each in program.collectives:
            console.say(
                f"    {each.kind} x {each.count}{' in a loop' if each.looped else ''}: "
                f"{each.bytes / 1e6:.4g} MB, the largest from {each.origin or 'the compiler'}"
                f" ({reason_of(each.kind, each.origin) or 'not explained'})"
            )
    return found


def _judge(
    programs: dict[str, aot.Program],
    beside: dict[str, list[memory.Source]],
    chip: Accelerator,
    config: ml_collections.ConfigDict,
    count: int,
    console: Console,
) -> dict[str, Any]:
    """Whether the program that takes most fits a chip, and what would help if not."""
    most = max(programs.values(), key=lambda p: p.needed + memory.total(beside[p.name]))
    lying = memory.total(beside[most.name])
    free = chip.usable - most.needed - lying
    verdict = (
        f"{'fits' if free >= 0 else 'does not fit'}: {most.name} needs {most.needed / GB:.2f} GB and "
        f"{lying / GB:.2f} GB lie beside it, of {chip.usable / GB:.2f} GB a chip: {abs(free) / GB:.2f} GB "
        f"{'left for reward models' if free >= 0 else 'too much'}"
    )
    console.say(verdict)
    if free < 0:
        for hint in _hints(config, count):
            console.say(f"  would help: {hint}")
    return {
        "programs": aot.as_record(programs),
        "verdict": verdict,
        "fits": free >= 0,
        "free_bytes": free,
        "libtpu": importlib.metadata.version("libtpu"),
        "jax": jax.__version__,
    }


def _hints(config: ml_collections.ConfigDict, count: int) -> list[str]:
    """Settings that take less memory, the most telling first."""
    found = []
    if config.model.remat != "full":
        found.append("--config.model.remat=full (about a third more time)")
    if config.mesh.fsdp < count:
        found.append(f"--config.mesh.fsdp={count} (base weights sharded; the same mathematics)")
    if config.training.micro_batch_size > count:
        found.append(
            f"--config.training.micro_batch_size={count} (the same mathematics, smaller products)"
        )
    if not config.prompts.embedding_cache:
        found.append("--config.prompts.embedding_cache=DIR (no text encoder in memory)")
    return found


def _write(file: str, record: dict[str, Any]) -> None:
    target = Path(file)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        raise InputError(
            f"--json: expected a writable file; received {file!r} ({error.strerror})"
        ) from None
