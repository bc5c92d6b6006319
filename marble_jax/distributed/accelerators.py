"""Accelerators whose peak is known: what a device can compute and hold.

Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (peak compute per chip in bf16, HBM capacity and bandwidth);
NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200 SXM (dense bf16 tensor-core rate, without sparsity).
`usable` of a TPU is what the XLA:TPU compiler of libtpu 0.0.51 has to give to a program ("exceeds available HBM
(15.75G)"); of a GPU, three quarters of the memory, which is what JAX allocates unless told otherwise.
"""

from __future__ import annotations

import dataclasses

from marble_jax.errors import InputError, nearest

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One accelerator, which is one JAX device.

    Attributes:
      name: short name, as in `v5e:4x4`.
      kinds: beginnings of the device kinds that JAX reports for it.
      backend: "tpu" or "gpu".
      flops: peak dense bfloat16 FLOP/s.
      memory: bytes of HBM.
      usable: bytes of it that a program can have.
      bandwidth: bytes/s of HBM.
      devices_per_host: devices of one host of a slice or a cluster.
    """

    name: str
    kinds: tuple[str, ...]
    backend: str
    flops: float
    memory: float
    usable: float
    bandwidth: float
    devices_per_host: int

    def matched_length(self, device_kind: str) -> int:
        """Returns the length of the longest of `kinds` that a device kind begins with, in any case; 0 for none."""
        lengths = [len(kind) for kind in self.kinds if device_kind.lower().startswith(kind.lower())]
        return max(lengths, default=0)


_TABLE = (
    # name, device kinds, backend, FLOP/s, memory, usable, bandwidth, devices of a host
    Accelerator("v4", ("TPU v4",), "tpu", 275e12, 32 * GIB, 30.5 * GIB, 1.228e12, 4),
    Accelerator(
        "v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 197e12, 16 * GIB, 15.75 * GIB, 0.819e12, 4
    ),
    Accelerator("v5p", ("TPU v5p", "TPU v5"), "tpu", 459e12, 96 * GIB, 95.73 * GIB, 2.765e12, 4),
    Accelerator(
        "v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 918e12, 32 * GIB, 31.24 * GIB, 1.640e12, 4
    ),
    Accelerator(
        "a100",
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        "gpu",
        312e12,
        80 * GIB,
        60 * GIB,
        2.039e12,
        8,
    ),
    Accelerator("h100", ("NVIDIA H100",), "gpu", 989e12, 80 * GIB, 60 * GIB, 3.35e12, 8),
    Accelerator("h200", ("NVIDIA H200",), "gpu", 989e12, 141e9, 0.75 * 141e9, 4.8e12, 8),
)
ACCELERATORS = {accelerator.name: accelerator for accelerator in _TABLE}


def by_device_kind(device_kind: str) -> Accelerator | None:
    """Returns the accelerator that JAX reports as `device_kind`; None where the table has none."""
    best, longest = None, 0
    for accelerator in ACCELERATORS.values():
        # The longest beginning decides: "TPU v5" of v5p also begins "TPU v5 lite" of v5e.
        matched = accelerator.matched_length(device_kind)
        if matched > longest:
            best, longest = accelerator, matched
    return best


def by_name(name: str) -> Accelerator:
    """Returns the accelerator of a short name, in any case of letters.

    Raises:
      InputError: no accelerator of that name.
    """
    if name.lower() not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise InputError(
            f"chip: expected one of {known}; received {name!r}{nearest(name, ACCELERATORS)}"
        )
    return ACCELERATORS[name.lower()]
