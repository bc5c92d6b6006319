"""Accelerators whose peak is known: what a device can compute and hold.

Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (peak compute per chip in bf16, HBM capacity and
bandwidth); NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX), L4, L40S and A10G, and its
architecture papers of the RTX 4090 and 5090 (dense rates of bf16, fp8 and int8 with sums of 32 bits, without sparsity;
float32 without tensor cores). A TPU multiplies float32 in six bf16 passes. A chip of v7x is two JAX devices, each with
half of it. `usable` of a TPU is what the XLA:TPU compiler of libtpu 0.0.51 (of v7x, 0.0.42) has to give to a program
("exceeds available HBM (15.75G)"); of a GPU, three quarters of the memory, which is what JAX allocates unless told
otherwise.
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
      float32: peak FLOP/s of products in full float32.
      memory: bytes of HBM.
      usable: bytes of it that a program can have.
      bandwidth: bytes/s of HBM.
      devices_per_host: devices of one host of a slice or a cluster.
      int8: rate of int8 products over `flops`; 1 where the device has no faster ones.
      fp8: the same of float8_e4m3.
    """

    name: str
    kinds: tuple[str, ...]
    backend: str
    flops: float
    float32: float
    memory: float
    usable: float
    bandwidth: float
    devices_per_host: int
    int8: float = 2.0
    fp8: float = 2.0

    @property
    def rates(self) -> dict[str, float]:
        """FLOP/s of products by the type of their factors; "half" is bfloat16, and float32 that is rounded first."""
        return {
            "half": self.flops,
            "float32": self.float32,
            "int8": self.int8 * self.flops,
            "fp8": self.fp8 * self.flops,
        }

    def matched_length(self, device_kind: str) -> int:
        """Returns the length of the longest of `kinds` that a device kind begins with, in any case; 0 for none.

        A kind ends where a word does: an L40 is no L4.
        """
        given = device_kind.lower()
        lengths = [len(kind) for kind in self.kinds if _begins_with(given, kind.lower())]
        return max(lengths, default=0)


def _begins_with(text: str, words: str) -> bool:
    return text.startswith(words) and not text[len(words) : len(words) + 1].isalnum()


_A100 = ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB")
_V5E, _V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e")
_RTX5090 = ("NVIDIA GeForce RTX 5090",)
_H200 = 141e9
# name, device kinds, backend, FLOP/s, FLOP/s in float32, memory, usable, bandwidth, devices of a host, int8, fp8
# fmt: off
_TABLE = (
    Accelerator("v4", ("TPU v4",), "tpu", 275e12, 275e12 / 6, 32 * GIB, 30.5 * GIB, 1.228e12, 4, 1, 1),
    Accelerator("v5e", _V5E, "tpu", 197e12, 197e12 / 6, 16 * GIB, 15.75 * GIB, 0.819e12, 4, 2, 1),
    Accelerator("v5p", ("TPU v5p", "TPU v5"), "tpu", 459e12, 459e12 / 6, 96 * GIB, 95.73 * GIB, 2.765e12, 4, 2, 1),
    Accelerator("v6e", _V6E, "tpu", 918e12, 918e12 / 6, 32 * GIB, 31.24 * GIB, 1.640e12, 4, 2, 1),
    Accelerator("v7x", ("TPU7x",), "tpu", 1153.5e12, 1153.5e12 / 6, 96 * GIB, 94.75 * GIB, 3.69e12, 8, 1, 2),
    Accelerator("a100", _A100, "gpu", 312e12, 19.5e12, 80 * GIB, 60 * GIB, 2.039e12, 8, 2, 1),
    Accelerator("h100", ("NVIDIA H100",), "gpu", 989e12, 67e12, 80 * GIB, 60 * GIB, 3.35e12, 8),
    Accelerator("h200", ("NVIDIA H200",), "gpu", 989e12, 67e12, _H200, 0.75 * _H200, 4.8e12, 8),
    Accelerator("b200", ("NVIDIA B200",), "gpu", 2250e12, 75e12, 180e9, 135e9, 7.7e12, 8),
    Accelerator("l4", ("NVIDIA L4",), "gpu", 121e12, 30.3e12, 24 * GIB, 18 * GIB, 0.3e12, 8),
    Accelerator("a10g", ("NVIDIA A10G",), "gpu", 70e12, 35e12, 24 * GIB, 18 * GIB, 0.6e12, 8, 2, 1),
    Accelerator("l40s", ("NVIDIA L40S",), "gpu", 362e12, 91.6e12, 48 * GIB, 36 * GIB, 0.864e12, 8),
    Accelerator("rtx4090", ("NVIDIA GeForce RTX 4090",), "gpu", 165e12, 82.6e12, 24 * GIB, 18 * GIB, 1.008e12, 1, 4, 2),
    Accelerator("rtx5090", _RTX5090, "gpu", 209.5e12, 104.8e12, 32 * GIB, 24 * GIB, 1.792e12, 1, 4, 2),
)
# fmt: on
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
