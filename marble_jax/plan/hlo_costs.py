"""What one run of a compiled program does on one device, read off its optimised HLO text: products and exchanges.

Bodies of loops count as often as they run, which XLA's own cost analysis does not do; the compiler notes how often
that is. A loop of unknown length counts once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from marble_jax.families.base import Family
from marble_jax.plan.hlo import IN_LOOP, KINDS, origin_of, result_bytes

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:"?(\d+)"?\}')
_SIDES = re.compile(r"\w+\[([\d,]*)\]")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")

ALWAYS = "always"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A kind of exchange that a program is known to need.

    Attributes:
      kind: of the collective.
      when: "loop", "once" or `ALWAYS`.
      origin: pattern of its origin, by JAX's names.
      reason: why it is there.
    """

    kind: str
    when: str
    origin: str
    reason: str

    def explains(self, kind: str, where: str, origin: str) -> bool:
        """Whether a collective is one of these."""
        if kind != self.kind or self.when not in (where, ALWAYS):
            return False
        return re.search(self.origin, origin) is not None


def explanations(family: Family) -> tuple[Explanation, ...]:
    """Every exchange that a train step, rollout or decoder is known to need, and why."""
    return (
        Explanation(
            "all-gather",
            ALWAYS,
            r"/(squeeze|dynamic_slice|sharding_constraint|gathered)",
            "base weights of one layer, split over fsdp, put together where they are used",
        ),
        Explanation(
            "all-gather",
            ALWAYS,
            rf"/({family.gathered_tables})/",
            "centre of the positional table, split over fsdp",
        ),
        Explanation(
            "all-reduce",
            "loop",
            rf"/({family.tensor_parallel_modules})/.*dot_general",
            "activations of the device's own samples: partial products of a layer that is split over tensor",
        ),
        Explanation(
            "all-reduce",
            "once",
            r"/train/(reduce_sum|.*dot_general)$",
            "adapter gradients summed over devices, once an optimiser step, and norms and products of them",
        ),
        Explanation(
            "all-gather",
            "once",
            r"/train/(?!gather)[^/]+$",
            "adapter gradients that a layer's split over tensor left in parts, put together once an optimiser step",
        ),
    )


def reason_of(kind: str, origin: str, family: Family) -> str:
    """Why a collective of a kind and origin is there; empty where nothing explains it."""
    where = "loop" if IN_LOOP in origin else "once"
    for explanation in explanations(family):
        if explanation.explains(kind, where, origin):
            return explanation.reason
    return ""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective of a program.

    Attributes:
      kind: such as "all-reduce".
      times: it runs in one run of the program.
      bytes: of its result on one device, each time.
      origin: by JAX's names.
      looped: whether it stands in a loop.
    """

    kind: str
    times: int
    bytes: int
    origin: str

    @property
    def looped(self) -> bool:
        """Whether it stands in the body of a loop."""
        return IN_LOOP in self.origin

    @property
    def reason(self) -> str:
        """Why it is there; empty where nothing explains it."""
        return reason_of(self.kind, self.origin)


@dataclasses.dataclass(frozen=True)
class Executed:
    """What one run of a program does on one device.

    Attributes:
      flops: of matrix products and convolutions.
      exchanges: its collectives, the ones that move most first.
    """

    flops: float
    exchanges: tuple[Exchange, ...]


def executed(text: str) -> Executed:
    """Reads an optimised HLO text."""
    computations, entry = _computations(text)
    shapes = {name: kind for body in computations.values() for name, kind, _, _ in body}
    flops, exchanges = 0.0, []
    for name, times in _runs(computations, entry):
        for _, result, operation, rest in computations[name]:
            if operation in ("dot", "convolution"):
                flops += times * _flops(operation, result, rest, shapes)
            kind = operation.removesuffix("-start")
            if kind in KINDS and not operation.endswith("-done"):
                size = result_bytes(kind, result, operation.endswith("-start"))
                exchanges.append(Exchange(kind, times, size, origin_of(rest)))
    return Executed(flops, tuple(sorted(exchanges, key=lambda e: -e.times * e.bytes)))


def by_reason(exchanges: Iterable[Exchange]) -> list[tuple[str, str, int, int, int]]:
    """(kind, reason, instructions, times run, bytes in all) of exchanges that are there for the same reason."""
    found: dict[tuple[str, str], list[int]] = {}
    for one in exchanges:
        row = found.setdefault((one.kind, one.reason), [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + one.times, row[2] + one.times * one.bytes
    return sorted(((*key, *row) for key, row in found.items()), key=lambda row: -row[-1])


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Instructions (name, result, operation, rest) of every computation, and the entry's name."""
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and " = " not in line.split("(", 1)[0]:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append((match[1], match[2], match[3], match[4]))
    return found, entry


def _runs(
    computations: dict[str, list[tuple[str, str, str, str]]], entry: str
) -> Iterator[tuple[str, int]]:
    """Every computation with how often it runs, once for each place that it is called from."""
    waiting = [(entry, 1)] if entry else []
    while waiting:
        name, times = waiting.pop()
        yield name, times
        for _, _, operation, rest in computations[name]:
            trips = _TRIPS.search(rest) if operation == "while" else None
            for how, called in _CALLED.findall(rest):
                if how == "to_apply" and operation != "call":
                    continue  # the sum of a reduction, number by number
                often = times * (int(trips[1]) if trips and how == "body" else 1)
                waiting += [
                    (each.strip().lstrip("%"), often)
                    for each in called.strip("{}").split(",")
                    if each.strip().lstrip("%") in computations
                ]


def _sides(shape: str) -> list[int]:
    found = _SIDES.search(shape)
    return [int(side) for side in filter(None, found[1].split(","))] if found else []


def _flops(operation: str, result: str, rest: str, shapes: dict[str, str]) -> float:
    operands = re.findall(r"%([\w.-]+)", rest.split("), ", 1)[0])
    if operation == "dot":
        left = _sides(shapes[operands[0]])
        inner = math.prod(
            left[int(axis)] for axis in filter(None, _CONTRACTED.search(rest)[1].split(","))
        )
    else:
        kernel, labels = _sides(shapes[operands[1]]), _LABELS.search(rest)[1]
        inner = math.prod(kernel) // kernel[labels.index("o")]
    return 2.0 * math.prod(_sides(result)) * inner
