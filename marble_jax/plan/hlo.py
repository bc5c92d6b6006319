"""Collectives of an optimised HLO text, by kind: how many, how large, and whether a loop repeats them.

And the fused attention kernels in it.
"""

from __future__ import annotations

import dataclasses
import re

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
"""Operations that move numbers between devices."""

IN_LOOP = "while/body"
"""Part of the origin of every instruction in the body of a loop."""

_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64|c128)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# Types whose names do not say their width in bits as `f32` does. Numbers of 8 bits have many names (f8e4m3fn, ...).
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
_EIGHT_BITS = "f8"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind, either all inside loops or all outside.

    Attributes:
      kind: operation, such as "all-reduce".
      looped: whether they stand in the body of a loop, which runs them many times.
      count: instructions in the program's text.
      bytes: bytes of their results on one device, each instruction once.
      origin: where the largest comes from, by JAX's names.
    """

    kind: str
    looped: bool
    count: int
    bytes: int
    origin: str


_CUDNN_KERNEL = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
_TPU_KERNEL = re.compile(r'%?([\w.-]+) = .*custom_call_target="tpu_custom_call"')
_TPU_BACKWARD = ("_dq", "_dkv")
"""Parts of the names of the kernels in splash attention's backward pass."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Fused attention kernels in a program's text, those in loops once.

    Attributes:
      forward: of the forward pass.
      backward: of the backward pass.
    """

    forward: int
    backward: int

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.forward + self.backward > 0


def fused_kernels(text: str) -> Kernels:
    """Returns the fused attention of an HLO text: cuDNN's on GPUs, splash attention on TPUs."""
    forward = backward = 0
    for line in text.splitlines():
        match = _CUDNN_KERNEL.search(line)
        if match is not None:
            is_backward = match[1] is not None
        else:
            match = _TPU_KERNEL.search(line)
            if match is None:
                continue
            is_backward = any(part in match[1] for part in _TPU_BACKWARD)
        if is_backward:
            backward += 1
        else:
            forward += 1
    return Kernels(forward, backward)


def collectives(text: str) -> tuple[Collective, ...]:
    """Returns every collective of an HLO text, the kinds that move most first."""
    instructions: dict[tuple[str, bool], list[tuple[int, str]]] = {}
    for line in text.splitlines():
        match = _COLLECTIVE.match(line)
        if not match:
            continue
        result, kind, start = match.groups()
        size = result_bytes(kind, result, start is not None)
        origin = origin_of(line)
        instructions.setdefault((kind, IN_LOOP in origin), []).append((size, origin))
    rows = []
    for (kind, looped), members in instructions.items():
        total = sum(size for size, _ in members)
        _, largest_origin = max(members)
        rows.append(Collective(kind, looped, len(members), total, largest_origin))
    rows.sort(key=lambda row: -row.bytes)
    return tuple(rows)


def origin_of(line: str) -> str:
    """Where an instruction comes from, by JAX's names; empty where the compiler put it there."""
    return captured(_OP_NAME, line)


def captured(pattern: re.Pattern[str], text: str) -> str:
    """What the pattern's group matches in a text; empty where the pattern does not match."""
    match = pattern.search(text)
    if match is None:
        return ""
    return match[1]


def result_bytes(kind: str, result: str, started: bool) -> int:
    """Bytes of a collective's result.

    Args:
      kind: operation, such as "all-reduce".
      result: type of the result in the text.
      started: whether the instruction is the start of an asynchronous collective.
    """
    sizes = []
    for dtype, sides in _SHAPE.findall(result):
        # Scalars in the tuple of a start are its counters, and no data.
        if sides or not started:
            sizes.append(_size(dtype, sides))
    if started and kind != "all-reduce":
        # The tuple of a start lists its operands and then its results; an all-reduce's lists results alone.
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def whole_numbers(text: str) -> list[int]:
    """Numbers separated by commas, such as the sides of a shape or axes; none for an empty text."""
    if not text:
        return []
    return [int(number) for number in text.split(",")]


def _size(dtype: str, sides: str) -> int:
    """Bytes of an array of a type with these sides."""
    size = number_bytes(dtype)
    for side in whole_numbers(sides):
        size *= side
    return size


def number_bytes(dtype: str) -> int:
    """Bytes of one number of a type such as "bf16"."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    if dtype.startswith(_EIGHT_BITS):
        return 1
    bits = int(dtype[1:])
    return bits // 8
