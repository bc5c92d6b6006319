"""The roofline of programs that are small enough to count by hand, and of one whose time this machine can measure."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.distributed.accelerators import ACCELERATORS, Accelerator
from marble_jax.plan.hlo import Kernels, fused_kernels
from marble_jax.plan.hlo_program import parse_program
from marble_jax.plan.hlo_traffic import Traffic
from marble_jax.plan.kernel_flops import kernel_flops
from marble_jax.plan.roofline import roofline
from marble_jax.plan.roofline_sources import (
    ATTENTION_KERNEL,
    COPIES,
    LORA,
    MODULATION,
    PRODUCTS,
    QK_NORM,
    STACKING,
    source_of,
)

CHIP = Accelerator("chip", (), "gpu", 1e12, 1e11, 1e9, 1e9, 1e9, 1)
"""10^12 FLOP/s, a tenth of it in float32, and 10^9 bytes/s."""
WIDE = dataclasses.replace(CHIP, backend="tpu", bandwidth=1e30)
"""One that waits for no bytes."""

LOOP = """HloModule jit_f

%stacked (s: bf16[5,4,8], x: bf16[4,8], i: s32[]) -> bf16[5,4,8] {
  %s = bf16[5,4,8]{2,1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %b = bf16[1,4,8]{2,1,0} bitcast(%x)
  ROOT %u = bf16[5,4,8]{2,1,0} dynamic-update-slice(%s, %b, %i, %i, %i)
}

%taken (s2: bf16[5,8,8], i2: s32[]) -> bf16[8,8] {
  %s2 = bf16[5,8,8]{2,1,0} parameter(0)
  %i2 = s32[] parameter(1)
  %d = bf16[1,8,8]{2,1,0} dynamic-slice(%s2, %i2, %i2, %i2), dynamic_slice_sizes={1,8,8}
  ROOT %w0 = bf16[8,8]{1,0} bitcast(%d)
}

%body (t: (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8])) -> (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8]) {
  %t = (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8]) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %h = bf16[4,8]{1,0} get-tuple-element(%t), index=1
  %stack = bf16[5,4,8]{2,1,0} get-tuple-element(%t), index=2
  %ws = bf16[5,8,8]{2,1,0} get-tuple-element(%t), index=3
  %w = bf16[8,8]{1,0} fusion(%ws, %n), kind=kLoop, calls=%taken, metadata={op_name="jit(f)/while/body/dynamic_slice"}
  %y = bf16[4,8]{1,0} dot(%h, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(f)/while/body/block_0/ff/net_2/dot_general"}
  %new = bf16[5,4,8]{2,1,0} fusion(%stack, %y, %n), kind=kLoop, calls=%stacked, \
metadata={op_name="jit(f)/while/body/dynamic_update_slice"}
  ROOT %r = (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8]) tuple(%next, %y, %new, %ws)
}

%condition (c: (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8])) -> pred[] {
  %c = (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8]) parameter(0)
  %m = s32[] get-tuple-element(%c), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%m, %five), direction=LT
}

ENTRY %main (p: (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8])) -> f32[4,4] {
  %p = (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8]) parameter(0)
  %loop = (s32[], bf16[4,8], bf16[5,4,8], bf16[5,8,8]) while(%p), condition=%condition, body=%body
  %q = f32[4,8]{1,0} constant({...})
  ROOT %g = f32[4,4]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}, \
operand_precision={highest,highest}
}
"""


def costs(text, accelerator=CHIP):
    return {cost.name: cost for cost in roofline(text, accelerator).costs}


def test_every_instruction_by_hand():
    """Five turns, by the condition alone; slices and updates move what they take and write."""
    found = costs(LOOP)
    product = found["y"]
    assert (product.times, product.flops, product.bytes) == (
        5,
        5 * 2 * 4 * 8 * 8,
        5 * 2 * (32 + 64 + 32),
    )
    assert product.seconds == pytest.approx(5 * 256 / 1e9) and product.bound == "memory"
    # The slice is read and written; an index is 4 bytes.
    assert found["w"].bytes == 5 * (2 * 128 + 4)
    assert found["new"].bytes == 5 * (2 * 64 + 4)
    # Both factors are the same array, read once; float32 that is not rounded runs at a tenth of the peak.
    whole = found["g"]
    assert (whole.flops, whole.bytes) == (2 * 4 * 4 * 8, 128 + 64)
    by_source = {cost.source: cost for cost in roofline(LOOP, CHIP).by_source()}
    assert by_source[STACKING].bytes == found["w"].bytes + found["new"].bytes
    assert by_source[PRODUCTS].flops == product.flops + whole.flops
    total = roofline(LOOP, CHIP)
    assert total.seconds == pytest.approx(sum(cost.seconds for cost in found.values()))
    assert total.mfu_cap(1e3) == pytest.approx(1e3 / (total.seconds * 1e12))


def test_compute_bounds_a_large_product_and_float32_takes_longer():
    text = """ENTRY %main (a: f32[512,512]) -> f32[512,512] {
  %a = f32[512,512]{1,0} parameter(0)
  %b = f32[512,512]{1,0} parameter(1)
  ROOT %d = f32[512,512]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}PRECISION
}
"""
    flops = 2 * 512**3
    fast = Accelerator("chip", (), "gpu", 1e12, 1e11, 1e9, 1e9, 1e12, 1)
    rounded = costs(text.replace("PRECISION", ""), fast)["d"]
    full = costs(text.replace("PRECISION", ", operand_precision={highest,highest}"), fast)["d"]
    assert rounded.bound == full.bound == "compute"
    assert (rounded.seconds, full.seconds) == pytest.approx((flops / 1e12, flops / 1e11))


@pytest.mark.parametrize("kind, times", [("s8", 4), ("f8e4m3fn", 2), ("bf16", 1), ("f8e5m2", 1)])
def test_products_of_eight_bits_have_rates_of_their_own(kind, times):
    text = """ENTRY %main (a: KIND[512,512]) -> f32[512,512] {
  %a = KIND[512,512]{1,0} parameter(0)
  %b = KIND[512,512]{1,0} parameter(1)
  ROOT %d = f32[512,512]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""".replace("KIND", kind)
    fast = Accelerator("chip", (), "gpu", 1e12, 1e11, 1e9, 1e9, 1e12, 1, int8=4, fp8=2)
    cost = costs(text, fast)["d"]
    assert cost.flops == 2 * 512**3 and cost.bound == "compute"
    assert cost.seconds == pytest.approx(cost.flops / (times * 1e12))


def test_a_tpu_pads_to_tiles_and_does_not_count_its_vector_memory():
    traffic = Traffic(parse_program(""), "tpu")
    assert traffic.size("bf16[3,5,64]{2,1,0:T(8,128)(2,1)}") == 2 * 3 * 8 * 128
    assert traffic.size("bf16[3,5,64]{1,2,0:T(8,128)(2,1)}") == 2 * 3 * 64 * 128
    assert traffic.size("f32[256,128]{1,0:T(8,128)S(1)}") == 0
    assert traffic.size("(f32[2]{0:T(128)}, /*index=1*/pred[])") == 4 * 128 + 1
    assert Traffic(parse_program(""), "gpu").size("bf16[3,5,64]{2,1,0}") == 2 * 3 * 5 * 64


KERNELS = """ENTRY %main (q: bf16[2,10,3,8]) -> bf16[2,3,10,8] {
  %q = bf16[2,10,3,8]{3,2,1,0} parameter(0)
  %k = bf16[2,12,3,8]{3,2,1,0} parameter(1)
  %f = (bf16[2,3,10,8]{3,1,2,0}, u8[999]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/attn/fwd"}
  %g = (bf16[2,3,10,8]{3,1,2,0}, u8[9]{0}) custom-call(%q, %k), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="jit(f)/attn/bwd"}
  %c = (bf16[20,6]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/to_q/lora/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  %x = bf16[20,7]{1,0} parameter(2)
  %w = bf16[7,6]{1,0} parameter(3)
}
"""


def test_kernels_of_libraries_are_counted_by_their_shapes():
    program = parse_program(KERNELS)
    flops = {i.name: kernel_flops(i, program.types()) for i in program.computations["main"]}
    product = 2 * (2 * 10 * 3 * 8) * 12
    assert (flops["f"], flops["g"], flops["c"]) == (2 * product, 5 * product, 2 * 20 * 7 * 6)
    found = costs(KERNELS)
    # Without the workspaces.
    assert found["f"].bytes == 2 * (480 + 576 + 480) and found["c"].bytes == 2 * (140 + 42 + 120)
    assert (found["f"].source, found["c"].source) == (ATTENTION_KERNEL, LORA)
    assert fused_kernels(KERNELS) == Kernels(1, 1)
    call = 'custom-call(%q), custom_call_target="tpu_custom_call"'
    tpu = f"%splash_mha_dkv.3 = f32[2] {call}"
    assert fused_kernels(tpu) == Kernels(0, 1) and not fused_kernels("%a = f32[2] add(%b, %c)")


@pytest.mark.parametrize(("q", "k"), [("16,8", "32,8"), ("8,16", "8,32")])
def test_splash_attention_is_counted_by_its_kernels(q, k):
    """16 queries and 32 keys of width 8, with the head or the tokens in the lanes of the operands."""
    queries, keys = "bf16[2,3,16,8]{3,2,1,0}", "bf16[2,3,32,8]{3,2,1,0}"
    call = 'custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"'
    text = f"""ENTRY %main (q: {queries}) -> {queries} {{
  %m = s8[1,2,2]{{2,1,0}} parameter(2)
  %q = bf16[2,3,{q}]{{3,2,1,0}} parameter(0)
  %k = bf16[2,3,{k}]{{3,2,1,0}} parameter(1)
  %splash_mha_fwd_residuals.1 = (f32[2,16,128]{{2,1,0}}, {queries}) {call}
  %splash_mha_dq.1 = (f32[2,16,8]{{2,1,0}}, {queries}) {call}
  %splash_mha_dkv.1 = (f32[2,32,8]{{2,1,0}}, {keys}, {keys}) {call}
  %splash_mha_dkv.2 = (f32[2,32,8]{{2,1,0}}, {queries}, {keys}, {keys}) {call}
}}
"""
    program = parse_program(text)
    product = 2 * (2 * 3 * 16 * 8) * 32
    flops = [kernel_flops(i, program.types()) / product for i in program.computations["main"]]
    assert flops == [0, 0, 0, 2, 3, 4, 5]
    # At the rate of their numbers, not of the integers that say which blocks are masked.
    found = {cost.name: cost for cost in roofline(text, WIDE).costs}
    assert found["splash_mha_fwd_residuals.1"].seconds == pytest.approx(2 * product / 1e12)


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ('multiply(%a), metadata={op_name="jit(f)/blocks_0/attn/norm_q/mul"}', QK_NORM),
        ('add(%a), metadata={op_name="jit(f)/blocks_0/modulation/add"}', MODULATION),
        ('transpose(%a), metadata={op_name="jit(f)/blocks_0/attn/transpose"}', COPIES),
        ('broadcast(%a), metadata={op_name="jit(f)/broadcast_in_dim"}', STACKING),
    ],
)
def test_sources(line, source):
    program = parse_program(
        f"ENTRY %main (a: f32[2]) -> f32[2] {{\n  ROOT %r = f32[2]{{0}} {line}\n}}\n"
    )
    assert source_of(program.computations["main"][0], program, 0.0) == source


def test_the_bound_and_the_measured_time_are_of_one_order_of_magnitude():
    """A loop of products on this CPU, against its own speed at one product and one copy: in order of magnitude."""
    side, turns = 384, 6
    weights = jnp.asarray(
        np.random.default_rng(0).standard_normal((turns, side, side)), jnp.float32
    )

    def run(weights):
        def turn(x, w):
            x = jnp.tanh(x @ w / side**0.5)
            return x, x

        return jax.lax.scan(turn, weights[0], weights)

    def best(function, *arguments):
        jax.block_until_ready(function(*arguments))
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    product = best(jax.jit(lambda a, b: a @ b), weights[0], weights[1])
    copied = best(jax.jit(lambda x: x + 1), weights)
    rate, bandwidth = 2 * side**3 / product, 2 * weights.nbytes / copied
    machine = Accelerator("cpu", (), "cpu", rate, rate, 1e9, 1e9, bandwidth, 1)
    compiled = jax.jit(run).lower(weights).compile()
    bound = roofline(compiled.as_text(), machine)
    assert bound.flops == turns * 2 * side**3
    measured = best(compiled, weights)
    assert measured / 10 < bound.seconds < 3 * measured


def test_rates_of_devices_are_in_their_order():
    for accelerator in ACCELERATORS.values():
        assert accelerator.bandwidth < accelerator.float32 < accelerator.flops
        assert 1 <= accelerator.fp8 <= 2 and 1 <= accelerator.int8 <= 4
