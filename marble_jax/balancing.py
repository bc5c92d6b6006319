"""Several objectives of one model, for any JAX function: their gradients, and the update that serves all of them.

    losses, gradients = losses_and_gradients(losses_fn, params, batch)    # K losses; leaves [K, ...]
    update, info = balance(gradients, balancer="marble")                  # one tree like params

`losses_and_gradients` takes one forward pass and one batched pull-back. Where objectives weigh the same few terms of
every sample, as rewards weigh its log-probability, `weighted_sample_gradients` pulls back the terms alone, for any
number of objectives. `balanced` is the same choice of an update as the first link of an optax chain.

Everything here is pure and can be compiled, works on any pytree of floating-point arrays (flax linen parameters,
`nnx.state`, plain dictionaries), and expects gradients of whole batches: under `shard_map`, add them up over devices
first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from marble_jax import platform, tree
from marble_jax.errors import InputError, one_of
from marble_jax.harmonize import diagnostics
from marble_jax.harmonize.balancers import Balancer
from marble_jax.harmonize.pull_back import mix_directions, resolve_chunk, sum_over_chunks
from marble_jax.harmonize.qp import STATUS_NAMES, MinNorm, min_norm
from marble_jax.harmonize.registry import BALANCERS, make_balancer
from marble_jax.tree import Tree, gram

__all__ = [
    "BALANCER_NAMES",
    "STATUS_NAMES",
    "BalanceInfo",
    "BalancedState",
    "Balancer",
    "MinNorm",
    "balance",
    "balanced",
    "gram",
    "losses_and_gradients",
    "min_norm",
    "per_objective_gradients",
    "select_balancer",
    "weighted_sample_gradients",
]

BALANCER_NAMES = (*BALANCERS, "min_norm")
"""Names of balancers; "min_norm" is MGDA, "marble" the same on unit gradients."""
_WEIGHTS = {"marble": "reward_weights", "weighted_sum": "reward_weights", "fixed": "alpha"}
"""What a balancer calls the weights of objectives, where it has any."""


@flax.struct.dataclass
class BalanceInfo:
    """What an update was made of, and what it does to every objective.

    Attributes:
      weights: float32 [K] of the update on the raw gradients.
      alpha: float32 [K] shares of the objectives, summing to 1 unless no gradient was usable.
      norms: float32 [K] lengths of the gradients; 0 where one was not used.
      used: bool [K] objectives that took part: valid, with a gradient that is finite and not zero.
      gram: float32 [K, K] inner products of the gradients.
      cos_update: float32 [K] cosines of the update with the gradients. A step along the negative update lowers an
        objective's loss to first order where the cosine is above 0.
      cos_pair: float32 [K, K] cosines of the gradients with each other.
      worst_cos: float32 scalar, smallest of `cos_update`.
      conflict: float32 scalar, 1 where the update opposes an objective, else 0.
      imbalance: float32 scalar, longest over shortest gradient.
      update_norm: float32 scalar, length of the update.
      min_norm: float32 scalar, length of the shortest convex combination, where the balancer solves for it.
      kkt_residual: float32 scalar, how far that solve is from optimal, relative to the longest vector squared.
      status: int32 scalar, index into STATUS_NAMES.
      state: the balancer's state, for its next call; empty for those that come with the package.
    """

    weights: jax.Array
    alpha: jax.Array
    norms: jax.Array
    used: jax.Array
    gram: jax.Array
    cos_update: jax.Array
    cos_pair: jax.Array
    worst_cos: jax.Array
    conflict: jax.Array
    imbalance: jax.Array
    update_norm: jax.Array
    min_norm: jax.Array
    kkt_residual: jax.Array
    status: jax.Array
    state: Any


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
    weights: jax.Array,
    valid: jax.Array | None = None,
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
      The losses [K] and the gradients, leaves [K, ...]; both are 0 for an objective without a sample.

    Raises:
      InputError: parameters that have no gradient, or shapes that do not go together.
    """
    platform.check_backend()
    _check_params(params)
    weights = jnp.asarray(weights)
    num_samples = _num_samples(batch)
    if weights.ndim not in (2, 3) or len(weights) != num_samples:
        raise InputError(
            f"weights: expected [{num_samples}, K] or [{num_samples}, K, J]; received shape "
            f"{list(weights.shape)}"
        )
    if weights.ndim == 2:
        weights = weights[..., None]
    if valid is None:
        valid = jnp.ones(weights.shape[:2], bool)
    if jnp.shape(valid) != weights.shape[:2]:
        raise InputError(
            f"valid: expected shape {list(weights.shape[:2])}; received {list(jnp.shape(valid))}"
        )
    # Replaced and not multiplied by 0: a weight that is not finite must not come through.
    mix = jnp.where(valid[..., None], weights, 0.0)

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
    counts = jnp.sum(valid, axis=0)
    share = 1.0 / jnp.maximum(counts, 1)

    def mean(total: jax.Array) -> jax.Array:
        # Objectives are the first axis of a stacked leaf.
        return total * share.reshape((-1,) + (1,) * (total.ndim - 1)).astype(total.dtype)

    return mean(losses), jax.tree.map(mean, gradients)


def select_balancer(
    balancer: str | Balancer, weights: Sequence[float] | None = None, **settings: Any
) -> Balancer:
    """A balancer by name.

    Args:
      balancer: one of BALANCER_NAMES; a Balancer is returned as it is.
      weights: one number an objective, for "marble" and "min_norm" (factors on the vectors of the hull), "weighted_sum"
        and "fixed" (shares that sum to 1).
      **settings: attributes of the balancer's class, such as `c` of "cagrad" or `normalize`.

    Raises:
      InputError: an unknown name or setting, or weights for a balancer that has none.
    """
    if isinstance(balancer, Balancer):
        if weights is not None or settings:
            raise InputError(
                f"balancer: expected a name beside weights and settings; received the object {balancer}"
            )
        return balancer
    one_of("balancer", balancer, BALANCER_NAMES)
    name = balancer
    if balancer == "min_norm":
        name = "marble"
        if settings.get("normalize", False):
            raise InputError(
                "normalize of the balancer 'min_norm': expected False ('marble' solves on unit gradients); received "
                f"{settings['normalize']!r}"
            )
        settings = {**settings, "normalize": False}
    if weights is not None:
        if name not in _WEIGHTS:
            raise InputError(
                f"weights: expected with one of {', '.join((*_WEIGHTS, 'min_norm'))}; received them "
                f"with {balancer!r}"
            )
        settings = {**settings, _WEIGHTS[name]: tuple(float(weight) for weight in weights)}
    return make_balancer(name, **settings)


def balance(
    gradients: Tree,
    balancer: str | Balancer = "marble",
    weights: Sequence[float] | None = None,
    valid: jax.Array | Sequence[bool] | None = None,
    state: Any = None,
    **settings: Any,
) -> tuple[Tree, BalanceInfo]:
    """One update from the gradients of K objectives.

    Only the inner products of the gradients enter the choice, so that gradients may be sharded in any way. A gradient
    that is zero or not finite leaves the combination; with one left the update is that gradient, with none it is zero.

    Args:
      gradients: tree with leaves [K, ...], as from `losses_and_gradients`.
      balancer: one of BALANCER_NAMES, or a Balancer.
      weights: one number an objective, see `select_balancer`.
      valid: bool [K], objectives that take part; all when None.
      state: `info.state` of the previous call, for a balancer that has a state.
      **settings: attributes of the balancer's class.

    Returns:
      The update, a tree like the parameters, to be descended like a gradient; and BalanceInfo.

    Raises:
      InputError: trees without such leaves, or see `select_balancer`.
    """
    rule = select_balancer(balancer, weights, **settings)
    num_objectives = _num_objectives(gradients)
    mask = jnp.ones(num_objectives, bool)
    if valid is not None:
        mask = jnp.asarray(valid, bool)
    if mask.shape != (num_objectives,):
        raise InputError(
            f"valid: expected one switch for each of {num_objectives} objectives; received shape "
            f"{list(mask.shape)}"
        )
    if state is None:
        state = rule.init(num_objectives)
    info = _solve(rule, gram(gradients).astype(jnp.float32), mask, state)
    return tree.weighted_sum(info.weights, gradients), info


def _solve(
    rule: Balancer, products: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any
) -> BalanceInfo:
    """What a balancer makes of a Gram matrix."""
    if type(rule).__hash__ is None:
        # A balancer of the user's that cannot name a compiled program.
        return _solved(rule, products, valid, state)
    return _compiled_solve(rule, products, valid, state)


def _solved(
    rule: Balancer, products: Float[Array, "k k"], valid: Bool[Array, " k"], state: Any
) -> BalanceInfo:
    solution = rule(products, valid, state)
    effect = diagnostics.from_gram(products, solution.weights, valid)
    return BalanceInfo(
        weights=solution.weights,
        alpha=solution.alpha,
        norms=solution.norms,
        used=solution.used,
        gram=products,
        cos_update=effect["harmonize/cos_update"],
        cos_pair=effect["harmonize/cos_pair"],
        worst_cos=effect["harmonize/worst_cos"],
        conflict=effect["harmonize/conflict"],
        imbalance=effect["harmonize/imbalance"],
        update_norm=effect["harmonize/update_norm"],
        min_norm=solution.min_norm,
        kkt_residual=solution.kkt_residual,
        status=solution.status,
        state=solution.state,
    )


# A solve is hundreds of small operations, slow one by one where the caller compiles nothing.
_compiled_solve = jax.jit(_solved, static_argnums=0)


@flax.struct.dataclass
class BalancedState:
    """State of `balanced` in an optax chain.

    Attributes:
      info: of the last update; zeros before the first one.
    """

    info: BalanceInfo


def balanced(
    balancer: str | Balancer = "marble",
    *,
    num_objectives: int,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """The first link of an optax chain, which takes the gradients of K objectives and passes one update on.

        optimizer = optax.chain(balanced("marble", num_objectives=3), optax.adam(1e-3))
        updates, state = optimizer.update(gradients, state, params)    # gradients: leaves [K, ...]

    Args:
      balancer: one of BALANCER_NAMES, or a Balancer.
      num_objectives: K.
      weights: one number an objective, see `select_balancer`.
      **settings: attributes of the balancer's class.
    """
    rule = select_balancer(balancer, weights, **settings)

    def init(params: Tree) -> BalancedState:
        del params
        shape = jax.ShapeDtypeStruct((num_objectives, num_objectives), jnp.float32)
        mask = jax.ShapeDtypeStruct((num_objectives,), jnp.bool_)
        start = rule.init(num_objectives)
        info = jax.eval_shape(lambda g, m: _solve(rule, g, m, start), shape, mask)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), info)
        return BalancedState(dataclasses.replace(blank, state=start))

    def update(
        gradients: Tree, state: BalancedState, params: Tree | None = None
    ) -> tuple[Tree, BalancedState]:
        del params
        if _num_objectives(gradients) != num_objectives:
            raise InputError(
                f"gradients: expected leaves [{num_objectives}, ...]; received "
                f"{_num_objectives(gradients)} in front"
            )
        combined, info = balance(gradients, rule, state=state.info.state)
        return combined, BalancedState(info)

    return optax.GradientTransformation(init, update)


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


def _num_samples(batch: Any) -> int:
    """The common length of the first axes."""
    return _first_axis(batch, "batch", "[n, ...] with the same n")


def _num_objectives(gradients: Tree) -> int:
    """The common length of the first axes."""
    return _first_axis(gradients, "gradients", "[K, ...] with the same K")


def _first_axis(arrays: Any, what: str, expected: str) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(arrays)]
    lengths = sorted({shape[0] for shape in shapes if shape})
    if len(lengths) != 1 or not all(shapes) or not lengths[0]:
        received = ", ".join(str(list(shape)) for shape in shapes[:5]) or "none"
        raise InputError(f"{what}: expected leaves {expected}; received {received}")
    return lengths[0]
