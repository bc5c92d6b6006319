"""How much arithmetic the products of a transformer need, counted from the shapes of its weights.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product (norms, softmax, activations) is left
out. Counted is what the mathematics needs: no recomputation and no padding. A family says which tokens a layer runs
over and where a backward pass stops, and counts attention itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util

from marble_jax.types import Adapter, Params

Path = tuple[str, ...]
ShareBelow = Callable[[Path, tuple[int, ...]], float]
"""(path, shape of the leaf) -> share of a product's layers whose input has something trained below it."""


@dataclasses.dataclass
class Flops:
    """FLOPs of a group of products at one sample.

    Attributes:
      forward: of the forward pass.
      backward: of the gradient of one cotangent in the adapter.
      in_blocks: the part of `forward` that lies in blocks.
    """

    forward: float = 0.0
    backward: float = 0.0
    in_blocks: float = 0.0


def _none(path: Path) -> bool:
    return False


def weight_products(
    params: Params,
    positions: Mapping[str, int],
    stream: Callable[[Path], str],
    share_below: ShareBelow,
    dropped: Callable[[Path], bool] = _none,
) -> Flops:
    """Products with the base weights.

    Args:
      params: parameters, or their shapes. Modules whose names begin with `block` are blocks, `proj_out` is the head.
      positions: of a sample in each stream of tokens.
      stream: which of them a layer runs over.
      share_below: of the weights in blocks; 0 for those of what nothing trained has touched.
      dropped: layers whose result nobody reads.
    """
    flops = Flops()
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if path[-1] != "kernel" or dropped(path):
            continue
        product = 2.0 * positions[stream(path)] * float(np.prod(leaf.shape))
        flops.forward += product
        if path[0].startswith("block"):
            flops.in_blocks += product
            flops.backward += product * share_below(path, leaf.shape)
        elif path[0] == "proj_out":
            flops.backward += product
    return flops


def adapter_products(
    adapter: Adapter,
    positions: Mapping[str, int],
    stream: Callable[[Path], str],
    share_below: ShareBelow,
    dropped: Callable[[Path], bool] = _none,
) -> Flops:
    """Products with the adapter's factors; arguments as of `weight_products`."""
    flops = Flops()
    for path, leaf in traverse_util.flatten_dict(dict(adapter)).items():
        if dropped(path):
            continue
        product = 2.0 * positions[stream(path)] * float(np.prod(leaf.shape))
        flops.forward += product
        # The input of `b` is the output of `a`, which is always trained.
        below = share_below(path, leaf.shape) if path[-1] == "a" else 1.0
        flops.backward += product * (1 + below)
    return flops
