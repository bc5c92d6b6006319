"""The preset for this machine's GPU at full size, compiled from shapes: run by `python -m tools.gpu`."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import pytest

from marble_jax.config import settings_of
from marble_jax.distributed import accelerators, device_mesh
from marble_jax.plan import aot, memory, resident_memory
from marble_jax.plan.model_shapes import model_shapes
from marble_jax.training.batch_sizes import derive_sizes

pytestmark = pytest.mark.gpu
CONFIG = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "sd3.py"))["get_config"]


def test_the_preset_for_this_card_fits_as_planned(capsys):
    """The compiler's figure is what the plan says within a third; no weights are needed."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU; JAX's backend is {jax.default_backend()}")
    chip = accelerators.by_device_kind(jax.devices()[0].device_kind)
    if chip is None or chip.memory < 79e9:
        pytest.skip(
            f"needs a GPU of 80 GB in the table of chips; this one is {jax.devices()[0].device_kind}"
        )
    settings = settings_of(CONFIG("gpu_140gb" if chip.memory > 130e9 else "gpu_80gb"))
    mesh = device_mesh.make_mesh(devices=jax.devices()[:1])
    shapes, sizes = model_shapes(settings), derive_sizes(settings.rollout, settings.training, 1)
    sources = memory.program_sources(settings, shapes, sizes, mesh, 1)
    planned = memory.total(sources["train, solving"])
    job = aot.jobs(settings, shapes, sizes, mesh)["train, solving"]
    program = aot.compile_program("train, solving", job)
    beside = memory.total(
        resident_memory.resident_sources(settings, shapes, mesh, "train, solving")
    )
    with capsys.disabled():
        print(
            f"\n{settings.name}: compiled {program.needed / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB, beside it "
            f"{beside / 1e9:.2f} GB, usable {chip.usable / 1e9:.2f} GB; compiled in {program.seconds:.0f} s"
        )
    assert program.needed + beside < chip.usable
    assert abs(planned / program.needed - 1) < 1 / 3
