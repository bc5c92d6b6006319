"""LoRA adapters of a transformer: which layers, initial values, merging into the base weights.

An adapter is a plain pytree, leaves `a` [in, r] and `b` [r, out] in float32 under the adapted layers' module paths,
with the layers of a scanned run stacked on axis 0. Targets are suffixes of the published (diffusers) layer names, as
in PEFT; the model's family says what its layers are called.

Source: Hu et al. 2021 (arXiv 2106.09685); PEFT's "gaussian" initialisation, a ~ N(0, 1/r^2) and b = 0.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from marble_jax.config import LoraSettings
from marble_jax.errors import InputError, nearest
from marble_jax.families.base import Family
from marble_jax.families.layers import LayersAt, dense_layers, kernel_shapes
from marble_jax.networks.lora_dense import check_adapter
from marble_jax.types import Adapter, Params
from marble_jax.weights.formats import DenseLayer

# The part of a layer's name that says which block it is in.
_BLOCK = re.compile(r"^\w+\.\d+\.")

Factors = tuple[np.ndarray, np.ndarray]
"""One layer's `a` [in, r] and `b` [r, out]."""


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Shape of an adapter.

    Attributes:
      rank: inner width r.
      alpha: numerator of the scale.
      targets: suffixes of layer names; a layer is adapted if its name is one, or ends with "." and one.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) or not self.targets:
            raise InputError(
                f"adapter targets: expected a list of module name suffixes; received {self.targets!r}"
            )
        if self.rank < 1:
            raise InputError(f"adapter rank: expected at least 1; received {self.rank}")
        # A list from a configuration could not be hashed with the frozen record.
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """Factor alpha / rank of the low-rank product; the model's `lora_scale`."""
        return self.alpha / self.rank

    def matches(self, layer: DenseLayer) -> bool:
        """Whether a layer is adapted."""
        return _matches_any(layer.name, self.targets)


def lora_spec(settings: LoraSettings, family: Family) -> LoraSpec:
    """Returns the adapter that a run's settings ask for; without targets it adapts the family's default ones."""
    targets = settings.targets or family.default_targets
    return LoraSpec(settings.rank, settings.alpha, tuple(targets))


def target_layers(
    layers_at: LayersAt, shapes: Mapping[str, Any], targets: tuple[str, ...]
) -> list[DenseLayer]:
    """Layers whose published name ends with a target.

    Args:
      layers_at: names the layers, as `Family.layers_at` does.
      shapes: parameters or abstract parameters of the transformer.
      targets: name suffixes.

    Raises:
      InputError: a target that matches no layer.
    """
    layers = dense_layers(layers_at, shapes)
    for target in targets:
        _check_target(target, layers)
    return [layer for layer in layers if _matches_any(layer.name, targets)]


def _check_target(target: str, layers: Sequence[DenseLayer]) -> None:
    """Raises InputError unless a target is the end of some layer's name."""
    suffixes = set()
    for layer in layers:
        if _matches(layer.name, target):
            return
        # Suggested without its block's number: a target usually means all blocks.
        suffixes.add(_BLOCK.sub("", layer.name))
    raise InputError(
        "adapter target: expected the end of a dense layer's name; received "
        f"{target!r}{nearest(target, sorted(suffixes))}"
    )


def init_adapter(
    key: jax.Array, layers_at: LayersAt, shapes: Mapping[str, Any], spec: LoraSpec
) -> Adapter:
    """New adapter: gaussian `a` of standard deviation 1/rank, zero `b`; the policy starts as the base model.

    Each layer draws from its own key, made from its name, so that its values depend neither on the other targets nor on
    how layers are stacked. A run of which only some layers are targeted holds zeros in both leaves of the others: these
    have zero gradient and stay inert.

    Args:
      key: PRNG key.
      layers_at: names the layers, as `Family.layers_at` does.
      shapes: parameters or abstract parameters of the transformer.
      spec: rank and targets.

    Raises:
      InputError: a target that matches no layer.
    """
    kernels = kernel_shapes(shapes)
    leaves: dict[tuple[str, ...], jax.Array] = {}
    targets = target_layers(layers_at, shapes, spec.targets)
    for path in dict.fromkeys(layer.path for layer in targets):
        *run, inner, outer = kernels[path]
        layers = layers_at(path, kernels[path])
        a = _initial_factor(key, layers, inner, spec.rank)
        adapted = jnp.asarray([spec.matches(layer) for layer in layers])
        # Layers of the run that no target names stay inert: zero factors have zero gradients.
        a = jnp.where(adapted[:, None, None], a, 0.0)
        if not run:
            # A module outside the runs is a single layer without a stacked axis.
            a = a[0]
        leaves[(*path, "a")] = a
        leaves[(*path, "b")] = jnp.zeros((*run, spec.rank, outer), jnp.float32)
    return traverse_util.unflatten_dict(leaves)


def _initial_factor(
    key: jax.Array, layers: Sequence[DenseLayer], inner: int, rank: int
) -> Float[Array, "layers inner rank"]:
    """Initial `a` of the layers of one module, of standard deviation 1/rank."""
    keys = []
    for layer in layers:
        # A checksum, as Python's own hash of a string is another one in every process.
        keys.append(jax.random.fold_in(key, zlib.crc32(layer.name.encode())))

    def draw(layer_key: jax.Array) -> jax.Array:
        return jax.random.normal(layer_key, (inner, rank), jnp.float32)

    return jax.vmap(draw)(jnp.stack(keys)) / rank


def merge(params: Params, adapter: Adapter, scale: float) -> Params:
    """Base weights with the adapter folded in: kernel + scale * a @ b, in float32, then in the kernel's dtype.

    Args:
      params: base weights.
      adapter: LoRA leaves.
      scale: alpha / rank; its negative takes the adapter out again, up to rounding.

    Raises:
      InputError: adapter leaves that do not belong to `params`.
    """
    check_adapter(params, adapter)
    leaves = traverse_util.flatten_dict(dict(params))
    factors = traverse_util.flatten_dict(dict(adapter))
    # Every path comes twice, with `a` and with `b`.
    for path in dict.fromkeys(path[:-1] for path in factors):
        kernel = leaves[(*path, "kernel")]
        a = jnp.asarray(factors[(*path, "a")], jnp.float32)
        b = jnp.asarray(factors[(*path, "b")], jnp.float32)
        # Highest precision: what is rounded here is rounded in every product with the kernel.
        delta = jnp.matmul(a, b, precision="highest")
        # The sum is float32 too, and rounded once: a half-precision sum would lose small changes.
        merged = jnp.asarray(kernel, jnp.float32) + scale * delta
        leaves[(*path, "kernel")] = merged.astype(kernel.dtype)
    return traverse_util.unflatten_dict(leaves)


def num_parameters(adapter: Adapter) -> int:
    """Number of values in an adapter (or any pytree), abstract or not."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))


def unstack(layers_at: LayersAt, adapter: Adapter) -> dict[str, Factors]:
    """Adapter by published layer name, on the host, for files of other libraries.

    Returns:
      {name: (a [in, r], b [r, out])}.
    """
    leaves = traverse_util.flatten_dict(jax.device_get(dict(adapter)))
    pairs: dict[str, Factors] = {}
    # Every path comes twice, with `a` and with `b`.
    for path in dict.fromkeys(path[:-1] for path in leaves):
        a, b = np.asarray(leaves[(*path, "a")]), np.asarray(leaves[(*path, "b")])
        for layer in layers_at(path, a.shape):
            pairs[layer.name] = (a, b)
            if layer.index is not None:
                pairs[layer.name] = (a[layer.index], b[layer.index])
    return pairs


def stack(layers_at: LayersAt, pairs: Mapping[str, Factors], shapes: Mapping[str, Any]) -> Adapter:
    """Inverse of `unstack`: an adapter from (a [in, r], b [r, out]) by published layer name.

    Layers of a run that `pairs` lacks get zeros, as in `init_adapter`.

    Args:
      layers_at: names the layers, as `Family.layers_at` does.
      pairs: leaves by layer; the rank is the same within a run.
      shapes: parameters or abstract parameters of the transformer.

    Raises:
      InputError: an unknown layer, or leaves that do not fit it.
    """
    kernels = kernel_shapes(shapes)
    layers = {layer.name: layer for layer in dense_layers(layers_at, shapes)}
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for name, (a, b) in pairs.items():
        if name not in layers:
            raise InputError(
                "adapter layer: expected a dense layer of the transformer; received "
                f"{name!r}{nearest(name, layers)}"
            )
        layer = layers[name]
        *run, inner, outer = kernels[layer.path]
        rank = a.shape[-1]
        factors = {"a": (a, (*run, inner, rank)), "b": (b, (*run, rank, outer))}
        for leaf, (value, shape) in factors.items():
            # Zeros where no layer of the run writes: these stay inert, as in `init_adapter`.
            stacked = leaves.setdefault((*layer.path, leaf), np.zeros(shape, np.float32))
            _write(stacked, layer, leaf, value)
    return traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, leaves))


def _write(stacked: np.ndarray, layer: DenseLayer, leaf: str, value: np.ndarray) -> None:
    """Writes one layer's factor into the leaf of its module. Raises InputError where it does not fit."""
    slot = stacked
    if layer.index is not None:
        slot = stacked[layer.index]
    if slot.shape != np.shape(value):
        raise InputError(
            f"adapter layer {layer.name}, {leaf}: expected shape {slot.shape}; received "
            f"{np.shape(value)}"
        )
    slot[...] = value


def _matches_any(name: str, targets: Sequence[str]) -> bool:
    return any(_matches(name, target) for target in targets)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
