"""A lower bound of the time of a compiled program on a device: the roofline of every instruction, added up.

An instruction takes at least its FLOPs over the peak and at least its bytes over the bandwidth of the memory; of the
two, the longer. A transfer beside which other instructions run counts with what those leave no bandwidth for
(`plan.hidden_transfers`). Instructions of loops count as often as they run. FLOPs are those of products and fused
attention; what else a device computes is taken to be free, and so are exchanges between devices, launches and idle
hosts. The share of the peak that the method's own FLOPs come to in that time is the MFU that the program, as compiled,
cannot exceed.

Source: Williams et al. 2009, "Roofline: an insightful visual performance model".
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from marble_jax.distributed.accelerators import Accelerator
from marble_jax.plan.hidden_transfers import HiddenTransfers, Need, is_transfer
from marble_jax.plan.hlo import origin_of
from marble_jax.plan.hlo_program import HloProgram, Instruction, parse_program
from marble_jax.plan.hlo_traffic import NOTHING_MOVED, Traffic
from marble_jax.plan.kernel_flops import is_attention, kernel_flops
from marble_jax.plan.product_flops import product_flops
from marble_jax.plan.roofline_sources import source_of

_HIGHEST = "highest"
"""In the text of a product whose factors are not rounded."""
_MOST = 30
"""Instructions that a record names."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one instruction costs in one run of the program.

    Attributes:
      name: of the instruction.
      source: what it belongs to in the model.
      origin: where it comes from, by JAX's names.
      times: how often it runs.
      flops: FLOPs of its products, all runs together.
      bytes: bytes that it moves, all runs together.
      seconds: lower bound of the time that it takes, all runs together.
      bound: "compute" or "memory", whichever takes longer.
    """

    name: str
    source: str
    origin: str
    times: int
    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bound of the time of one run of a program on one device.

    Attributes:
      costs: of every instruction that costs something, the dearest first.
      accelerator: the device.
    """

    costs: tuple[Cost, ...]
    accelerator: Accelerator

    @property
    def seconds(self) -> float:
        """Lower bound of the time."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def flops(self) -> float:
        """FLOPs of products that the device executes."""
        return sum(cost.flops for cost in self.costs)

    @property
    def bytes(self) -> float:
        """Bytes that the device moves to and from its memory."""
        return sum(cost.bytes for cost in self.costs)

    def mfu_cap(self, useful: float) -> float:
        """Share of the peak at the bound.

        Args:
          useful: FLOPs that the method asks one device for.
        """
        return useful / (self.seconds * self.accelerator.flops)

    def by_source(self) -> list[Cost]:
        """Returns the costs of each source as one, the dearest first."""
        totals: dict[str, Cost] = {}
        for cost in self.costs:
            total = totals.get(cost.source)
            if total is None:
                totals[cost.source] = dataclasses.replace(cost, name=cost.source, origin="")
                continue
            totals[cost.source] = dataclasses.replace(
                total,
                times=total.times + cost.times,
                flops=total.flops + cost.flops,
                bytes=total.bytes + cost.bytes,
                seconds=total.seconds + cost.seconds,
            )
        for name, total in totals.items():
            totals[name] = dataclasses.replace(total, bound=self._bound(total.flops, total.bytes))
        return sorted(totals.values(), key=lambda total: -total.seconds)

    def _bound(self, flops: float, moved: float) -> str:
        """What takes longer."""
        device = self.accelerator
        return "compute" if flops / device.flops >= moved / device.bandwidth else "memory"

    def record(self, useful: float) -> dict[str, Any]:
        """Returns plain values, for JSON; `useful` as in `mfu_cap`."""
        return {
            "accelerator": self.accelerator.name,
            "seconds": self.seconds,
            "flops": self.flops,
            "bytes": self.bytes,
            "useful_flops": useful,
            "mfu_cap": self.mfu_cap(useful),
            "sources": {cost.source: _plain(cost) for cost in self.by_source()},
            "dearest": [dataclasses.asdict(cost) for cost in self.costs[:_MOST]],
        }


def _plain(cost: Cost) -> dict[str, Any]:
    """The figures of a source."""
    return {
        "seconds": cost.seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "bound": cost.bound,
    }


def roofline(text: str, accelerator: Accelerator) -> Roofline:
    """Returns the roofline of a program.

    Args:
      text: the program as XLA prints it after optimisation.
      accelerator: the device that runs it, not necessarily the one that it was compiled for.
    """
    program = parse_program(text)
    work = _Work(program, accelerator)
    transfers = HiddenTransfers(program, work.need)
    costs: dict[str, Cost] = {}
    for name, times in program.runs(into_fusions=False):
        waited = transfers.waited(name)
        for instruction in program.computations[name]:
            if instruction.operation in NOTHING_MOVED:
                continue
            seconds = work.need(instruction).seconds
            if is_transfer(instruction):
                seconds = waited[instruction.name]
            cost = work.cost(instruction, times, seconds)
            known = costs.get(instruction.name)
            if known is not None:
                # A computation that is called from several places.
                cost = _joined(known, cost)
            if cost.flops > 0 or cost.bytes > 0:
                costs[instruction.name] = cost
    ordered = sorted(costs.values(), key=lambda cost: -cost.seconds)
    return Roofline(tuple(ordered), accelerator)


class _Asked(NamedTuple):
    """What one run of an instruction asks for: FLOPs of its products, bytes that it moves, and seconds of both."""

    flops: float
    bytes: float
    need: Need


class _Work:
    """What instructions of a program ask of a device.

    Args:
      program: the program.
      accelerator: the device.
    """

    def __init__(self, program: HloProgram, accelerator: Accelerator):
        self._program, self._types = program, program.types()
        self._traffic = Traffic(program, accelerator.backend)
        self._accelerator = accelerator
        self._asked: dict[str, _Asked] = {}

    def need(self, instruction: Instruction) -> Need:
        """Seconds of one run of an instruction."""
        return self._of(instruction).need

    def _of(self, instruction: Instruction) -> _Asked:
        known = self._asked.get(instruction.name)
        if known is None:
            device = self._accelerator
            by_rate = _flops(instruction, self._program, self._types)
            moved = self._traffic.moved(instruction)
            computing = sum(flops / device.rates[name] for name, flops in by_rate.items())
            need = Need(computing, moved / device.bandwidth)
            known = _Asked(sum(by_rate.values()), moved, need)
            self._asked[instruction.name] = known
        return known

    def cost(self, instruction: Instruction, times: int, seconds: float) -> Cost:
        """The cost of an instruction that runs so many times and takes so long in each."""
        asked = self._of(instruction)
        return Cost(
            name=instruction.name,
            source=source_of(instruction, self._program, asked.flops),
            origin=origin_of(instruction.arguments),
            times=times,
            flops=times * asked.flops,
            bytes=times * asked.bytes,
            seconds=times * seconds,
            bound="compute" if asked.need.computing >= asked.need.moving else "memory",
        )


def _joined(one: Cost, other: Cost) -> Cost:
    """The cost of an instruction at two places of the program."""
    return dataclasses.replace(
        one,
        times=one.times + other.times,
        flops=one.flops + other.flops,
        bytes=one.bytes + other.bytes,
        seconds=one.seconds + other.seconds,
    )


def _flops(
    instruction: Instruction, program: HloProgram, types: dict[str, str]
) -> dict[str, float]:
    """FLOPs of an instruction's products, by the rate that a device computes them at."""
    flops_by_rate: dict[str, float] = {}
    waiting = [instruction]
    while waiting:
        part = waiting.pop()
        if part.operation == "fusion":
            for _, callee in part.callees:
                waiting.extend(program.computations.get(callee, []))
            continue
        flops = product_flops(part, types) + kernel_flops(part, types)
        if flops:
            rate = _rate(part, types)
            flops_by_rate[rate] = flops_by_rate.get(rate, 0.0) + flops
    return flops_by_rate


def _rate(part: Instruction, types: dict[str, str]) -> str:
    """The rate that a product is computed at, among `Accelerator.rates`."""
    if is_attention(part):
        # Its first operands may be the integers that say which blocks are masked.
        return "half"
    operands = [types.get(name, "") for name in part.operands[:2]]

    def are(pattern: str) -> bool:
        return bool(operands) and all(re.match(pattern, operand) for operand in operands)

    if are(r"s8\["):
        return "int8"
    if are(r"f8e4m3"):
        return "fp8"
    # Float32 factors are rounded first unless the product says otherwise.
    if are(r"f32\[") and _HIGHEST in part.arguments:
        return "float32"
    return "half"
