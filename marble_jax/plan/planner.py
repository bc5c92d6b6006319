"""`marble-jax plan` from end to end: sizes, what runs where, memory, FLOPs, and the compiler's word on them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from marble_jax.config import MeshSettings, Settings, flatten
from marble_jax.console import Console
from marble_jax.distributed import accelerators, device_mesh
from marble_jax.distributed.accelerators import Accelerator
from marble_jax.errors import InputError
from marble_jax.networks.attention import choose
from marble_jax.plan import aot, memory, resident_memory, tables, topology
from marble_jax.plan.compiled import compile_jobs, judge
from marble_jax.plan.model_shapes import model_shapes
from marble_jax.plan.planned import Plan
from marble_jax.plan.request import Request
from marble_jax.plan.roofline_tables import show_rooflines
from marble_jax.programs.check_settings import check_settings
from marble_jax.programs.passed_over import passed_over
from marble_jax.programs.step_flops import network_passes, step_flops_of
from marble_jax.training.batch_sizes import derive_sizes
from marble_jax.types import DTYPES


def plan(
    settings: Settings, request: Request, console: Console, stated: Collection[str] | None = None
) -> dict[str, Any]:
    """Prints what a run comes to, and returns the same as plain values.

    Args:
      settings: settings of the run.
      request: what is to be planned.
      console: where the tables go.
      stated: keys of which it is said if the run would not read them; all that were changed when None.

    Raises:
      InputError: settings that do not fit each other or the devices; the message names the nearest that do.
    """
    accelerator, count = _devices(request)
    # Before the work: a compile takes minutes.
    if request.file:
        _check_place(Path(os.path.abspath(request.file)))
    # Without a chip the settings have to fit this machine.
    backend = accelerator.backend if accelerator else ""
    check_settings(settings, backend)
    unread = passed_over(settings, stated)
    if unread:
        console.say(unread)
    planned = _reckon(settings, request, accelerator, count)
    tables.show_sizes(planned, request, console)
    tables.show_memory(planned, console)
    seconds = tables.show_flops(planned, request, console)
    record = _record(planned, request, count, seconds)
    if request.topology:
        jobs = aot.jobs(planned.settings, planned.shapes, planned.sizes, planned.mesh)
        programs = compile_jobs(jobs, planned, request, console)
        record["compiled"] = judge(programs, planned, count, console)
        if request.roofline:
            record["roofline"] = show_rooflines(programs, planned, console)
    if request.file:
        _write(request.file, record)
    return record


def _reckon(
    settings: Settings, request: Request, accelerator: Accelerator | None, count: int
) -> Plan:
    """Returns all figures of a plan."""
    # A TPU pads the last axis of an array to whole lanes.
    pad = 1
    if accelerator is not None:
        settings = _with_attention(settings, accelerator.backend)
        if accelerator.backend == "tpu":
            pad = memory.LANES
    mesh = _mesh(settings.mesh, request, count)
    sizes = derive_sizes(settings.rollout, settings.training, device_mesh.batch_shards(mesh))
    shapes = model_shapes(settings)
    flops = step_flops_of(settings, sizes, shapes.networks, shapes.adapter)
    sources = memory.program_sources(settings, shapes, sizes, mesh, pad)
    # Devices of an unknown kind are taken for one host's.
    devices_per_host = mesh.size
    if accelerator is not None:
        # The last host of a small run is not full.
        devices_per_host = min(mesh.size, accelerator.devices_per_host)
    resident = {}
    for name in sources:
        resident[name] = resident_memory.resident_sources(
            settings, shapes, mesh, name, devices_per_host
        )
    return Plan(settings, shapes, sizes, mesh, accelerator, flops, sources, resident)


def _mesh(settings: MeshSettings, request: Request, count: int) -> Any:
    """Returns the mesh of a run: of the topology's devices, or of `count` that are only counted."""
    if not request.topology:
        return device_mesh.abstract_mesh(count, settings.data, settings.fsdp, settings.tensor)
    devices = topology.topology_devices(request.topology)
    return device_mesh.make_mesh(settings.data, settings.fsdp, settings.tensor, devices)


def _with_attention(settings: Settings, backend: str) -> Settings:
    """Returns the settings with the attention that "auto" means on a backend."""
    model = settings.model
    attention = choose(model.attention, DTYPES[model.dtype], backend)
    return dataclasses.replace(settings, model=dataclasses.replace(model, attention=attention))


def _devices(request: Request) -> tuple[Accelerator | None, int]:
    """Returns what the devices are (None for an unknown kind), and how many.

    Raises:
      InputError: an unknown chip, or a chip or number of devices other than the topology's.
    """
    accelerator = None
    if request.chip:
        accelerator = accelerators.by_name(request.chip)
    if not request.topology:
        return accelerator, request.devices or 1
    described, count = topology.check_topology(request.topology)
    # Said twice is fine as long as both say the same.
    if accelerator not in (None, described):
        raise InputError(
            f"--chip: expected {described.name}, as in --topology={request.topology}; received {request.chip}"
        )
    if request.devices not in (0, count):
        raise InputError(
            f"--devices: expected the {count} of --topology={request.topology}; received "
            f"{request.devices}"
        )
    return described, count


def _record(
    planned: Plan, request: Request, count: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """Plain values of a plan, for JSON."""
    settings, shapes = planned.settings, planned.shapes
    chip = planned.accelerator.name if planned.accelerator else None
    sample = shapes.networks.sample_flops(
        shapes.adapter, shapes.size, settings.model.max_sequence_length
    )
    return {
        "config": flatten(settings),
        "devices": count,
        "mesh": dict(planned.mesh.shape),
        "topology": request.topology,
        "chip": chip,
        "sizes": dataclasses.asdict(planned.sizes),
        "step_flops": dataclasses.asdict(planned.flops),
        "sample_flops": dataclasses.asdict(sample),
        "network_passes": dataclasses.asdict(network_passes(settings, planned.sizes)),
        "utilisation": request.utilisation,
        "seconds": seconds,
        "memory": memory.as_record(planned.sources),
        "resident": memory.as_record(planned.resident),
    }


def _check_place(file: Path) -> None:
    """Raises InputError for a place where no file can be written."""
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(
            f"--json: expected a file in a folder that is there; received {str(file)!r}"
        )


def _write(file: str, record: dict[str, Any]) -> None:
    """Writes the record whole or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    target = Path(file)
    # Beside the target, as only a rename within one file system replaces a file at once.
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise InputError(
            f"--json: expected a writable file; received {file!r} ({error.strerror})"
        ) from None
