"""Collectives of an optimised HLO text, by kind: how many, how large, and whether a loop repeats them."""

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
_LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64|c128)\[([\d,]*)\]")
IN_LOOP = "while/body"  # in the origin of what stands in the body of a loop
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and place.

    Attributes:
      kind: such as "all-reduce".
      looped: whether they stand in the body of a loop, which runs them many times.
      count: instructions in the program's text.
      bytes: of their results on one device, each instruction once.
      origin: where the largest comes from, by JAX's names.
    """

    kind: str
    looped: bool
    count: int
    bytes: int
    origin: str


def collectives(text: str) -> tuple[Collective, ...]:
    """Every collective of an HLO text, the largest kinds first."""
    found: dict[tuple[str, bool], list[tuple[int, str]]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        size = result_bytes(match[2], match[1], bool(match[3]))
        origin = origin_of(line)
        found.setdefault((match[2], IN_LOOP in origin), []).append((size, origin))
    rows = [
        Collective(kind, looped, len(each), sum(size for size, _ in each), max(each)[1])
        for (kind, looped), each in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def origin_of(line: str) -> str:
    """Where an instruction comes from, by JAX's names; empty where the compiler put it there."""
    found = _OP_NAME.search(line)
    return found[1] if found else ""


def result_bytes(kind: str, result: str, started: bool) -> int:
    """Bytes of a collective's result.

    Args:
      kind: such as "all-reduce".
      result: its type in the text.
      started: whether it is the start of an asynchronous one.
    """
    shapes = [_size(*shape) for shape in _SHAPE.findall(result) if shape[1] or not started]
    if started and kind != "all-reduce":
        shapes = shapes[
            len(shapes) // 2 :
        ]  # an asynchronous start gives its operands, then its results
    return sum(shapes)


def _size(kind: str, sides: str) -> int:
    width = _BYTES.get(kind) or (1 if kind.startswith("f8") else int(kind[1:]) // 8)
    for side in filter(None, sides.split(",")):
        width *= int(side)
    return width
