"""Blocks of a transformer that recompute in the backward pass, and that gather weights split over devices.

A block is wrapped where it is called, so that the weights of no more than one are whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from marble_jax.networks.fused_attention import ATTENTION
from marble_jax.networks.lora_dense import COLLECTION, PRODUCT
from marble_jax.types import Params

GatherParams = Callable[[tuple[str, ...], Params], Params]
"""(path in front of the parameters, parameters split over devices) -> the same parameters, whole."""

GATHERED = "gathered"
"""Name of weights that were put together from several devices; a backward pass gathers them again, never keeps them."""


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether a backward pass keeps what an operation makes: all, except for weights that were put together.

    Not `save_anything_except_these_names`: it says yes to everything (seen in JAX 0.10), and the constraint that
    gathers has no name.
    """
    return primitive.name != "sharding_constraint" and params.get("name") != GATHERED


REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION),
}
"""What a backward pass keeps of a block's forward pass.

Everything; its input alone; its products with weights, base and low rank apart; the outputs of its dense layers and
what fused attention wants for its backward pass, so that nothing but norms, modulation and activations is run again.
"""


def wrapped_block(
    block: type[nn.Module],
    name: str,
    remat: str,
    gather: GatherParams | None,
    prevent_cse: bool = True,
) -> Any:
    """Returns the class of a block, with gathering and rematerialisation.

    Args:
      block: class of the block.
      name: first part of the path of one block of its kind, by which `gather` knows how it is split.
      remat: a key of `REMAT_POLICIES`.
      gather: puts a block's weights together; None where they lie whole.
      prevent_cse: whether the compiler could merge the recomputation with the forward pass; not inside of a loop.
    """
    if gather is None and remat == "none":
        return block
    wrapped: Any = block
    policy: Any = REMAT_POLICIES[remat]
    if gather is not None:
        wrapped = _gathered_block(block, name, gather)
        if remat == "none":
            # A backward pass gathers weights once more: kept, those of all blocks would be whole at a time.
            policy = _all_but_gathered
    return nn.remat(wrapped, prevent_cse=prevent_cse, policy=policy)


def run_of_blocks(
    block: type[nn.Module],
    name: str,
    remat: str,
    gather: GatherParams | None,
    length: int,
    unroll: int,
    num_shared: int,
) -> Any:
    """Returns the class of a run of equal blocks: one scan, with parameters and adapters stacked on axis 0.

    Args:
      block: class of a block; called on the token streams and what all blocks share.
      name: as for `wrapped_block`.
      remat: as for `wrapped_block`.
      gather: as for `wrapped_block`.
      length: blocks of the run.
      unroll: blocks in one turn of the scan; no more than there are.
      num_shared: arguments behind the token streams, the same for every block.
    """
    # Inside of a loop the recomputation cannot be merged with the forward pass, and the barrier would only cost time.
    prevent_cse = _leaves_loop(length, unroll)
    return nn.scan(
        wrapped_block(block, name, remat, gather, prevent_cse),
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * num_shared,
        length=length,
        unroll=min(unroll, length),
    )


def _leaves_loop(length: int, unroll: int) -> bool:
    """Whether blocks of a run are compiled outside of a loop, beside their own recomputation."""
    turns, rest = divmod(length, min(unroll, length))
    # A loop of one turn is taken apart by JAX or the compiler; what makes no whole turn lies behind the loop.
    return turns == 1 or rest > 0


def _gathered_block(block: type[nn.Module], name: str, gather: GatherParams) -> Any:
    """The class of a block that puts its weights together from several devices when it is called."""

    def whole(collections: dict[str, Params]) -> dict[str, Params]:
        params = gather((name,), collections["params"])
        return {"params": checkpoint_name(params, GATHERED)}

    return nn.map_variables(block, "params", whole)
