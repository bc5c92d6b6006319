"""FLOPs of library kernels in an optimised HLO text: cuBLAS's products and fused attention, which XLA calls by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from marble_jax.plan.hlo import captured, whole_numbers
from marble_jax.plan.hlo_program import Instruction, sides_of

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_ARRAY = re.compile(r"\w+\[([\d,]+)\]")
_TPU_KERNEL = "tpu_custom_call"

FORWARD_PRODUCTS = 2
"""Products of fused attention's forward pass: queries with keys, weights with values."""
BACKWARD_PRODUCTS = 5
"""Products of its backward pass in one kernel: logits again, and the cotangents of weights, values, keys, queries."""
DQ_PRODUCTS, DKV_PRODUCTS = 3, 4
"""The same in two kernels, both of which take logits and the weights' cotangent."""


def kernel_target(instruction: Instruction) -> str:
    """Returns the name of the kernel that an instruction calls; empty where it calls none."""
    if not instruction.operation.startswith("custom-call"):
        return ""
    return captured(_TARGET, instruction.arguments)


def is_attention(instruction: Instruction) -> bool:
    """Whether an instruction is a fused attention kernel."""
    target = kernel_target(instruction)
    return target == _TPU_KERNEL or target.startswith("__cudnn$fmha")


def kernel_flops(instruction: Instruction, types: Mapping[str, str]) -> float:
    """Returns the FLOPs of a library kernel; 0 for one that is not known, or no kernel.

    Args:
      instruction: any.
      types: type of every instruction's result, by the instruction's name.
    """
    target = kernel_target(instruction)
    if target.startswith("__cublas"):
        return _product(instruction, types)
    if target.startswith("__cudnn$fmha"):
        return _cudnn(instruction, types, "Backward" in target)
    if target == _TPU_KERNEL:
        return _splash(instruction, types)
    return 0.0


def _product(instruction: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of a matrix product."""
    left = sides_of(types[instruction.operands[0]])
    listed = captured(_CONTRACTED, instruction.arguments).replace('"', "")
    summed = math.prod(left[axis] for axis in whole_numbers(listed))
    return 2.0 * math.prod(sides_of(instruction.result)) * summed


def _cudnn(instruction: Instruction, types: Mapping[str, str], is_backward: bool) -> float:
    """FLOPs of cuDNN's attention: queries [N, Tq, H, d] and keys [N, Tk, H, d] are its first operands."""
    queries, keys = (sides_of(types[name]) for name in instruction.operands[:2])
    products = BACKWARD_PRODUCTS if is_backward else FORWARD_PRODUCTS
    return products * 2.0 * math.prod(queries) * keys[1]


def _splash(instruction: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of splash attention.

    The first two large operands are queries and keys, [N, H, T, d] or, with tokens in the lanes, [N, H, d, T]. Results
    have the head last whatever the operands' layout is.
    """
    arrays = []
    for name in instruction.operands:
        sides = sides_of(types.get(name, ""))
        # Integers say which blocks are masked.
        if len(sides) >= 3 and not types[name].startswith(("s", "u")):
            arrays.append(sides)
    results = [whole_numbers(sides) for sides in _ARRAY.findall(instruction.result)]
    # Scratch has three sides; of the results proper the first is the output or a cotangent.
    proper = [sides for sides in results if len(sides) >= 4]
    if len(arrays) < 2 or not proper:
        return 0.0
    queries, keys = arrays[:2]
    head = proper[0][-1]
    num_keys = math.prod(keys[-2:]) // head
    products = FORWARD_PRODUCTS
    if "_dkv" in instruction.name:
        least = min(math.prod(queries), math.prod(keys))
        cotangents = sum(math.prod(sides) >= least for sides in results)
        # With the queries' cotangent among its results it is the only kernel.
        products = BACKWARD_PRODUCTS if cotangents == 3 else DKV_PRODUCTS
    elif "_dq" in instruction.name:
        products = DQ_PRODUCTS
    return products * 2.0 * math.prod(queries) * num_keys
