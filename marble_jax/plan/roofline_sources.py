"""What an instruction of a program belongs to in the model, by JAX's names and by what it does."""

from __future__ import annotations

import re

from marble_jax.plan.hlo import origin_of
from marble_jax.plan.hlo_program import HloProgram, Instruction
from marble_jax.plan.kernel_flops import is_attention

ATTENTION_KERNEL = "attention, fused kernel"
ATTENTION_PRODUCTS = "attention, products"
PRODUCTS = "products with weights"
LORA = "LoRA"
MODULATION = "norms and modulation"
QK_NORM = "qk norm"
STACKING = "stacking of a loop's arrays"
COPIES = "copies and layouts"
ATTENTION = "attention, around the products"
ACTIVATION = "feed-forward, activation"
ADAPTER_SUMS = "sums of adapter gradients"
DECODER = "autoencoder"
OTHER = "other"

_NAMED = (
    (LORA, r"/lora(/|$)"),
    (QK_NORM, r"/norm_(added_)?[qk](/|$)"),
    (ACTIVATION, r"/(tanh_gelu|gelu|silu)(/|$)"),
    (MODULATION, r"/(modulation|layer_norm|norm\d?\w*|norm_out)(/|$)"),
    (ATTENTION, r"/attn\w*(/|$)|attention"),
    (DECODER, r"/(decoder|up_blocks|mid_block|post_quant)"),
)
"""Sources by a part of the origin, the first that fits."""

_STACKED = re.compile(r"(body|scan)\S*/(dynamic_update_slice|dynamic_slice|squeeze)$")
_FILLED = frozenset({"broadcast", "constant", "parameter", "bitcast", "tuple", "copy"})
"""Operations of an array that is filled with one number."""
_MOVES = frozenset(
    {
        "bitcast",
        "broadcast",
        "concatenate",
        "constant",
        "convert",
        "copy",
        "dynamic-slice",
        "dynamic-update-slice",
        "gather",
        "get-tuple-element",
        "iota",
        "pad",
        "parameter",
        "reshape",
        "reverse",
        "select",
        "slice",
        "transpose",
        "tuple",
    }
)
"""Operations that only move numbers, or change their type."""


def source_of(instruction: Instruction, program: HloProgram, flops: float) -> str:
    """Returns the source of an instruction.

    Args:
      instruction: any that is no part of a fusion.
      program: of the instruction.
      flops: FLOPs of its products.
    """
    if is_attention(instruction):
        return ATTENTION_KERNEL
    origin = origin_of(instruction.arguments)
    if flops:
        return _product_source(origin)
    operations = _operations(instruction, program)
    if operations & {"dynamic-update-slice", "dynamic-slice"} and operations <= _MOVES:
        return STACKING
    if _STACKED.search(origin):
        return STACKING
    if "broadcast" in operations and operations <= _FILLED:
        # Zeros that a loop's results are written into.
        return STACKING
    if operations <= _MOVES or instruction.operation.startswith("copy"):
        return COPIES
    for source, pattern in _NAMED:
        if re.search(pattern, origin):
            return source
    return OTHER


def _product_source(origin: str) -> str:
    """The source of a product."""
    if re.search(r"/lora(/|$)", origin):
        return LORA
    if re.search(r"/(attn|attention)\w*/[^/]*$", origin):
        # A product right below the attention is none with a layer's weights.
        return ATTENTION_PRODUCTS
    if "einsum" in origin and "ckj" in origin:
        return ADAPTER_SUMS
    if re.search(r"/norm\w*/linear", origin):
        return MODULATION
    return PRODUCTS


def _operations(instruction: Instruction, program: HloProgram) -> set[str]:
    """Operations of an instruction: its own, or those that it is fused from."""
    if instruction.operation != "fusion":
        return {instruction.operation}
    operations = set()
    for _, callee in instruction.callees:
        for part in program.computations.get(callee, []):
            if part.operation == "fusion":
                operations |= _operations(part, program)
            else:
                operations.add(part.operation)
    return operations
