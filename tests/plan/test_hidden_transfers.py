"""Transfers beside other instructions, counted by hand."""

from __future__ import annotations

import pytest

from marble_jax.distributed.accelerators import Accelerator
from marble_jax.plan.hidden_transfers import is_transfer
from marble_jax.plan.hlo_program import parse_program
from marble_jax.plan.roofline import roofline

CHIP = Accelerator("chip", (), "tpu", 1e12, 1e11, 1e9, 1e9, 1e10, 1)
"""10^12 FLOP/s and 10^10 bytes/s."""

SIDE = "bf16[512,512]{1,0:T(8,128)(2,1)}"
"""2^19 bytes: 52 us."""
LARGE = "bf16[1024,1024]{1,0:T(8,128)(2,1)}"
"""2^21 bytes: 210 us."""
NEAR = "bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}"
"""The same in vector memory, which costs nothing."""

MOVED = 2**19 / 1e10
COMPUTED = 2 * 512**3 / 1e12
SPARE = COMPUTED - 3 * MOVED
"""What a product of two squares leaves of the bandwidth, 111 us."""
COPIED = 2**21 / 1e10

START = f"({NEAR}, {LARGE}, u32[]{{:S(2)}}) copy-start(%large)"
PRODUCT = f"{SIDE} dot(%a, %a2), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"


def program(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"""ENTRY %main (a: bf16[512,512]) -> bf16[512,512] {{
  %a = {SIDE} parameter(0)
  %a2 = {SIDE} parameter(1)
  %large = {LARGE} parameter(2)
{body}
}}
"""


def seconds(text):
    return {cost.name: cost.seconds for cost in roofline(text, CHIP).costs}


def test_a_product_hides_what_it_leaves_bandwidth_for():
    assert 0 < SPARE < COPIED
    found = seconds(
        program(
            f"%s = {START}",
            f"%p = {PRODUCT}",
            f"%d = {NEAR} copy-done(%s)",
            f"ROOT %q = {PRODUCT}",
        )
    )
    assert found["p"] == found["q"] == pytest.approx(COMPUTED)
    # The second product comes after the wait and hides nothing.
    assert found["s"] == pytest.approx(COPIED - SPARE)


def test_a_transfer_alone_is_waited_for_whole():
    found = seconds(program(f"%s = {START}", f"%d = {NEAR} copy-done(%s)", f"ROOT %p = {PRODUCT}"))
    assert found["s"] == pytest.approx(COPIED)


def test_bytes_are_counted_though_nobody_waits():
    lines = [f"%p{number} = {PRODUCT}" for number in range(2)]
    text = program(f"%s = {START}", *lines, f"ROOT %d = {NEAR} copy-done(%s)")
    bound = roofline(text, CHIP)
    assert {cost.name: cost.seconds for cost in bound.costs}["s"] == 0
    assert bound.seconds == pytest.approx(2 * COMPUTED)
    assert bound.bytes == 2**21 + 6 * 2**19


def test_two_transfers_share_what_is_left_and_the_first_wanted_goes_first():
    """Begun in one order and wanted in the other, with a product between the two waits."""
    found = seconds(
        program(
            f"%late = {START}",
            f"%early = {START}",
            f"%p0 = {PRODUCT}",
            f"%d0 = {NEAR} copy-done(%early)",
            f"%p1 = {PRODUCT}",
            f"%d1 = {NEAR} copy-done(%late)",
            f"ROOT %p2 = {PRODUCT}",
        )
    )
    assert found["early"] == pytest.approx(COPIED - SPARE)
    assert found["late"] == pytest.approx(COPIED - SPARE)


def test_instructions_bound_by_memory_hide_nothing():
    text = program(
        f"%s = {START}", f"%n = {LARGE} negate(%large)", f"ROOT %d = {NEAR} copy-done(%s)"
    )
    assert seconds(text)["s"] == pytest.approx(COPIED)


LOOP = f"""%body (t: (s32[], {SIDE}, {LARGE})) -> (s32[], {SIDE}, {LARGE}) {{
  %t = (s32[], {SIDE}, {LARGE}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = {SIDE} get-tuple-element(%t), index=1
  %w = {LARGE} get-tuple-element(%t), index=2
  %inner = ({NEAR}, {LARGE}, u32[]{{:S(2)}}) copy-start(%w)
  %y = {SIDE} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %z = {SIDE} dot(%x, %y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %v = {NEAR} copy-done(%inner)
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %r = (s32[], {SIDE}, {LARGE}) tuple(%j, %z, %w)
}}

%condition (c: (s32[], {SIDE}, {LARGE})) -> pred[] {{
  %c = (s32[], {SIDE}, {LARGE}) parameter(0)
  %m = s32[] get-tuple-element(%c), index=0
  %many = s32[] constant(40)
  ROOT %lt = pred[] compare(%m, %many), direction=LT
}}

"""


def test_a_loop_hides_with_what_its_own_transfers_leave():
    """Forty turns whose products, the first of which reads one array alone, leave less than the inner copy wants."""
    whole = program(
        f"%s = {START}",
        f"%init = (s32[], {SIDE}, {LARGE}) tuple(%zero, %a, %large)",
        f"%loop = (s32[], {SIDE}, {LARGE}) while(%init), condition=%condition, body=%body",
        f"ROOT %d = {NEAR} copy-done(%s)",
    )
    found = seconds(LOOP + whole)
    assert found["y"] == pytest.approx(40 * COMPUTED)
    left = (COMPUTED - 2 * MOVED) + SPARE - COPIED
    assert left > 0
    assert found["inner"] == 0
    # The outer copy has what forty turns leave.
    assert found["s"] == pytest.approx(max(COPIED - 40 * left, 0), abs=1e-12)


def test_what_starts_a_computation_is_no_transfer_itself():
    text = program(
        f"%s = (({SIDE}), {SIDE}) async-start(%a), calls=%main",
        f"%u = (({SIDE}), {SIDE}) async-update(%s)",
        f"ROOT %c = ({NEAR}, {LARGE}, u32[]{{:S(2)}}) copy-start(%large)",
    )
    starts = [is_transfer(i) for i in parse_program(text).computations["main"][3:]]
    assert starts == [False, False, True]
