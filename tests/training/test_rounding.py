"""Marks on figures that the rounding of the compute dtype makes."""

import numpy as np
import pytest

from marble_jax.training import rounding


@pytest.mark.parametrize(
    ("dtype", "streams", "share"),
    [
        ("bfloat16", "compute", 0.12),
        ("bfloat16", "float32", 0.025),
        ("float32", "compute", 0.12),
        ("float32", "float32", 0.12),
    ],
)
def test_floor_by_hand(dtype, streams, share):
    """bfloat16 has 8 significant bits, float32 24: eps is 2^-7 and 2^-23."""
    eps = 2.0 ** {"bfloat16": -7, "float32": -23}[dtype]
    floor = rounding.floor_of(dtype, streams, 24, 1.5)
    np.testing.assert_allclose(floor, 2 * share * 24 * eps**2 * 1.5)


def test_marks_are_on_what_lies_below():
    floor = rounding.floor_of("bfloat16", "compute", 5, 2.0)
    record = {
        "objective/velocity_square": 2.0,
        "objective/kl": 1.01 * floor,
        "objective/velocity_gap": 0.99 * floor,
    }
    assert rounding.marks(record, "bfloat16", "compute", 5) == {
        "rounding/floor": floor,
        "rounding/kl": 0.0,
        "rounding/velocity_gap": 1.0,
        "rounding/loss": 1.0,
    }
    # An objective that knows no rollout policy has no distance from it to mark.
    unknown = rounding.marks(
        record | {"objective/velocity_gap": float("nan")}, "bfloat16", "compute", 5
    )
    assert unknown["rounding/velocity_gap"] == unknown["rounding/loss"] == 0.0
    assert rounding.marks(record, "float32", "compute", 5)["rounding/velocity_gap"] == 0.0
    assert rounding.marks({"objective/kl": 0.0}, "bfloat16", "compute", 5) == {}
