"""Products and exchanges of a program, loops multiplied out; a sharded step has no others than it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from marble_jax.families.sd3.family import FAMILY
from marble_jax.plan.hlo_costs import by_reason, explanations, program_costs, reason_of

ROOT = Path(__file__).parents[2]
TEXT = """HloModule jit_f, entry_computation_layout={()->f32[2]}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: f32[4,8]) -> f32[4,2] {
  %p = f32[4,8]{1,0} parameter(0)
  %w = f32[8,2]{1,0} constant({...})
  ROOT %d = f32[4,2]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inner (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[4,2]{1,0} fusion(%x), kind=kOutput, calls=%fused
  %g = f32[4,16]{1,0} all-gather(%y), dimensions={1}, metadata={op_name="jit(f)/train/while/body/while/body/squeeze"}
}

%outer (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %v = f32[4,8]{1,0} parameter(0)
  %l = (s32[], f32[4,8]) while(%v), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %r = f32[6]{0} all-reduce(%v), to_apply=%sum, metadata={op_name="jit(f)/train/while/body/add"}
}

ENTRY %main (q: f32[4,8]) -> f32[2] {
  %q = f32[4,8]{1,0} parameter(0)
  %k = f32[3,3,2,7]{3,2,1,0} constant({...})
  %i = f32[1,6,6,2]{3,2,1,0} constant({...})
  %conv = f32[1,6,6,7]{3,2,1,0} convolution(%i, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %m = (s32[], f32[4,8]) while(%q), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %z = f32[2]{0} all-reduce-start(%q), to_apply=%sum, metadata={op_name="jit(f)/train/reduce_sum"}
}
"""


def test_bodies_of_loops_count_as_often_as_they_run():
    costs = program_costs(TEXT, FAMILY)
    # Along an axis of 6 with a padding of 1 on both sides, the outer two outputs have one tap on the padding.
    assert costs.flops == 15 * 2 * (4 * 2) * 8 + 2 * 7 * (16 * 16) * 2
    assert [(e.kind, e.times, e.bytes, e.looped) for e in costs.exchanges] == [
        ("all-gather", 15, 4 * 16 * 4, True),
        ("all-reduce", 3, 24, True),
        ("all-reduce", 1, 8, False),
    ]
    assert [bool(e.reason) for e in costs.exchanges] == [True, False, True]
    totals = by_reason(costs.exchanges)
    assert [(t.instructions, t.times, t.bytes) for t in totals] == [
        (1, 15, 3840),
        (1, 3, 72),
        (1, 1, 8),
    ]
    assert program_costs("nothing", FAMILY).exchanges == ()


def test_exchanges_of_one_reason_are_summed():
    again = """  %y2 = f32[2]{0} all-reduce(%q), to_apply=%sum, metadata={op_name="jit(f)/train/reduce_sum"}
"""
    twice = TEXT.replace("  ROOT %z", f"{again}  ROOT %z")
    totals = by_reason(program_costs(twice, FAMILY).exchanges)
    assert [(t.kind, t.instructions, t.times, t.bytes) for t in totals][-1] == (
        "all-reduce",
        2,
        2,
        16,
    )


def test_a_program_of_xla():
    def f(x):
        return jax.lax.fori_loop(0, 7, lambda i, y: y @ x, x)

    struct = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    text = jax.jit(f).lower(struct).compile().as_text()
    assert program_costs(text, FAMILY).flops == 7 * 2 * 32**3


def test_what_should_not_be_there_is_not_explained():
    looped = "jit(train)/train/while/body/"
    # Gradients that are summed in the loop.
    assert reason_of("all-reduce", f"{looped}closed_call/add", FAMILY) == ""
    # All rollouts.
    for kind in ("all-reduce", "all-gather"):
        assert reason_of(kind, "jit(train)/train/gather", FAMILY) == ""
    assert reason_of("all-to-all", f"{looped}blocks_0/attn/to_q/dot_general", FAMILY) == ""
    joint = "jit(train)/train/(reduce_sum:kp,lp->kl/dot_general:{})"
    assert reason_of("all-reduce", joint.format("reduce_sum"), FAMILY)
    assert reason_of("all-reduce", joint.format("gather"), FAMILY) == ""
    assert reason_of("all-reduce", f"{looped}MMDiT/block_2/ff/net_2/dot_general", FAMILY)
    assert reason_of("all-reduce", f"{looped}closed_call/gather", FAMILY).startswith("latents")
    assert reason_of("all-reduce", f"{looped}while/body/closed_call/gather", FAMILY) == ""
    assert all(explanation.reason for explanation in explanations(FAMILY))


def collectives(*arguments):
    """The record of `tools.collectives`, and whether every exchange was explained."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.collectives", "--json", "--run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.returncode == 0


def check(record):
    for name, row in record.items():
        assert not row["unexplained"], (name, row["unexplained"])
        program, _, mesh = name.rpartition(" ")
        assert row["share"] < (1.3 if mesh == "1x1x8" and program != "decode" else 1.05), (
            name
        )  # low rank is not split
        assert row["gap"] < 1e-3, name  # and the same numbers


def test_a_sharded_step_shares_its_work_and_agrees():
    """Data, fsdp and tensor at once; the other meshes and programs are in the slow test."""
    record, explained = collectives("--mesh=1x1x1,2x2x2", "--programs=between")
    assert explained and len(record) == 2
    check(record)
    kinds = {kind for kind, *_ in record["train, between 2x2x2"]["exchanges"]}
    assert kinds == {"all-gather", "all-reduce"} and not record["train, between 1x1x1"]["exchanges"]


@pytest.mark.slow
def test_every_program_on_every_mesh():
    record, explained = collectives("--mesh=1x1x1,2x1x1,4x1x1,8x1x1,4x2x1,2x2x2,1x1x8")
    assert explained and len(record) == 7 * 4
    check(record)
    solo = record["train, solving 8x1x1"]["exchanges"]
    assert [(kind, times) for kind, _, _, times, _ in solo] == [
        ("all-reduce", 1)
    ]  # once an optimiser step
