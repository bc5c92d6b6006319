"""FLOPs of convolutions: by hand, and against XLA's own count."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from marble_jax.plan.hlo_program import parse_program
from marble_jax.plan.product_flops import product_flops

NUMBERS = ("NHWC", "HWIO", "NHWC")


def counted(text):
    program = parse_program(text)
    types = program.types()
    return sum(
        product_flops(instruction, types)
        for body in program.computations.values()
        for instruction in body
    )


def test_a_batch_of_products_as_a_convolution_counts_once():
    """As the TPU compiler writes 12 samples of [512, 1536] times [1536, 1536]: eleven taps of twelve meet padding."""
    text = """ENTRY %main (w: bf16[1536,1536,1], x: bf16[12,512,1536]) -> bf16[1536,12,512] {
  %w = bf16[1536,1536,1]{0,1,2} parameter(0)
  %x = bf16[12,512,1536]{2,1,0} parameter(1)
  ROOT %c = bf16[1536,12,512]{2,0,1:T(8,128)(2,1)} convolution(%w, %x), \
window={size=12 pad=11_11 rhs_reversal=1}, dim_labels=fb0_0oi->b0f, metadata={op_name="jit(f)/to_k/dot_general"}
}
"""
    assert counted(text.replace("\\\n", "")) == 2 * 12 * 512 * 1536 * 1536


@pytest.mark.parametrize(
    "options",
    [
        {"padding": ((1, 1), (1, 1))},
        {"padding": ((0, 2), (3, 1)), "window_strides": (2, 1)},
        {"padding": "SAME", "rhs_dilation": (2, 3)},
        {"padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)},
        {"padding": "VALID", "feature_group_count": 2},
        {"padding": "VALID", "batch_group_count": 2},
    ],
)
def test_convolutions_are_counted_as_xla_does(options):
    in_channels = 4 // options.get("feature_group_count", 1)
    image = jax.ShapeDtypeStruct((2, 9, 8, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, in_channels, 6), jnp.float32)

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            options.get("window_strides", (1, 1)),
            options["padding"],
            lhs_dilation=options.get("lhs_dilation"),
            rhs_dilation=options.get("rhs_dilation"),
            dimension_numbers=NUMBERS,
            feature_group_count=options.get("feature_group_count", 1),
            batch_group_count=options.get("batch_group_count", 1),
        )

    lowered = jax.jit(convolve).lower(image, kernel)
    theirs = lowered.cost_analysis()["flops"]
    # A text that is not optimised writes names without a sign, and no types at the head of a computation.
    text = re.sub(r"\b([A-Za-z_]\w*\.\d+)\b", r"%\1", lowered.as_text(dialect="hlo"))
    text = re.sub(r"^ENTRY (\S+) \{", r"ENTRY \1 () -> f32[] {", text, flags=re.M)
    assert counted(text) == theirs
