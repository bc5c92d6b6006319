"""What one run of a compiled program does on one device, read off its optimised HLO text: products and exchanges.

The body of a loop counts as often as it runs, which XLA's own cost analysis does not do; the compiler notes in the
text how often that is. A loop of unknown length counts once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from marble_jax.families.base import Family
from marble_jax.plan.hlo import IN_LOOP, KINDS, origin_of, result_bytes, whole_numbers

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:"?(\d+)"?\}')
_SIDES = re.compile(r"\w+\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")

ALWAYS = "always"
"""An exchange that is explained both inside of loops and outside."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A kind of exchange that a program is known to need.

    Attributes:
      kind: operation of the collective.
      when: "loop" or "once", for inside of a loop or outside, or `ALWAYS`.
      origin: regular expression of the collective's origin, by JAX's names.
      reason: why the exchange is there.
    """

    kind: str
    when: str
    origin: str
    reason: str

    def explains(self, kind: str, where: str, origin: str) -> bool:
        """Whether a collective of this kind, place ("loop" or "once") and origin is explained."""
        if kind != self.kind or self.when not in (where, ALWAYS):
            return False
        return re.search(self.origin, origin) is not None


def explanations(family: Family) -> tuple[Explanation, ...]:
    """Every exchange that a train step, rollout or decoder is known to need, and why.

    Args:
      family: model family, which names the modules that are split over devices.
    """
    return (
        Explanation(
            "all-gather",
            ALWAYS,
            # An argument that is put together whole goes by its own name.
            r"/(squeeze|dynamic_slice|sharding_constraint|gathered)|^params\[",
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
    where = "once"
    if IN_LOOP in origin:
        where = "loop"
    for explanation in explanations(family):
        if explanation.explains(kind, where, origin):
            return explanation.reason
    return ""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective of a program.

    Attributes:
      kind: operation, such as "all-reduce".
      times: how often the collective runs in one run of the program.
      bytes: bytes of its result on one device, each time.
      origin: where it comes from, by JAX's names.
      reason: why it is there; empty where nothing explains it.
    """

    kind: str
    times: int
    bytes: int
    origin: str
    reason: str

    @property
    def looped(self) -> bool:
        """Whether the collective stands in the body of a loop."""
        return IN_LOOP in self.origin


@dataclasses.dataclass(frozen=True)
class ProgramCosts:
    """What one run of a program does on one device.

    Attributes:
      flops: FLOPs of matrix products and convolutions.
      exchanges: collectives, the ones that move most first.
    """

    flops: float
    exchanges: tuple[Exchange, ...]


def program_costs(text: str, family: Family) -> ProgramCosts:
    """Reads products and exchanges off an optimised HLO text.

    Args:
      text: the program as XLA prints it after optimisation.
      family: model family of the program, for the reasons of its exchanges.
    """
    program = _parse(text)
    shapes = {}
    for body in program.computations.values():
        for instruction in body:
            shapes[instruction.name] = instruction.result
    flops = 0.0
    exchanges = []
    for name, times in _runs(program):
        for instruction in program.computations[name]:
            if instruction.operation in ("dot", "convolution"):
                flops += times * _flops(instruction, shapes)
            elif _is_exchange(instruction):
                exchanges.append(_exchange(instruction, times, family))
    exchanges.sort(key=lambda exchange: -exchange.times * exchange.bytes)
    return ProgramCosts(flops, tuple(exchanges))


@dataclasses.dataclass(frozen=True)
class ReasonTotal:
    """Exchanges of one kind that are there for the same reason.

    Attributes:
      kind: operation, such as "all-reduce".
      reason: why they are there; empty where nothing explains them.
      instructions: how many the program's text has.
      times: how often they run, all together, in one run of the program.
      bytes: bytes of all their results on one device, all runs together.
    """

    kind: str
    reason: str
    instructions: int
    times: int
    bytes: int


def by_reason(exchanges: Iterable[Exchange]) -> list[ReasonTotal]:
    """Returns exchanges summed over those of one kind and reason, the ones that move most first."""
    groups: dict[tuple[str, str], list[Exchange]] = {}
    for exchange in exchanges:
        groups.setdefault((exchange.kind, exchange.reason), []).append(exchange)
    totals = []
    for (kind, reason), members in groups.items():
        times = sum(exchange.times for exchange in members)
        moved = sum(exchange.times * exchange.bytes for exchange in members)
        totals.append(ReasonTotal(kind, reason, len(members), times, moved))
    totals.sort(key=lambda total: -total.bytes)
    return totals


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One instruction: its name, the type of its result, its operation, and the text behind the operation's bracket."""

    name: str
    result: str
    operation: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class _Program:
    """Computations of a text by name, and which of them runs first (empty where there is none)."""

    computations: dict[str, list[_Instruction]]
    entry: str


def _parse(text: str) -> _Program:
    """Reads the computations of an HLO text."""
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    body: list[_Instruction] | None = None
    for line in text.splitlines():
        head = _HEAD.match(line)
        # An instruction with a nested bracket can look like the head of a computation, but for its " = ".
        if head is not None and " = " not in line.split("(", 1)[0]:
            body = computations.setdefault(head[2], [])
            if head[1]:
                entry = head[2]
            continue
        match = _INSTRUCTION.match(line)
        if match is not None and body is not None:
            body.append(_Instruction(*match.groups()))
    return _Program(computations, entry)


def _runs(program: _Program) -> Iterator[tuple[str, int]]:
    """Every computation with how often it runs, once for each place that it is called from."""
    waiting: list[tuple[str, int]] = []
    if program.entry:
        waiting.append((program.entry, 1))
    while waiting:
        name, times = waiting.pop()
        yield name, times
        for instruction in program.computations[name]:
            for callee, often in _calls(instruction):
                # Pieces of a kernel's own configuration match the pattern of a call, too.
                if callee in program.computations:
                    waiting.append((callee, times * often))


def _calls(instruction: _Instruction) -> list[tuple[str, int]]:
    """Computations that an instruction calls, with how often one run of the instruction runs them."""
    trips = 1
    count = _TRIPS.search(instruction.arguments)
    if instruction.operation == "while" and count is not None:
        trips = int(count[1])
    calls = []
    for role, callees in _CALLED.findall(instruction.arguments):
        # The `to_apply` of a reduction adds two numbers; that of a call is a part of the program.
        if role == "to_apply" and instruction.operation != "call":
            continue
        times = 1
        if role == "body":
            times = trips
        for callee in callees.strip("{}").split(","):
            calls.append((callee.strip().lstrip("%"), times))
    return calls


def _is_exchange(instruction: _Instruction) -> bool:
    """Whether an instruction is a collective, or the start of an asynchronous one; its end moves nothing more."""
    return instruction.operation.removesuffix("-start") in KINDS


def _exchange(instruction: _Instruction, times: int, family: Family) -> Exchange:
    """The exchange that a collective's instruction stands for."""
    kind = instruction.operation.removesuffix("-start")
    started = instruction.operation.endswith("-start")
    size = result_bytes(kind, instruction.result, started)
    origin = origin_of(instruction.arguments)
    return Exchange(kind, times, size, origin, reason_of(kind, origin, family))


def _flops(instruction: _Instruction, shapes: Mapping[str, str]) -> float:
    """FLOPs of a matrix product or convolution: two for each product of numbers.

    Args:
      instruction: operation "dot" or "convolution".
      shapes: type of every instruction's result, by the instruction's name.
    """
    # Operands end at the first bracket; the attributes behind it name computations with the same sign.
    operands = _OPERAND.findall(instruction.arguments.split("), ", 1)[0])
    summed = 1
    if instruction.operation == "dot":
        left = _sides(shapes[operands[0]])
        for axis in whole_numbers(_captured(_CONTRACTED, instruction.arguments)):
            summed *= left[axis]
    else:
        kernel = _sides(shapes[operands[1]])
        labels = _captured(_LABELS, instruction.arguments)
        # A number of the output sums over every axis of the kernel but the output's channels.
        summed = math.prod(kernel) // kernel[labels.index("o")]
    return 2.0 * math.prod(_sides(instruction.result)) * summed


def _sides(shape: str) -> list[int]:
    """Sides of the first array of a type."""
    return whole_numbers(_captured(_SIDES, shape))


def _captured(pattern: re.Pattern[str], text: str) -> str:
    """What the pattern's group matches in a text; empty where the pattern does not match."""
    match = pattern.search(text)
    if match is None:
        return ""
    return match[1]
