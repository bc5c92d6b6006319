"""XLA's compiler for NVIDIA GPUs on a machine without one.

The GPU plugin of JAX (`marble-jax[cuda]`) holds the compiler; `jax.experimental.topologies` describes GPUs to it from
figures of the hardware, in the text form of XLA's `GpuTargetConfigProto`. JAX asks cuDNN for its version while it
traces fused attention, which cuDNN answers on a machine with a GPU alone: the answer is given for it here, through the
one private name of this file.

What differs from compiling on a GPU: nothing is timed, so products are cuBLAS's with its default algorithm rather than
the faster of cuBLAS and Triton, and the memory that cuBLAS and cuDNN ask for at run time is not counted.

Source: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and B200; CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"; XLA's `GpuTargetConfigProto` for what the fields are called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax

from marble_jax.distributed.accelerators import ACCELERATORS
from marble_jax.errors import InputError

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
"""Packages of the compiler, any of which will do."""

LOWERED_FOR = "cuda"
"""JAX's name for these GPUs when it lowers a program."""

COMPILER_OPTIONS = {
    # Without a GPU nothing can be timed.
    "xla_gpu_autotune_level": 0,
    # Untimed, XLA takes Triton for every product, in shapes that it cannot all compile.
    "xla_gpu_enable_triton_gemm": False,
}

CUDNN_VERSION = 91002
"""cuDNN 9.10.2, from which on all GPUs below have the fused attention of a 64 wide head."""


@dataclasses.dataclass(frozen=True)
class _Hardware:
    """Figures that XLA's compiler asks for.

    Attributes:
      capability: major and minor compute capability.
      multiprocessors: streaming multiprocessors.
      lanes: float32 units of a multiprocessor.
      shared_memory: bytes of shared memory of a multiprocessor.
      block_memory: bytes of it that one block can have.
      cache: bytes of the L2 cache.
      gigahertz: boost clock.
      accelerated: whether code may use the instructions of this very architecture (sm_90a, sm_100a).
    """

    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    shared_memory: int
    block_memory: int
    cache: int
    gigahertz: float
    accelerated: bool


_KIB = 1 << 10
_MIB = 1 << 20
_HOPPER = _Hardware((9, 0), 132, 128, 228 * _KIB, 227 * _KIB, 50 * _MIB, 1.98, True)
_HARDWARE = {
    "a100": _Hardware((8, 0), 108, 64, 164 * _KIB, 163 * _KIB, 40 * _MIB, 1.41, False),
    "h100": _HOPPER,
    "h200": _HOPPER,
    "b200": _Hardware((10, 0), 148, 128, 228 * _KIB, 227 * _KIB, 126 * _MIB, 1.965, True),
}
GPUS = tuple(_HARDWARE)
"""GPUs that `--topology` compiles for."""


def check_compiler() -> None:
    """Makes sure that there is a compiler for GPUs.

    Raises:
      InputError: there is none.
    """
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        raise InputError(
            "--topology: expected the GPU plugin of JAX, which holds the compiler of GPUs; received none "
            "(pip install 'marble-jax[cuda]')"
        )


def compiler_version() -> str:
    """Returns name and version of the plugin."""
    for package in PLUGINS:
        distribution = package.replace("_", "-")
        if importlib.util.find_spec(package):
            return f"{distribution} {importlib.metadata.version(distribution)}"
    return "no GPU plugin"


def gpu_devices(name: str, count: int) -> list[Any]:
    """Returns `count` GPUs of a kind, to compile for, in hosts of eight.

    Args:
      name: one of `GPUS`.
      count: up to eight, or whole hosts of them.

    Raises:
      InputError: a number of GPUs that hosts do not come in, or a plugin that cannot describe a GPU.
    """
    from jax.experimental import topologies

    in_host = ACCELERATORS[name].devices_per_host
    hosts = max(1, count // in_host)
    if count != hosts * min(count, in_host):
        near = max(in_host, round(count / in_host) * in_host)
        raise InputError(
            f"--topology: expected up to {in_host} GPUs or whole hosts of {in_host}; received {name}:{count} "
            f"(nearest valid {name}:{near})"
        )
    # Slices, hosts of a slice, GPUs of a host.
    shape = f"1x{hosts}x{count // hosts}"
    try:
        described = topologies.get_topology_desc(
            name, platform=LOWERED_FOR, target_config=_target(name), topology=shape
        )
    except Exception as error:
        # jaxlib raises its own exception, whose base class is all that is public, for whatever is wrong.
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--topology: expected a GPU plugin that describes GPUs by figures, as jax 0.10 does; received "
            f"{compiler_version()}, jax {jax.__version__} ({reason})"
        ) from None
    return list(described.devices)


def _target(name: str) -> str:
    """A GPU's figures as XLA's `GpuTargetConfigProto` in text."""
    hardware, accelerator = _HARDWARE[name], ACCELERATORS[name]
    major, minor = hardware.capability
    features = "ACCELERATED_FEATURES" if hardware.accelerated else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {hardware.multiprocessors}
  fpus_per_core: {hardware.lanes}
  clock_rate_ghz: {hardware.gigahertz}
  memory_bandwidth: {int(accelerator.bandwidth)}
  device_memory_size: {int(accelerator.memory)}
  l2_cache_size: {hardware.cache}
  shared_memory_per_core: {hardware.shared_memory}
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_block_optin: {hardware.block_memory}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN_VERSION // 10000} minor: {CUDNN_VERSION // 100 % 100} patch: {CUDNN_VERSION % 100} }}
device_description_str: "{accelerator.kinds[0]}"
"""


@contextlib.contextmanager
def cudnn_version_told() -> Iterator[None]:
    """Answers, inside, JAX's question for the version of cuDNN, which needs a GPU to be asked.

    Raises:
      InputError: this JAX asks in another way.
    """
    # JAX has no public way: it asks the cuDNN that is loaded, and refuses to trace fused attention without one.
    module = "jax._src.cudnn.fused_attention_stablehlo"
    try:
        asker: Any = importlib.import_module(module)
        asked = asker.check_cudnn_version
    except (ImportError, AttributeError):
        raise InputError(
            "--topology: expected a JAX that asks for cuDNN's version where 0.10 does, to compile fused attention "
            f"without a GPU; received jax {jax.__version__} (--config.model.attention=xla does without)"
        ) from None
    asker.check_cudnn_version = lambda: CUDNN_VERSION
    try:
        yield
    finally:
        asker.check_cudnn_version = asked
