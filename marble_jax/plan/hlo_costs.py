"""What one run of a compiled program does on one device, read off its optimised HLO text: products and exchanges.

Loops are multiplied out, see `hlo_program`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from marble_jax.families.base import Family
from marble_jax.plan.hlo import IN_LOOP, KINDS, origin_of, result_bytes
from marble_jax.plan.hlo_program import Instruction, parse_program
from marble_jax.plan.product_flops import product_flops

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


_JOINT = re.compile(r"(.*/)\((.+)\)")


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
            "loop",
            r"/train/while/body/(closed_call/)?gather$",
            "latents of a micro-batch, which lie split over the devices, brought to all of them",
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
    """Why a collective of a kind and origin is there; empty where nothing explains it, or a part of a joint one."""
    reasons = [_reason_of_part(kind, part, family) for part in _parts(origin)]
    return reasons[0] if all(reasons) else ""


def _parts(origin: str) -> list[str]:
    """The origins of a collective that the compiler has made of several: `place/(one:other)`."""
    joint = _JOINT.fullmatch(origin)
    if joint is None:
        return [origin]
    place, names = joint.groups()
    return [place + name for name in names.split(":")]


def _reason_of_part(kind: str, origin: str, family: Family) -> str:
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
    program = parse_program(text)
    types = program.types()
    flops = 0.0
    exchanges = []
    for name, times in program.runs():
        for instruction in program.computations[name]:
            flops += times * product_flops(instruction, types)
            if _is_exchange(instruction):
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


def _is_exchange(instruction: Instruction) -> bool:
    """Whether an instruction is a collective, or the start of an asynchronous one; its end moves nothing more."""
    return instruction.operation.removesuffix("-start") in KINDS


def _exchange(instruction: Instruction, times: int, family: Family) -> Exchange:
    """The exchange that a collective's instruction stands for."""
    kind = instruction.operation.removesuffix("-start")
    started = instruction.operation.endswith("-start")
    size = result_bytes(kind, instruction.result, started)
    origin = origin_of(instruction.arguments)
    return Exchange(kind, times, size, origin, reason_of(kind, origin, family))
