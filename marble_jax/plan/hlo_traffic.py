"""Bytes that an instruction of an optimised HLO text moves between a device and its memory.

An instruction reads its operands and writes its result once. A slice moves what is sliced and an update in place what
is written, also inside of a fusion. A TPU pads arrays to whole tiles, which the layout states and which are moved, too;
what lies in a TPU's vector memory, which the layout states as well, is not.
"""

from __future__ import annotations

import math
import re

from marble_jax.plan.hlo import number_bytes, whole_numbers
from marble_jax.plan.hlo_program import HloProgram, Instruction

_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64|c128)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\((\d+(?:,\d+)*)\)")
_VECTOR_MEMORY = re.compile(r"S\([1-4]\)")
_PARAMETER_NUMBER = re.compile(r"^(\d+)\)")

NOTHING_MOVED = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "domain",
        "async-update",
    }
)
"""Operations that move nothing by themselves."""

_SLICES = frozenset({"slice", "dynamic-slice", "gather"})
_RENAMED = frozenset({"bitcast", "reshape", "get-tuple-element"})


class Traffic:
    """Bytes moved by the instructions of a program.

    Args:
      program: the program.
      backend: "tpu", "gpu" or "cpu".
    """

    def __init__(self, program: HloProgram, backend: str):
        self._program, self._types = program, program.types()
        self._backend = backend

    def size(self, type_text: str) -> float:
        """Bytes of a type in the device's memory, tiles filled up."""
        total = 0.0
        for dtype, sides, layout in _ARRAY.findall(type_text):
            if self._backend == "tpu" and _VECTOR_MEMORY.search(layout):
                continue
            total += number_bytes(dtype) * math.prod(_tiled_sides(whole_numbers(sides), layout))
        return total

    def moved(self, instruction: Instruction) -> float:
        """Bytes that one run of an instruction reads and writes."""
        operation = instruction.operation
        if operation in NOTHING_MOVED:
            return 0.0
        if operation.endswith("-done"):
            # Counted at the start.
            return 0.0
        if operation.endswith("-start"):
            return self._started(instruction)
        if operation == "fusion":
            return self._fused(instruction)
        if operation in _SLICES:
            return 2 * self.size(instruction.result)
        if operation == "dynamic-update-slice":
            return 2 * self.size(self._types.get(instruction.operands[1], ""))
        if operation == "custom-call":
            return self._called(instruction)
        return self._operands(instruction) + self.size(instruction.result)

    def _operands(self, instruction: Instruction) -> float:
        """Bytes of all operands, each once."""
        names = dict.fromkeys(instruction.operands)
        return sum(self.size(self._types.get(name, "")) for name in names)

    def _started(self, instruction: Instruction) -> float:
        """Bytes of an asynchronous operation, whose start has operands and results in one tuple."""
        if instruction.callees:
            # What is started is a computation, whose instructions are counted.
            return 0.0
        if "slice" in instruction.operation:
            # Of the operand, the first array of the tuple, no more is read than what the second takes.
            array = list(_ARRAY.finditer(instruction.result))[1]
            dtype, sides, layout = array.groups()
            read = number_bytes(dtype) * math.prod(_tiled_sides(whole_numbers(sides), layout or ""))
            return read + self.size(array[0])
        # Counters of the operation are scalars of some bytes.
        return self.size(instruction.result)

    def _called(self, instruction: Instruction) -> float:
        """Bytes of a library's kernel, without its workspace."""
        results = instruction.result
        if self._backend == "gpu":
            results = re.sub(r"\b[su]8\[\d*\](\{[^}]*\})?", "", results)
        return self._operands(instruction) + self.size(results)

    def _fused(self, instruction: Instruction) -> float:
        """Bytes of a fusion."""
        body = self._body(instruction)
        if body is None:
            return self._operands(instruction) + self.size(instruction.result)
        total = self._written(body, instruction)
        # An operand may be passed twice.
        sizes = {name: self.size(self._types.get(name, "")) for name in instruction.operands}
        read = dict.fromkeys(sizes, 0.0)
        for name, parameter in zip(instruction.operands, _parameters(body)):
            sliced = self._sliced(body, parameter)
            read[name] = max(read[name], sizes[name] if sliced is None else sliced)
        return total + sum(min(read[name], sizes[name]) for name in sizes)

    def _body(self, instruction: Instruction) -> list[Instruction] | None:
        """Instructions of a fusion; None where the text does not have them."""
        for _, callee in instruction.callees:
            if callee in self._program.computations:
                return self._program.computations[callee]
        return None

    def _sliced(self, body: list[Instruction], name: str) -> float | None:
        """Bytes that a fusion takes of an array in slices; None where it asks for all of it."""
        users = _users(body)
        updates = frozenset(_updates(body).values())
        waiting, total = [name], 0.0
        while waiting:
            current = waiting.pop()
            for user in users.get(current, []):
                is_first = user.operands[0] == current
                if user.operation in _RENAMED:
                    waiting.append(user.name)
                elif user.operation in _SLICES and is_first:
                    total += self.size(user.result)
                elif user.name in updates and is_first:
                    # Written in place: what stays is not touched.
                    continue
                elif user.operation == "fusion":
                    part = self._sliced_inside(user, current)
                    if part is None:
                        return None
                    total += part
                elif user.operation != "tuple":
                    return None
        return total

    def _sliced_inside(self, fusion: Instruction, name: str) -> float | None:
        """The same of a fusion inside a fusion, for an operand of it."""
        body = self._body(fusion)
        if body is None:
            return None
        total = 0.0
        for operand, parameter in zip(fusion.operands, _parameters(body)):
            if operand == name:
                part = self._sliced(body, parameter)
                if part is None:
                    return None
                total += part
        return total

    def _written(self, body: list[Instruction], instruction: Instruction) -> float:
        """Bytes that a fusion writes: of what it updates in place, the update alone."""
        by_name = {part.name: part for part in body}
        updates = _updates(body)
        total = 0.0
        for place, array in enumerate(_ARRAY.finditer(instruction.result)):
            size = self.size(array[0])
            if place in updates:
                update = by_name[updates[place]].operands[1]
                size = min(size, self.size(by_name[update].result))
            total += size
        return total


def _parameters(body: list[Instruction]) -> list[str]:
    """Names of a fusion's parameters in their order."""
    numbered = {}
    for part in body:
        match = _PARAMETER_NUMBER.match(part.arguments)
        if part.operation == "parameter" and match is not None:
            numbered[int(match[1])] = part.name
    return [numbered[number] for number in sorted(numbered)]


def _updates(body: list[Instruction]) -> dict[int, str]:
    """Results of a fusion that are updates in place: place among the results -> name of the update."""
    by_name = {part.name: part for part in body}
    updates = {}
    for root in body:
        if not root.is_root:
            continue
        results = root.operands if root.operation == "tuple" else [root.name]
        for place, name in enumerate(results):
            part = by_name.get(name)
            while part is not None and part.operation in _RENAMED:
                part = by_name.get(part.operands[0])
            if part is not None and part.operation == "dynamic-update-slice":
                updates[place] = part.name
    return updates


def _users(body: list[Instruction]) -> dict[str, list[Instruction]]:
    """Instructions that read a result, by its name."""
    users: dict[str, list[Instruction]] = {}
    for part in body:
        for name in dict.fromkeys(part.operands):
            users.setdefault(name, []).append(part)
    return users


def _tiled_sides(sides: list[int], layout: str) -> list[int]:
    """Sides of an array with its tiles filled up.

    Args:
      sides: as the type states them.
      layout: text of the layout, minor axes first, with tiles such as `T(8,128)` behind a colon.
    """
    order, _, rest = layout.partition(":")
    match = _TILE.search(rest)
    if match is None or not sides:
        return sides
    minor_first = whole_numbers(order)
    padded = list(sides)
    # A tile's last side is of the minor-most axis.
    for axis, tile in zip(minor_first, reversed(whole_numbers(match[1]))):
        padded[axis] = -(-padded[axis] // tile) * tile
    return padded
