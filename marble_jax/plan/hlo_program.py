"""Computations and instructions of an optimised HLO text, and how often one run of the program runs each of them.

The body of a loop counts as often as it runs, which XLA's own cost analysis does not do; the compiler notes in the
text how often that is. A loop of unknown length counts once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from marble_jax.plan.hlo import captured, whole_numbers

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:"?(\d+)"?\}')
_SIDES = re.compile(r"\w+\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_NUMBER = re.compile(r"(-?\d+)\)")
_INDEX = re.compile(r"index=(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: its name, unique in the program.
      result: type of its result, with layout.
      operation: its operation, such as "fusion".
      arguments: text behind the operation's bracket: operands, then attributes.
      is_root: whether its result is that of its computation.
    """

    name: str
    result: str
    operation: str
    arguments: str
    is_root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it reads."""
        # Operands end at the first bracket; the attributes behind it name computations with the same sign.
        return _OPERAND.findall(self.arguments.split("), ", 1)[0])

    @property
    def callees(self) -> list[tuple[str, str]]:
        """Role and name of every computation that it calls; a reduction's sum of two numbers is none."""
        called = []
        for role, names in _CALLED.findall(self.arguments):
            # The `to_apply` of a reduction adds two numbers; that of a call is a part of the program.
            if role == "to_apply" and self.operation != "call":
                continue
            for name in names.strip("{}").split(","):
                called.append((role, name.strip().lstrip("%")))
        return called


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """Computations of a text.

    Attributes:
      computations: instructions by the name of their computation.
      entry: the computation that runs first; empty where there is none.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    def types(self) -> dict[str, str]:
        """Type of every instruction's result, by the instruction's name."""
        types = {}
        for body in self.computations.values():
            for instruction in body:
                types[instruction.name] = instruction.result
        return types

    def runs(self, into_fusions: bool = True) -> Iterator[tuple[str, int]]:
        """Yields every computation with how often it runs, once for each place that it is called from.

        Args:
          into_fusions: whether what a fusion is made of is a computation of its own, too.
        """
        waiting: list[tuple[str, int]] = []
        if self.entry:
            waiting.append((self.entry, 1))
        while waiting:
            name, times = waiting.pop()
            yield name, times
            for instruction in self.computations[name]:
                if instruction.operation == "fusion" and not into_fusions:
                    continue
                for role, callee in instruction.callees:
                    # Pieces of a kernel's own configuration match the pattern of a call, too.
                    if callee in self.computations:
                        often = self.trips(instruction) if role == "body" else 1
                        waiting.append((callee, times * often))

    def trips(self, loop: Instruction) -> int:
        """How often the body of a loop runs; 1 where the text does not say.

        XLA notes the number on CPUs and GPUs. For TPUs it follows from the condition, a comparison of a counter with a
        constant, which the body adds a constant to.
        """
        noted = _TRIPS.search(loop.arguments)
        if noted is not None:
            return int(noted[1])
        called = dict(loop.callees)
        condition = self.computations.get(called.get("condition", ""), [])
        body = self.computations.get(called.get("body", ""), [])
        for part in condition:
            if part.is_root and part.operation == "compare" and "direction=LT" in part.arguments:
                counter, limit = part.operands
                end = _constant(condition, limit)
                place = _tuple_index(condition, counter)
                if end is not None and place is not None:
                    return max(-(-end // _step(body, place)), 1)
        return 1


def _constant(body: list[Instruction], name: str) -> int | None:
    """A whole number that an instruction of a computation is; None for another instruction."""
    for part in body:
        if part.name == name and part.operation == "constant":
            match = _NUMBER.match(part.arguments)
            return int(match[1]) if match is not None else None
    return None


def _tuple_index(body: list[Instruction], name: str) -> int | None:
    """Which part of a tuple an instruction of a computation takes; None for another instruction."""
    for part in body:
        if part.name == name and part.operation == "get-tuple-element":
            return int(captured(_INDEX, part.arguments))
    return None


def _step(body: list[Instruction], place: int) -> int:
    """What the body of a loop adds to the counter at a place of its tuple; 1 where that is not found."""
    for part in body:
        if part.operation != "add":
            continue
        counter, step = part.operands
        added = _constant(body, step)
        if added is not None and _tuple_index(body, counter) == place:
            return max(added, 1)
    return 1


def parse_program(text: str) -> HloProgram:
    """Reads the computations of an HLO text."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    body: list[Instruction] | None = None
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
            root, name, result, operation, arguments = match.groups()
            body.append(Instruction(name, result, operation, arguments, root is not None))
    return HloProgram(computations, entry)


def sides_of(shape: str) -> list[int]:
    """Sides of the first array of a type."""
    return whole_numbers(captured(_SIDES, shape))
