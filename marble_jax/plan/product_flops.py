"""FLOPs of the products and convolutions of an optimised HLO text.

A convolution counts the taps of its kernel that meet a number of the input, not those that meet padding. That matters
on TPUs, where the compiler writes products of batches as convolutions over the batch, with a padding as wide as it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from marble_jax.plan.hlo import captured, whole_numbers
from marble_jax.plan.hlo_program import Instruction, sides_of

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


def product_flops(instruction: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of a matrix product or convolution: two for each product of numbers; 0 for any other operation.

    Args:
      instruction: any.
      types: type of every instruction's result, by the instruction's name.
    """
    if instruction.operation == "dot":
        return _dot(instruction, types)
    if instruction.operation == "convolution":
        return _convolution(instruction, types)
    return 0.0


def _dot(instruction: Instruction, types: Mapping[str, str]) -> float:
    left = sides_of(types[instruction.operands[0]])
    summed = 1
    for axis in whole_numbers(captured(_CONTRACTED, instruction.arguments)):
        summed *= left[axis]
    return 2.0 * math.prod(sides_of(instruction.result)) * summed


def _convolution(instruction: Instruction, types: Mapping[str, str]) -> float:
    labels = _LABELS.search(instruction.arguments)
    if labels is None:
        return 0.0
    of_inputs, of_kernel, of_outputs = labels.groups()
    left, right = (sides_of(types[name]) for name in instruction.operands[:2])
    inputs = dict(zip(of_inputs, left, strict=True))
    kernel = dict(zip(of_kernel, right, strict=True))
    outputs = dict(zip(of_outputs, sides_of(instruction.result), strict=True))
    window = _window(captured(_WINDOW, instruction.arguments))
    # Groups of the batch or of channels are in these sides already.
    total = 2.0 * outputs["b"] * outputs["f"] * kernel["i"]
    for axis in (name for name in outputs if name.isdigit()):
        place = int(axis)
        total *= _meetings(
            inputs[axis],
            kernel[axis],
            outputs[axis],
            low=_first_number(window, "pad", place, 0),
            stride=_first_number(window, "stride", place, 1),
            input_dilation=_first_number(window, "lhs_dilate", place, 1),
            kernel_dilation=_first_number(window, "rhs_dilate", place, 1),
        )
    return total


def _window(text: str) -> dict[str, list[str]]:
    """The entries of a window by name, one for every axis of space: `size=3x3 pad=1_1x1_1`."""
    entries = (entry.split("=", 1) for entry in text.split())
    return {name: value.split("x") for name, value in entries}


def _first_number(window: Mapping[str, list[str]], name: str, place: int, usual: int) -> int:
    """The number of an entry for one axis, of a padding that in front; `usual` where the window does not say."""
    values = window.get(name)
    if values is None:
        return usual
    return int(values[place].split("_")[0])


def _meetings(
    num_inputs: int,
    num_taps: int,
    num_outputs: int,
    *,
    low: int,
    stride: int,
    input_dilation: int,
    kernel_dilation: int,
) -> int:
    """How many pairs of an output and a tap meet a number of the input, along one axis."""
    outputs = stride * np.arange(num_outputs)[:, None]
    taps = kernel_dilation * np.arange(num_taps)
    places = outputs + taps - low
    is_inside = (places >= 0) & (places <= (num_inputs - 1) * input_dilation)
    # Between the numbers of a dilated input there are zeros.
    return int(np.sum(is_inside & (places % input_dilation == 0)))
