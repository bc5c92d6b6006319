"""What tools/benchmark says beside a measured MFU: the cap by the roofline of the program, on numbers done by hand."""

from __future__ import annotations

import dataclasses
import types

import pytest

from marble_jax.config import KEYS
from marble_jax.distributed import accelerators
from tools.benchmark import __main__ as program
from tools.benchmark import bounds, record
from tools.benchmark.sizes import SIZES

CHIP = dataclasses.replace(accelerators.by_name("h200"), bandwidth=1e30)
"""A card that waits for no bytes."""
PRODUCT = """HloModule jit_dot, is_scheduled=true

ENTRY %main (x: bf16[SIDE,SIDE]) -> bf16[SIDE,SIDE] {
  %x = bf16[SIDE,SIDE]{1,0} parameter(0)
  ROOT %y = bf16[SIDE,SIDE]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def compiled(text):
    """A program whose compiler answers with a text, or with an error."""

    def as_text():
        if text is None:
            raise ValueError("cut")
        return text

    return types.SimpleNamespace(compiled=types.SimpleNamespace(as_text=as_text))


def product(side):
    return compiled(PRODUCT.replace("SIDE", str(side)))


def test_bounds_of_programs_and_of_their_averages():
    size, said = SIZES["tiny"](), []
    programs = {
        "exact_k5.anchors": product(64),
        "exact_k5.signal": product(32),
        "other": compiled(None),
    }
    found = bounds.bounds(programs, size, CHIP, said.append)
    anchors, signal = 2 * 64**3 / CHIP.flops, 2 * 32**3 / CHIP.flops
    share = 1 / size.anchor_every
    assert found == pytest.approx(
        {
            "exact_k5.anchors": anchors,
            "exact_k5.signal": signal,
            "exact_k5": share * anchors + (1 - share) * signal,
        }
    )
    # A text that nobody can read costs the bound and not the times.
    assert said == ["no roofline of other: ValueError: cut"]


def test_a_device_that_no_table_has_is_without_bounds():
    said = []
    assert bounds.bounds({"a": product(32)}, SIZES["tiny"](), None, said.append) == {}
    assert not said


def test_the_cap_is_what_the_mfu_would_be_at_the_bound():
    """10^12 FLOPs at a peak of 16 x 10^12: a sixteenth of a second at the peak."""
    entry = record.times_record({"a": [0.25]}, {}, {"a": 1e12}, 16e12, {"a": 0.125})["a"]
    assert (entry["mfu"], entry["mfu_cap"], entry["bound_milliseconds"]) == (0.25, 0.5, 125.0)
    # What no FLOPs are counted for has a bound and no cap.
    entry = record.times_record({"solve": [0.25]}, {}, {}, 16e12, {"solve": 0.125})["solve"]
    assert entry["bound_milliseconds"] == 125.0 and "mfu_cap" not in entry
    assert "mfu_cap" not in record.times_record({"a": [0.25]}, {}, {"a": 1e12}, 16e12)["a"]


@pytest.mark.parametrize("remat", KEYS["model.remat"].choices)
def test_the_benchmark_knows_every_way_to_recompute(remat):
    assert program.parse([f"--remat={remat}"]).remat == remat
