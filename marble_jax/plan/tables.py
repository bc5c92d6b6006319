"""What a plan says on the terminal: sizes, what runs where, memory by source, FLOPs and seconds."""

from __future__ import annotations

import dataclasses

from marble_jax.config import Settings
from marble_jax.console import Console, duration, joined, quantity
from marble_jax.distributed import device_mesh
from marble_jax.plan import memory
from marble_jax.plan.planned import Plan
from marble_jax.plan.request import Request
from marble_jax.programs.open_model import decode_size
from marble_jax.programs.run_record import method_name
from marble_jax.programs.step_flops import network_passes
from marble_jax.rewards.function import is_function
from marble_jax.trainable.lora import num_parameters
from marble_jax.training.batch_sizes import chunk_size

GB = 1e9

EVERYWHERE = (
    "samples split over data x fsdp, images to decode and score over all axes; base weights as "
    "below, autoencoder and rewards with a network whole; adapters, optimiser and the solve for "
    "alpha on every device alike"
)
"""What holds for every run, whatever its settings."""

FLOPS_COLUMNS = ("phase", "PFLOP", "+ recomputed", "TFLOP a device")


def show_sizes(planned: Plan, request: Request, console: Console) -> None:
    """Prints the run's sizes and what runs where."""
    settings = planned.settings
    chip = "a device of unknown kind"
    if planned.accelerator is not None:
        chip = planned.accelerator.name
    if request.topology:
        chip += f" ({request.topology})"
    title = f"{settings.name}, {method_name(settings)}"
    console.say(f"marble_jax plan: {title}, on {planned.mesh.size} x {chip}")
    sides = [f"{axis} {size}" for axis, size in planned.mesh.shape.items()]
    rows = [
        ("mesh", " x ".join(sides)),
        ("model", _model_line(planned)),
        ("step", _step_line(planned)),
        ("rollout", _rollout_line(planned)),
        ("train", _train_line(planned)),
        ("passes", _passes_line(planned)),
        ("everywhere", EVERYWHERE),
        ("hosts", _hosts_line(settings)),
    ]
    console.table(rows)


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
    # Images are split over tensor, too, unlike samples.
    shapes, rollout = planned.shapes, planned.settings.rollout
    frames = shapes.networks.frames_decoded_at_once(shapes.size.num_frames)
    decoded = decode_size(batch, mesh, frames) // device_mesh.image_shards(mesh, batch)
    guidance = f", guidance {rollout.guidance_scale:g}" if rollout.guided else ""
    return (
        f"{planned.sizes.rollout_batches} batches of {batch}, {batch // shards} a device{guidance}; decoded "
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
    }
    solved = solves[settings.harmonize.mode]
    chunk = chunk_size(settings.training, settings.harmonize, shards) // shards
    asked = ""
    if settings.nft.skip_rollout_pass:
        asked = "; reckoned as if the rollout policy were asked at all of them"
    return (
        f"{planned.sizes.micro_batches} micro-batches of {micro_batch}, {micro_batch // shards} a device; "
        f"gradients of every reward {solved}, {chunk} samples a device at a time{asked}"
    )


def _passes_line(planned: Plan) -> str:
    passes = network_passes(planned.settings, planned.sizes)
    return (
        f"through the network, an image: {passes.rollout:g} in rollouts, {passes.forward:.4g} forward and "
        f"{passes.backward:.4g} backward in training, on average over steps"
    )


def _hosts_line(settings: Settings) -> str:
    readers = "OCR, GenEval"
    # A function is the user's own, and gets images as those two do.
    functions = [name for name in settings.rewards.train if is_function(name)]
    if functions:
        readers += f", {joined(functions)}"
    texts = "text encoders stay, split over each host's devices (prompts.embedding_cache takes them away)"
    if settings.prompts.embedding_cache:
        texts = "text embeddings from disk, text encoders only to fill it"
    threads = f"{settings.rewards.num_workers} threads"
    if settings.rewards.num_workers == 0:
        threads = "as many threads as the host has cores"
    return f"every host runs the same command; rewards that read images ({readers}) in {threads}; {texts}"


def show_memory(planned: Plan, console: Console) -> None:
    """Prints the memory of a device by source, a column a program."""
    rows = [_source_row(planned, name) for name in _names(planned.sources)]
    programs = _totals(planned.sources)
    resident = _totals(planned.resident)
    together = [mine + beside for mine, beside in zip(programs, resident)]
    label = "in all"
    if planned.accelerator is not None:
        usable = _gigabytes(planned.accelerator.usable)
        label += f", of {usable} that a program can have on a {planned.accelerator.name}"
    resident_names = joined(_names(planned.resident))
    rows.append(_bytes_row("the program", programs))
    rows.append(_bytes_row(f"beside it ({resident_names})", resident))
    rows.append(_bytes_row(label, together))
    console.say(
        "\nmemory a device by source, GB (1e9 bytes), reward models apart; activations are estimates"
    )
    console.table(rows, ("source", *planned.sources))


def _names(sources: dict[str, list[memory.Source]]) -> list[str]:
    """Names of all sources, in order of first appearance."""
    # A dict keeps the order in which names were added, and each of them once.
    names: dict[str, None] = {}
    for parts in sources.values():
        for part in parts:
            names[part.name] = None
    return list(names)


def _totals(sources: dict[str, list[memory.Source]]) -> list[float]:
    """Bytes of every program."""
    return [memory.total(parts) for parts in sources.values()]


def _bytes_row(label: str, sizes: list[float]) -> tuple[str, ...]:
    """One row of the table of memory."""
    cells = [_gigabytes(size) for size in sizes]
    return label, *cells


def _gigabytes(size: float) -> str:
    return f"{size / GB:.2f}"


def _source_row(planned: Plan, name: str) -> tuple[str, ...]:
    """One source in every program; its note is that of the program where the source is largest."""
    cells = []
    largest: memory.Source | None = None
    for parts in planned.sources.values():
        by_name = {part.name: part for part in parts}
        source = by_name.get(name)
        if source is None:
            cells.append("-")
            continue
        cells.append(_gigabytes(source.bytes))
        if largest is None or source.bytes > largest.bytes:
            largest = source
    # Every name was taken from one of the programs.
    assert largest is not None
    return f"{name} ({largest.note})", *cells


def show_flops(planned: Plan, request: Request, console: Console) -> dict[str, float]:
    """Prints the FLOPs of an optimiser step.

    Returns:
      Seconds by phase and of the whole "step"; empty where the device's peak is not known.
    """
    flops = planned.flops
    phases = [
        _Phase("rollout", flops.rollout, 0.0),
        _Phase("decode", flops.decode, 0.0),
        _Phase("train", flops.train, flops.recomputed),
    ]
    accelerator = planned.accelerator
    heading = "\nwork of an optimiser step, on average over steps"
    # Seconds need the peak of a known chip.
    if accelerator is None:
        console.say(heading)
        rows = [phase.cells(planned.mesh.size) for phase in phases]
        console.table(rows, FLOPS_COLUMNS)
        return {}
    peak = planned.mesh.size * accelerator.flops
    console.say(
        f"{heading}; seconds if products run at {request.utilisation:.0%} of the peak of "
        f"{accelerator.flops / 1e12:.0f} TFLOP/s, rewards and transfers apart"
    )
    rows = []
    seconds: dict[str, float] = {}
    for phase in phases:
        # Devices execute what rematerialisation adds, too; MFU leaves it out.
        executed = phase.flops + phase.recomputed
        seconds[phase.name] = executed / (peak * request.utilisation)
        rows.append(phase.timed_cells(planned.mesh.size, seconds[phase.name], peak))
    seconds["step"] = sum(seconds.values())
    step = _Phase("step", sum(phase.flops for phase in phases), flops.recomputed)
    rows.append(step.timed_cells(planned.mesh.size, seconds["step"], peak))
    console.table(rows, (*FLOPS_COLUMNS, "seconds", "MFU"))
    images = planned.sizes.images / seconds["step"]
    console.say(f"  {images:.2f} images/s, 1000 steps in {duration(1000 * seconds['step'])}")
    return seconds


@dataclasses.dataclass(frozen=True)
class _Phase:
    """A part of an optimiser step, over all devices.

    Attributes:
      name: name of the part.
      flops: FLOPs that the method asks for.
      recomputed: FLOPs that rematerialisation adds.
    """

    name: str
    flops: float
    recomputed: float

    def cells(self, num_devices: int) -> tuple[str, ...]:
        """The phase's row of the table."""
        device = self.flops / num_devices
        petaflops = f"{self.flops / 1e15:.1f}"
        recomputed = f"{self.recomputed / 1e15:.1f}"
        return self.name, petaflops, recomputed, f"{device / 1e12:.0f}"

    def timed_cells(self, num_devices: int, seconds: float, peak: float) -> tuple[str, ...]:
        """The phase's row with its seconds, and its share of a peak in FLOP/s over all devices (MFU)."""
        share = self.flops / seconds / peak
        return *self.cells(num_devices), f"{seconds:.1f}", f"{share:.0%}"
