"""Gradients of several losses of one model, for any JAX function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from marble_jax import platform, tree
from marble_jax.balancing.leaves import common_length
from marble_jax.errors import InputError
from marble_jax.harmonize.pull_back import mix_directions, resolve_chunk, sum_over_chunks
from marble_jax.tree import Tree


def losses_and_gradients(
    losses_fn: Callable[..., Any],
    params: Tree,
    *args: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> tuple[Any, Tree]:
    """K losses and their gradients from one forward pass and one batched pull-back.

    Args:
      losses_fn: pure function of (params, *args) whose result is an array [K] or a tuple of K scalars; with `has_aux`
        a pair of that and anything else.
      params: pytree of floating-point arrays.
      *args: passed on to `losses_fn`.
      has_aux: whether `losses_fn` returns a pair.
      chunk_size: losses pulled back at once; all K when None. Fewer need less memory and take longer.

    Returns:
      The losses [K], in a pair with the second part of the result if `has_aux`, and the gradients: a tree like
      `params` with leaves [K, ...].

    Raises:
      InputError: parameters that have no gradient, or a result that is not K losses.
    """
    platform.check_backend()
    _check_params(params)

    def stacked(p: Tree) -> tuple[jax.Array, Any]:
        result = losses_fn(p, *args)
        losses, aux = _pair(result) if has_aux else (result, None)
        return _as_losses(losses), aux

    losses, pull_back, aux = jax.vjp(stacked, params, has_aux=True)
    # Row k asks for the gradient of loss k alone.
    rows = jnp.eye(len(losses), dtype=losses.dtype)

    def gradient(row: jax.Array) -> Tree:
        return pull_back(row)[0]

    if chunk_size is None or chunk_size >= len(losses):
        gradients = jax.vmap(gradient)(rows)
    else:
        gradients = jax.lax.map(gradient, rows, batch_size=max(chunk_size, 1))
    return ((losses, aux) if has_aux else losses), gradients


def per_objective_gradients(losses_fn: Callable[..., Any], params: Tree, *args: Any) -> Tree:
    """Gradients of K losses, leaves [K, ...]: what `losses_and_gradients` returns, without the losses.

    Args:
      losses_fn: pure function of (params, *args) whose result is an array [K] or a tuple of K scalars.
      params: pytree of floating-point arrays.
      *args: passed on to `losses_fn`.
    """
    return losses_and_gradients(losses_fn, params, *args)[1]


def weighted_sample_gradients(
    terms_fn: Callable[[Tree, Any], jax.Array],
    params: Tree,
    batch: Any,
    weights: Num[ArrayLike, "n k"] | Num[ArrayLike, "n k j"],
    valid: Bool[ArrayLike, "n k"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, " k"], Tree]:
    """Losses and gradients of K objectives that weigh the same terms of every sample.

        loss_k = 1 / n_k  sum_n valid_nk sum_j weights_nkj terms_fn(params, sample_n)_j

    One forward pass, and one backward pass for each of the J terms, whatever K is: the samples' own gradients are mixed
    with the weights. A policy gradient on K rewards is J = 1, the term being a sample's log-probability and the
    weights its negated advantages. Weights are constants: nothing is differentiated through them.

    Args:
      terms_fn: pure function of (params, one sample without the leading axis), a scalar or an array [J].
      params: pytree of floating-point arrays.
      batch: pytree of arrays [n, ...].
      weights: [n, K], or [n, K, J] where there are several terms.
      valid: bool [n, K], samples that count for an objective; all when None.
      chunk_size: samples pulled back together, a divisor of n; all n when None. Memory holds `chunk_size` J gradients.

    Returns:
      The losses [K] and the gradients, leaves [K, ...], in float32 or the wider dtype of a parameter, whatever that of
      the weights; both are 0 for an objective without a sample.

    Raises:
      InputError: parameters that have no gradient, or shapes that do not go together.
    """
    platform.check_backend()
    _check_params(params)
    num_samples = common_length(batch, "batch", "[n, ...] with the same n")
    mix, counted = _checked_mix(weights, valid, num_samples, params)

    def sample_terms(sample: Any) -> tuple[jax.Array, Tree]:
        terms, pull_back = jax.vjp(lambda p: jnp.atleast_1d(terms_fn(p, sample)), params)
        num_terms = mix.shape[-1]
        if terms.shape != (num_terms,):
            raise InputError(
                f"terms of a sample: expected {num_terms}, as many as there are weights; received "
                f"shape {list(terms.shape)}"
            )
        rows = jnp.eye(num_terms, dtype=terms.dtype)
        return terms, jax.vmap(lambda row: pull_back(row)[0])(rows)

    def chunk_sums(chunk: Any) -> tuple[jax.Array, Tree]:
        samples, chunk_mix = chunk
        terms, directions = jax.vmap(sample_terms)(samples)
        return mix_directions(chunk_mix, terms), mix_directions(chunk_mix, directions)

    num_objectives = mix.shape[1]
    zeros = jnp.zeros(num_objectives, mix.dtype), tree.zeros_like(params, num_objectives)
    chunk_size = resolve_chunk(num_samples, chunk_size)
    losses, gradients = sum_over_chunks(chunk_sums, (batch, mix), zeros, chunk_size)
    return _means((losses, gradients), jnp.sum(counted, axis=0))


def _checked_mix(
    weights: Num[ArrayLike, "n k"] | Num[ArrayLike, "n k j"],
    valid: Bool[ArrayLike, "n k"] | None,
    num_samples: int,
    params: Tree,
) -> tuple[Float[Array, "n k j"], Bool[Array, "n k"]]:
    """Weights of the samples' terms, 0 where a sample does not count, and which samples do.

    Args:
      weights: as given.
      valid: as given.
      num_samples: n.
      params: whose dtypes the weights are not to fall short of.

    Raises:
      InputError: shapes that do not go together.
    """
    weights = jnp.asarray(weights)
    if weights.ndim not in (2, 3) or len(weights) != num_samples:
        raise InputError(
            f"weights: expected [{num_samples}, K] or [{num_samples}, K, J]; received shape "
            f"{list(weights.shape)}"
        )
    if weights.ndim == 2:
        weights = weights[..., None]
    counted = jnp.ones(weights.shape[:2], bool) if valid is None else jnp.asarray(valid)
    if counted.shape != weights.shape[:2]:
        raise InputError(
            f"valid: expected shape {list(weights.shape[:2])}; received {list(counted.shape)}"
        )
    # Gradients are mixed in the dtype of the weights: whole numbers or half precision would round them.
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    for leaf in jax.tree.leaves(params):
        wide = jnp.promote_types(wide, leaf.dtype)
    weights = weights.astype(wide)
    # Replaced and not multiplied by 0: a weight that is not finite must not come through.
    return jnp.where(counted[..., None], weights, 0.0), counted


def _means(sums: Tree, counts: Int[Array, " k"]) -> Tree:
    """Sums of K objectives, leaves [K, ...], over their numbers of samples; 0 for an objective without one."""
    share = 1.0 / jnp.maximum(counts, 1)

    def mean(total: jax.Array) -> jax.Array:
        return total * tree.along_first(share, total).astype(total.dtype)

    return jax.tree.map(mean, sums)


def _check_params(params: Tree) -> None:
    """Raises InputError unless every leaf is an array of floating-point numbers."""
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise InputError("params: expected arrays of floating-point numbers; received none")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(
                f"params{jax.tree_util.keystr(path)}: expected an array of floating-point numbers; "
                f"received {dtype}"
            )


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise InputError(
            "losses_fn: expected a pair of losses and something else, as has_aux says; received "
            f"{type(result).__name__}"
        )
    return result


def _as_losses(losses: Any) -> jax.Array:
    """An array [K] of losses. Raises InputError for anything else."""
    if isinstance(losses, (tuple, list)):
        shapes = {jnp.shape(loss) for loss in losses}
        if shapes != {()}:
            raise InputError(
                f"losses_fn: expected scalars; received shapes {sorted(map(list, shapes))}"
            )
        return jnp.stack([jnp.asarray(loss) for loss in losses])
    if not hasattr(losses, "shape") or losses.ndim != 1 or not losses.shape[0]:
        received = list(losses.shape) if hasattr(losses, "shape") else type(losses).__name__
        raise InputError(
            f"losses_fn: expected an array [K] or a tuple of K scalars; received {received}"
        )
    return losses
