"""Layers of a transformer by their published names, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import traverse_util

from marble_jax.weights.formats import DenseLayer

LayersAt = Callable[[tuple[str, ...], tuple[int, ...]], Sequence[DenseLayer]]
"""(path of a module, shape of its kernel) -> the published layers that it holds, in stacking order; every family has
one, `Family.layers_at`."""


def kernel_shapes(shapes: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of the kernel of every module that has one, by the module's path."""
    kernels = {}
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        if path[-1] == "kernel":
            kernels[path[:-1]] = tuple(leaf.shape)
    return kernels


def dense_layers(layers_at: LayersAt, shapes: Mapping[str, Any]) -> list[DenseLayer]:
    """Returns every dense layer, the ones an adapter can target, in tree order.

    Args:
      layers_at: names the layers.
      shapes: parameters or abstract parameters of the transformer.
    """
    layers = []
    for path, shape in kernel_shapes(shapes).items():
        for layer in layers_at(path, shape):
            # [in, out], and [layers, in, out] in a stacked run; a convolution has more axes.
            num_axes = 2 if layer.index is None else 3
            if len(shape) == num_axes:
                layers.append(layer)
    return layers
