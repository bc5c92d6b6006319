"""Devices to compile for that this machine need not have: slices of TPUs and hosts of GPUs, by name.

`libtpu` holds the compiler of TPUs, JAX's GPU plugin that of GPUs (`gpu_compiler`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import jax

from marble_jax.distributed.accelerators import ACCELERATORS, Accelerator
from marble_jax.errors import InputError, nearest
from marble_jax.plan import gpu_compiler

SLICES = ("v5e", "v5p", "v6e")
"""Kinds of TPUs that `--topology` compiles for."""

KINDS = (*SLICES, *gpu_compiler.GPUS)
"""Kinds of devices that `--topology` compiles for."""

_SLICE = re.compile(r"\w+:(\d+(?:x\d+){1,2})")
_GPUS = re.compile(r"\w+:([1-9]\d{0,4})")


def check_topology(name: str) -> tuple[Accelerator, int]:
    """Returns kind and number of the devices of a topology such as `v5e:4x4` or `h100:8`.

    Raises:
      InputError: not the name of a topology, or nothing to compile with.
    """
    kind = name.partition(":")[0]
    if kind not in KINDS:
        raise _unknown(name, nearest(kind, KINDS))
    if kind in SLICES:
        match = _SLICE.fullmatch(name)
        if match is None:
            raise _unknown(name, "")
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "--topology: expected the package libtpu, which holds the compiler of TPUs; received none "
                "(pip install libtpu, or marble-jax[tpu])"
            )
        return ACCELERATORS[kind], math.prod(int(side) for side in match[1].split("x"))
    match = _GPUS.fullmatch(name)
    if match is None:
        raise _unknown(name, "")
    gpu_compiler.check_compiler()
    return ACCELERATORS[kind], int(match[1])


def _unknown(name: str, hint: str) -> InputError:
    """The refusal of a name that is no topology."""
    return InputError(
        f"--topology: expected a slice of {', '.join(SLICES)} with its shape in chips, such as v5e:4x4 or "
        f"v5p:2x2x4, or a number of {', '.join(gpu_compiler.GPUS)}, such as h100:8; received {name!r}{hint}"
    )


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a topology, to compile for.

    Raises:
      InputError: a shape or number that the devices do not come in.
    """
    accelerator, count = check_topology(name)
    if accelerator.backend == "gpu":
        return gpu_compiler.gpu_devices(accelerator.name, count)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:
        # jaxlib raises the same exception, whose base class is all that is public, for whatever is wrong.
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--topology: expected a shape made of whole hosts, such as v5e:4x4 or v5p:2x2x4; received "
            f"{name!r} ({reason})"
        ) from None


def compiler_of(accelerator: Accelerator) -> str:
    """Returns name and version of the package that compiles for an accelerator."""
    if accelerator.backend == "gpu":
        return gpu_compiler.compiler_version()
    return f"libtpu {importlib.metadata.version('libtpu')}"


def compile_for(function: Any, arguments: tuple[Any, ...], dump: str = "") -> Any:
    """Compiles a jitted function for the devices that the shardings of its arguments name.

    Args:
      function: result of `jax.jit`.
      arguments: pytrees of `jax.ShapeDtypeStruct` with shardings.
      dump: folder for what the compiler of TPUs writes down, which `program_text` reads; "" for none.

    Returns:
      A `jax.stages.Compiled`.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed; lack of memory is one reason.
      InputError: this JAX cannot trace fused attention for a GPU that is not there.
    """
    devices = jax.tree.leaves(arguments)[0].sharding.device_set
    platform = next(iter(devices)).platform
    if platform == jax.default_backend():
        return function.trace(*arguments).lower().compile()
    if platform != "gpu":
        # Without a platform JAX lowers for the one that it runs on.
        lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
        options: dict[str, Any] = {}
        if dump:
            options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        return lowered.compile(compiler_options=options)
    with gpu_compiler.cudnn_version_told():
        lowered = function.trace(*arguments).lower(lowering_platforms=(gpu_compiler.LOWERED_FOR,))
    return lowered.compile(compiler_options=gpu_compiler.COMPILER_OPTIONS)


def program_text(compiled: Any, dump: str = "") -> str:
    """Returns a program after optimisation, in XLA's text form.

    jaxlib and libtpu are of different versions of XLA, and jaxlib cannot read every instruction that libtpu writes
    (updates of several asynchronous operands, jaxlib 0.10.2 beside libtpu 0.0.52): then libtpu's own text is read.

    Args:
      compiled: result of `compile_for`.
      dump: its folder.

    Raises:
      jax.errors.JaxRuntimeError: jaxlib cannot read it, and nothing was dumped.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        texts = list(Path(dump).glob("*.after_optimizations.txt")) if dump else []
        if not texts:
            raise
        # Small programs of the compiler's own may lie beside it.
        return max(texts, key=lambda path: path.stat().st_size).read_text(encoding="utf-8")
