"""Asynchronous transfers, and what of them other instructions hide.

A compiler starts a transfer early, such as a copy of weights into a TPU's vector memory, and waits for it where its
result is read. Instructions in between that are bound by compute leave bandwidth over, which the transfer takes; only
the rest of it is waited for. Optimised programs are scheduled: a computation's instructions run in the order of the
text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from marble_jax.plan.hlo_program import HloProgram, Instruction


class Need(NamedTuple):
    """What one run of an instruction needs of a device.

    Attributes:
      computing: seconds of products at peak.
      moving: seconds of traffic at full bandwidth.
    """

    computing: float
    moving: float

    @property
    def seconds(self) -> float:
        """Lower bound of the time, where nothing else is under way."""
        return max(self.computing, self.moving)


@dataclasses.dataclass
class _Transfer:
    """A transfer under way.

    Attributes:
      waited_at: place in the computation where its result is wanted.
      left: seconds of it at full bandwidth that nothing has hidden so far.
    """

    waited_at: int
    left: float


def is_transfer(instruction: Instruction) -> bool:
    """Whether an instruction starts a transfer beside which others run."""
    # What starts a computation of its own moves nothing by itself.
    return instruction.operation.endswith("-start") and not instruction.callees


class HiddenTransfers:
    """Times of transfers in a program, computation by computation.

    Args:
      program: the program, scheduled.
      need: of an instruction by itself.
    """

    def __init__(self, program: HloProgram, need: Callable[[Instruction], Need]):
        self._program, self._need = program, need
        self._waits: dict[str, float] = {}
        self._spare: dict[str, float] = {}

    def waited(self, computation: str) -> Mapping[str, float]:
        """Returns seconds that are waited for the transfers met so far, by name, those of a computation included."""
        self._bandwidth_left(computation)
        return self._waits

    def _bandwidth_left(self, computation: str) -> float:
        """Seconds of full bandwidth that one run of a computation leaves to others."""
        if computation not in self._spare:
            self._spare[computation] = self._run(self._program.computations[computation])
        return self._spare[computation]

    def _run(self, body: list[Instruction]) -> float:
        """Goes through a computation, notes what is waited for its transfers, and returns the bandwidth left over."""
        ends = _ends(body)
        under_way: dict[str, _Transfer] = {}
        spare = 0.0
        for place, instruction in enumerate(body):
            if is_transfer(instruction):
                end = ends.get(instruction.name, len(body))
                under_way[instruction.name] = _Transfer(end, self._need(instruction).moving)
                continue
            for name in [
                name for name, transfer in under_way.items() if transfer.waited_at == place
            ]:
                self._waits[name] = under_way.pop(name).left
            spare += _hide(under_way, self._left_by(instruction))
        # Whatever nobody waits for is over with the computation.
        for name, transfer in under_way.items():
            self._waits[name] = transfer.left
        return spare

    def _left_by(self, instruction: Instruction) -> float:
        """Seconds of full bandwidth that an instruction leaves to others."""
        if instruction.operation == "fusion" or not instruction.callees:
            need = self._need(instruction)
            return need.seconds - need.moving
        left = 0.0
        for role, callee in instruction.callees:
            if callee in self._program.computations:
                often = self._program.trips(instruction) if role == "body" else 1
                left += often * self._bandwidth_left(callee)
        return left


def _ends(body: list[Instruction]) -> dict[str, int]:
    """Places where transfers are waited for, by the names of their starts."""
    starts: dict[str, str] = {}
    ends = {}
    for place, instruction in enumerate(body):
        if instruction.operation.endswith("-start"):
            starts[instruction.name] = instruction.name
            continue
        if not instruction.operation.endswith(("-update", "-done")):
            continue
        start = next((starts[name] for name in instruction.operands if name in starts), None)
        if start is None:
            continue
        if instruction.operation.endswith("-done"):
            ends[start] = place
        else:
            starts[instruction.name] = start
    return ends


def _hide(under_way: dict[str, _Transfer], bandwidth: float) -> float:
    """Gives bandwidth to transfers, the one first that is waited for first, and returns what is left."""
    for transfer in sorted(under_way.values(), key=lambda transfer: transfer.waited_at):
        taken = min(transfer.left, bandwidth)
        transfer.left -= taken
        bandwidth -= taken
    return bandwidth
