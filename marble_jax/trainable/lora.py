"""LoRA adapters of the transformer: which layers, initial values, merging into the base weights.

An adapter is a plain pytree, leaves `a` [in, r] and `b` [r, out] in float32 under the adapted layers' module paths,
with the layers of a scanned run stacked on axis 0. Targets are suffixes of the published (diffusers) module names, as
in PEFT.

Source: Hu et al. 2021 (arXiv 2106.09685); PEFT's "gaussian" initialisation, a ~ N(0, 1/r^2) and b = 0.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError, nearest
from marble_jax.families.sd3.layer_names import Module, dense_modules, modules_at
from marble_jax.networks.lora_dense import check_adapter
from marble_jax.types import Adapter, Params

ATTENTION_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""The joint attention's eight projections; the image-only `attn2` of SD3.5-medium's dual blocks is not among them."""


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Shape of an adapter.

    Attributes:
      rank: inner width r.
      alpha: numerator of the scale.
      targets: suffixes of module names; a layer is adapted if its name is one, or ends with "." and one.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION_TARGETS

    def __post_init__(self):
        if isinstance(self.targets, str) or not self.targets:
            raise InputError(
                f"adapter targets: expected a list of module name suffixes; received {self.targets!r}"
            )
        if self.rank < 1:
            raise InputError(f"adapter rank: expected at least 1; received {self.rank}")
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """Factor alpha / rank of the low-rank product; the model's `lora_scale`."""
        return self.alpha / self.rank


def target_modules(
    shapes: Mapping[str, Any], targets: tuple[str, ...] = ATTENTION_TARGETS
) -> list[Module]:
    """Layers whose published name ends with a target.

    Args:
      shapes: parameters or abstract parameters of the transformer.
      targets: name suffixes.

    Raises:
      InputError: a target that matches no layer.
    """
    modules = dense_modules(shapes)
    for target in targets:
        if not any(_matches(module.name, target) for module in modules):
            names = {re.sub(r"^transformer_blocks\.\d+\.", "", module.name) for module in modules}
            close = nearest(target, sorted(names))
            raise InputError(
                f"adapter target: expected the end of a dense layer's name; received {target!r}{close}"
            )
    return [
        module for module in modules if any(_matches(module.name, target) for target in targets)
    ]


def init_adapter(key: jax.Array, shapes: Mapping[str, Any], spec: LoraSpec) -> Adapter:
    """New adapter: gaussian `a` of standard deviation 1/rank, zero `b`; the policy starts as the base model.

    Each layer draws from its own key, made from its name, so that its values depend neither on the other targets nor on
    how layers are stacked. A run of which only some layers are targeted holds zeros in both leaves of the others: these
    have zero gradient and stay inert.

    Args:
      key: PRNG key.
      shapes: parameters or abstract parameters of the transformer.
      spec: rank and targets.

    Raises:
      InputError: a target that matches no layer.
    """
    kernels = _kernels(shapes)
    chosen = {module.name for module in target_modules(shapes, spec.targets)}
    leaves = {}
    for path in dict.fromkeys(module.path for module in target_modules(shapes, spec.targets)):
        *stack, inner, outer = kernels[path]
        modules = modules_at(path, kernels[path])
        keys = jnp.stack(
            [jax.random.fold_in(key, zlib.crc32(module.name.encode())) for module in modules]
        )
        a = (
            jax.vmap(lambda k, inner=inner: jax.random.normal(k, (inner, spec.rank), jnp.float32))(
                keys
            )
            / spec.rank
        )
        active = jnp.asarray([module.name in chosen for module in modules])
        a = jnp.where(active[:, None, None], a, 0.0)
        leaves[(*path, "a")] = a if stack else a[0]
        leaves[(*path, "b")] = jnp.zeros((*stack, spec.rank, outer), jnp.float32)
    return traverse_util.unflatten_dict(leaves)


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
    leaves, lora = (
        traverse_util.flatten_dict(dict(params)),
        traverse_util.flatten_dict(dict(adapter)),
    )
    for path in {path[:-1] for path in lora}:
        kernel = leaves[(*path, "kernel")]
        a, b = (jnp.asarray(lora[(*path, name)], jnp.float32) for name in ("a", "b"))
        delta = jnp.matmul(a, b, precision="highest")
        leaves[(*path, "kernel")] = (jnp.asarray(kernel, jnp.float32) + scale * delta).astype(
            kernel.dtype
        )
    return traverse_util.unflatten_dict(leaves)


def num_parameters(adapter: Adapter) -> int:
    """Number of values in an adapter (or any pytree), abstract or not."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))


def unstack(adapter: Adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Adapter by published layer name: {name: (a [in, r], b [r, out])} on the host, for files of other libraries."""
    leaves = traverse_util.flatten_dict(jax.device_get(dict(adapter)))
    result = {}
    for path in dict.fromkeys(path[:-1] for path in leaves):
        a, b = (np.asarray(leaves[(*path, name)]) for name in ("a", "b"))
        for module in modules_at(path, a.shape):
            result[module.name] = (
                (a, b) if module.index is None else (a[module.index], b[module.index])
            )
    return result


def stack(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], shapes: Mapping[str, Any]) -> Adapter:
    """Inverse of `unstack`: an adapter from (a [in, r], b [r, out]) by published layer name.

    Layers of a run that `pairs` lacks get zeros, as in `init_adapter`.

    Args:
      pairs: leaves by layer; the rank is the same within a run.
      shapes: parameters or abstract parameters of the transformer.

    Raises:
      InputError: an unknown layer, or leaves that do not fit it.
    """
    kernels, modules = _kernels(shapes), {module.name: module for module in dense_modules(shapes)}
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for name, (a, b) in pairs.items():
        if name not in modules:
            close = nearest(name, modules)
            raise InputError(
                f"adapter layer: expected a dense layer of the transformer; received {name!r}{close}"
            )
        module = modules[name]
        *run, inner, outer = kernels[module.path]
        slots = {}
        for leaf, value in (("a", a), ("b", b)):
            zeros = np.zeros(
                (*run, inner, a.shape[-1]) if leaf == "a" else (*run, a.shape[-1], outer),
                np.float32,
            )
            slots[leaf] = leaves.setdefault((*module.path, leaf), zeros)
            slot = slots[leaf] if module.index is None else slots[leaf][module.index]
            if slot.shape != np.shape(value):
                received = np.shape(value)
                raise InputError(
                    f"adapter layer {name}, {leaf}: expected shape {slot.shape}; received {received}"
                )
            slot[...] = value
    return traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _kernels(shapes: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
    leaves = traverse_util.flatten_dict(dict(shapes)).items()
    return {path[:-1]: tuple(leaf.shape) for path, leaf in leaves if path[-1] == "kernel"}
