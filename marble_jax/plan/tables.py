"""What a plan says on the terminal: sizes, what runs where, memory by source, FLOPs and seconds."""

from __future__ import annotations

from marble_jax.console import Console, duration, joined, quantity
from marble_jax.distributed import device_mesh
from marble_jax.plan import memory
from marble_jax.plan.planned import Plan
from marble_jax.plan.request import Request
from marble_jax.programs.open_model import decode_size
from marble_jax.programs.run_record import method_name
from marble_jax.rewards.function import is_function
from marble_jax.trainable.lora import num_parameters
from marble_jax.training.batch_sizes import chunk_size

GB = 1e9


def show_sizes(planned: Plan, request: Request, console: Console) -> None:
    """Prints the run's sizes and what runs where."""
    accelerator = planned.accelerator
    what = accelerator.name if accelerator else "a device of unknown kind"
    where = f" ({request.topology})" if request.topology else ""
    settings = planned.settings
    console.say(
        f"marble_jax plan: {settings.name}, {method_name(settings)}, on {planned.mesh.size} x "
        f"{what}{where}"
    )
    console.table(
        [
            ("mesh", " x ".join(f"{name} {size}" for name, size in planned.mesh.shape.items())),
            ("model", _model_line(planned)),
            ("step", _step_line(planned)),
            ("rollout", _rollout_line(planned)),
            ("train", _train_line(planned)),
            (
                "everywhere",
                "samples split over data x fsdp, images to decode and score over all axes; base weights as "
                "below, autoencoder and rewards with a network whole; adapters, optimiser and the solve for "
                "alpha on every device alike",
            ),
            ("hosts", _hosts_line(planned)),
        ]
    )


def _model_line(planned: Plan) -> str:
    settings, shapes = planned.settings, planned.shapes
    base = quantity(num_parameters(shapes.networks.params))
    adapter = quantity(num_parameters(shapes.adapter))
    tokens, text_tokens = shapes.transformer.tokens, shapes.transformer.text_tokens
    return (
        f"{settings.model.path}: transformer {base} {settings.model.dtype}, adapter {adapter} (rank "
        f"{settings.lora.rank}), {shapes.size} px: {tokens} + {text_tokens} tokens, remat "
        f"{settings.model.remat}"
    )


def _step_line(planned: Plan) -> str:
    rollout, sizes = planned.settings.rollout, planned.sizes
    return (
        f"{rollout.prompts_per_step} prompts x {rollout.images_per_prompt} = {sizes.images} images; "
        f"{sizes.timesteps} of {rollout.num_steps} timesteps: {sizes.samples} samples"
    )


def _rollout_line(planned: Plan) -> str:
    mesh, batch = planned.mesh, planned.settings.rollout.batch_size
    shards = device_mesh.batch_shards(mesh)
    decoded = decode_size(batch, mesh) // device_mesh.image_shards(mesh, batch)
    return (
        f"{planned.sizes.rollout_batches} batches of {batch}, {batch // shards} a device; decoded "
        f"{decoded} a device at a time"
    )


def _train_line(planned: Plan) -> str:
    settings = planned.settings
    shards = device_mesh.batch_shards(planned.mesh)
    micro_batch = settings.training.micro_batch_size
    every = settings.harmonize.refresh_every
    solves = {
        "exact": "every step",
        "amortized": f"every {every} steps",
        "upstream": f"one micro-batch every {every} steps",
    }[settings.harmonize.mode]
    chunk = chunk_size(settings.training, settings.harmonize, shards) // shards
    return (
        f"{planned.sizes.micro_batches} micro-batches of {micro_batch}, {micro_batch // shards} a device; "
        f"gradients of every reward {solves}, {chunk} samples a device at a time"
    )


def _hosts_line(planned: Plan) -> str:
    settings = planned.settings
    readers = "OCR, GenEval"
    functions = [name for name in settings.rewards.train if is_function(name)]
    if functions:
        readers += f", {joined(functions)}"
    if settings.prompts.embedding_cache:
        texts = "text embeddings from disk, text encoders only to fill it"
    else:
        texts = (
            "text encoders stay, split over each host's devices (prompts.embedding_cache takes "
            "them away)"
        )
    return (
        f"every host runs the same command; rewards that read images ({readers}) in "
        f"{settings.rewards.num_workers} threads; {texts}"
    )


def show_memory(planned: Plan, console: Console) -> None:
    """Prints the memory of a device by source, a column a program."""
    programs = list(planned.sources)
    rows = [_source_row(planned, name) for name in _names(planned.sources)]
    totals = {name: memory.total(planned.sources[name]) for name in programs}
    resident = {name: memory.total(planned.resident[name]) for name in programs}
    rows.append(("the program", *(f"{totals[name] / GB:.2f}" for name in programs)))
    beside = joined(_names(planned.resident))
    rows.append((f"beside it ({beside})", *(f"{resident[name] / GB:.2f}" for name in programs)))
    label = "in all"
    if planned.accelerator:
        usable = planned.accelerator.usable / GB
        label += f", of {usable:.2f} that a program can have on a {planned.accelerator.name}"
    rows.append((label, *(f"{(totals[name] + resident[name]) / GB:.2f}" for name in programs)))
    console.say(
        "\nmemory a device by source, GB (1e9 bytes), reward models apart; activations are estimates"
    )
    console.table(rows, ("source", *programs))


def _names(sources: dict[str, list[memory.Source]]) -> list[str]:
    """Names of all sources, in order of first appearance."""
    names: dict[str, None] = {}
    for parts in sources.values():
        for part in parts:
            names[part.name] = None
    return list(names)


def _source_row(planned: Plan, name: str) -> tuple[str, ...]:
    """One source in every program, under the note of where it is largest."""
    cells, largest = [], None
    for parts in planned.sources.values():
        source = next((part for part in parts if part.name == name), None)
        if source is None:
            cells.append("-")
            continue
        cells.append(f"{source.bytes / GB:.2f}")
        if largest is None or source.bytes > largest.bytes:
            largest = source
    note = largest.note if largest else ""
    return f"{name} ({note})", *cells


def show_flops(planned: Plan, request: Request, console: Console) -> dict[str, float]:
    """Prints the FLOPs of a step; returns seconds by phase, where the device's peak is known."""
    flops, count = planned.flops, planned.mesh.size
    phases = {"rollout": flops.rollout, "decode": flops.decode, "train": flops.train}
    recomputed = {"rollout": 0.0, "decode": 0.0, "train": flops.recomputed}
    accelerator = planned.accelerator
    seconds: dict[str, float] = {}
    rows = []
    for name, work in phases.items():
        row = _flops_row(name, work, recomputed[name], count)
        if accelerator:
            executed = (work + recomputed[name]) / count
            seconds[name] = executed / (accelerator.flops * request.utilisation)
            share = work / count / accelerator.flops / seconds[name]
            row = (*row, f"{seconds[name]:.1f}", f"{share:.0%}")
        rows.append(row)
    heading = "\nwork of an optimiser step, on average over steps"
    columns: tuple[str, ...] = ("phase", "PFLOP", "+ recomputed", "TFLOP a device")
    if not accelerator:
        console.say(heading)
        console.table(rows, columns)
        return seconds
    whole = sum(seconds.values())
    work = sum(phases.values())
    mfu = work / count / accelerator.flops / whole
    row = _flops_row("step", work, flops.recomputed, count)
    rows.append((*row, f"{whole:.1f}", f"{mfu:.0%}"))
    seconds["step"] = whole
    console.say(
        f"{heading}; seconds if products run at {request.utilisation:.0%} of the peak of "
        f"{accelerator.flops / 1e12:.0f} TFLOP/s, rewards and transfers apart"
    )
    console.table(rows, (*columns, "seconds", "MFU"))
    console.say(
        f"  {planned.sizes.images / whole:.2f} images/s, 1000 steps in {duration(1000 * whole)}"
    )
    return seconds


def _flops_row(name: str, work: float, recomputed: float, count: int) -> tuple[str, ...]:
    return name, f"{work / 1e15:.1f}", f"{recomputed / 1e15:.1f}", f"{work / count / 1e12:.0f}"
