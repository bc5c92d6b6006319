"""A kernel of attention under nested `vmap`, over several devices, and with what its backward pass wants kept.

A kernel only ever sees [N, T, H, d]:

* under `vmap` over samples the mapped axis joins the batch, in front of it, so that the samples of a device stay on it;
* under `vmap` over directions, which share queries, keys and values, the backward kernel runs once for each direction,
  as repeating what they share would cost more than it saves;
* over a mesh with several devices each device runs the kernel on its own samples and heads (`place`).

What the backward pass wants of the forward pass (for both kernels its arguments, its output and the log-sum-exp of
every query) is kept and carries the name `ATTENTION`, by which rematerialisation may keep it, too. What that is, the
kernel's own derivative says: arrays with a batch are told from constants by how their shapes follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from marble_jax.networks.precision import product_precision

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q, k, v) -> out, all [N, T, H, d]; differentiable, need not work under `vmap`."""

Axis = tuple[int | None, int | None]
"""Places of an array's batch and of its heads among its axes; None where it has none."""

Axes = Sequence[Axis]
"""The same of several arrays."""

Place = Callable[[Callable, tuple[int, ...], Axes, Axes], Callable]
"""(function, shape of the queries, axes of arguments, axes of results) -> the function over the devices."""

ATTENTION = "attention"
"""Name of what the backward pass of attention wants of its forward pass."""

_QKV: Axis = (0, 2)


def _on_one_device(kernel: Callable, shape: tuple[int, ...], takes: Axes, gives: Axes) -> Callable:
    return kernel


def folded(kernel: Kernel, place: Place = _on_one_device) -> Kernel:
    """Returns `kernel` with batching rules and a backward pass of our own; see the module's docstring.

    Args:
      kernel: what runs on [N, T, H, d].
      place: puts a function on the devices that hold a batch.
    """
    kernel = partial(_in_precision_of_its_type, kernel)

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array]:
            def alone(*arrays: jax.Array) -> tuple[jax.Array]:
                return (kernel(*arrays),)

            return place(alone, q.shape, (_QKV,) * 3, (_QKV,))(q, k, v)

        return _batched(run, (_QKV,) * 3, (_QKV,))(q, k, v)[0]

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, tuple[list[jax.Array], jax.Array]]:
        places = _kept_axes(kernel, q, k)
        axes = _batch_first(places)

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
            def alone(*arrays: jax.Array) -> tuple[jax.Array, ...]:
                out, pull = jax.vjp(kernel, *arrays)
                leaves = jax.tree.leaves(pull)
                return out, *(_moved(leaf, batch, 0) for leaf, (batch, _) in zip(leaves, places))

            return place(alone, q.shape, (_QKV,) * 3, (_QKV, *axes))(q, k, v)

        out, *kept = _batched(run, (_QKV,) * 3, (_QKV, *axes))(q, k, v)
        named = [checkpoint_name(leaf, ATTENTION) for leaf in kept]
        # Of the keys the backward pass has to know the number; an array of no size says it.
        return checkpoint_name(out, ATTENTION), (named, jnp.zeros((k.shape[1], 0), k.dtype))

    def backward(
        kept: tuple[list[jax.Array], jax.Array], cotangent: jax.Array
    ) -> tuple[jax.Array, ...]:
        leaves, keys = kept
        num_keys = keys.shape[0]
        like_keys = (*cotangent.shape[:1], num_keys, *cotangent.shape[2:])
        places = _kept_axes(kernel, cotangent, jax.ShapeDtypeStruct(like_keys, cotangent.dtype))
        axes = _batch_first(places)

        def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            def alone(*arrays: jax.Array) -> tuple[jax.Array, ...]:
                *leaves, cotangent = arrays
                samples, _, heads, width = cotangent.shape
                keys = (samples, num_keys, heads, width)
                pull = _pull_back(kernel, cotangent, jax.ShapeDtypeStruct(keys, cotangent.dtype))
                own = [_moved(leaf, 0, batch) for leaf, (batch, _) in zip(leaves, places)]
                # A kernel's own derivative is traced when it is called, not where the kernel is.
                with jax.default_matmul_precision(product_precision(cotangent.dtype)):
                    return jax.tree.unflatten(jax.tree.structure(pull), own)(cotangent)

            return place(alone, arrays[-1].shape, (*axes, _QKV), (_QKV,) * 3)(*arrays)

        return _batched(run, (*axes, _QKV), (_QKV,) * 3)(*leaves, cotangent)

    attention.defvjp(forward, backward)
    return attention


def _in_precision_of_its_type(
    kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """The kernel, in which float32 is multiplied as float32; see `networks.precision`."""
    with jax.default_matmul_precision(product_precision(q.dtype)):
        return kernel(q, k, v)


def _pull_back(kernel: Kernel, q: Any, k: Any) -> Any:
    """The kernel's pull-back with shapes in the place of what it keeps, for queries and keys of these shapes."""

    def pull(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.vjp(kernel, q, k, v)[1]

    queries, keys = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    return jax.eval_shape(pull, queries, keys, keys)


def _kept_axes(kernel: Kernel, q: Any, k: Any) -> tuple[Axis, ...]:
    """Places of batch and heads in everything that the kernel's pull-back keeps."""

    def shapes(samples: int, heads: int) -> list[tuple[int, ...]]:
        arrays = []
        for x in (q, k):
            _, tokens, num_heads, width = x.shape
            shape = (samples, tokens, heads * num_heads, width)
            arrays.append(jax.ShapeDtypeStruct(shape, x.dtype))
        return [leaf.shape for leaf in jax.tree.leaves(_pull_back(kernel, *arrays))]

    plain, more, wider = shapes(2, 1), shapes(3, 1), shapes(2, 2)
    return tuple(
        (_differing(shape, other), _differing(shape, wide))
        for shape, other, wide in zip(plain, more, wider, strict=True)
    )


def _batch_first(axes: Axes) -> tuple[Axis, ...]:
    """Places of batch and heads once the batch is in front."""
    moved: list[Axis] = []
    for batch, heads in axes:
        if batch is None:
            moved.append((None, heads))
        elif heads is not None and heads < batch:
            moved.append((0, heads + 1))
        else:
            moved.append((0, heads))
    return tuple(moved)


def _moved(x: jax.Array, source: int | None, target: int | None) -> jax.Array:
    """An array with its batch at another place; a constant, which has none, stays as it is."""
    if source is None or target is None:
        return x
    return jnp.moveaxis(x, source, target)


def _differing(shape: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """First axis in which two shapes of one length differ; None where they are the same."""
    for place, (side, other_side) in enumerate(zip(shape, other, strict=True)):
        if side != other_side:
            return place
    return None


def _batched(function: Callable, takes: Axes, gives: Axes) -> Callable:
    """`function` with a batching rule of its own; arguments and results lead with their batch, if they have one."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        gives_batch = [batch is not None for batch, _ in gives]
        has_batch = [batch is not None for batch, _ in takes]
        # Constants of the kernel are the same at every place of a mapped axis.
        arrays = tuple(
            x[0] if is_mapped and not leads else x
            for x, is_mapped, leads in zip(arrays, batched, has_batch)
        )
        is_mapped = [one and leads for one, leads in zip(batched, has_batch)]
        if is_mapped[-1] and not any(is_mapped[:-1]):
            # Directions, which share all but the cotangent.
            *shared, last = arrays
            parts = [mapped(*shared, last[i]) for i in range(size)]
            results = tuple(
                jnp.stack(leaves) if leads else leaves[0]
                for leaves, leads in zip(zip(*parts), gives_batch)
            )
            return results, tuple(gives_batch)
        joined = []
        for x, one, leads in zip(arrays, is_mapped, has_batch):
            if leads and not one:
                x = jnp.broadcast_to(x, (size, *x.shape))
            if leads:
                x = x.reshape(size * x.shape[1], *x.shape[2:])
            joined.append(x)
        # The mapped axis is in front of the batch, so that a reshape takes them apart again.
        results = tuple(
            x.reshape(size, x.shape[0] // size, *x.shape[1:]) if leads else x
            for x, leads in zip(mapped(*joined), gives_batch)
        )
        return results, tuple(gives_batch)

    return mapped
