"""Signal and noise of the rewards' gradients, from steps next to each other; no backward pass is added.

A reward's gradient is its true gradient plus the error of finite samples, `u_k = s_k + n_k`. Within a step all rewards
are scored on the same images, so their errors are correlated, and inner products of one step hold more of that than of
the signal. Errors of different steps are independent: products between steps have the signals' products as their mean,

    E <u_i(t), u_j(t')> = <s_i, s_j>   for t != t'.

The history keeps a decayed sum of earlier unit gradients, K adapters in all, and a running mean of their products with
every new step's. Unit gradients, so that a long one does not outweigh the others: the diagonal is then the share of a
reward's gradient that is signal.

It also keeps the last update, which this step's gradients, taken on fresh samples, can judge: an update is built to
agree with the gradients that it is made of, and only those of other samples tell whether it does.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax import tree
from marble_jax.harmonize.gram import (
    divide,
    finite_lengths,
    inverse,
    lengths,
    pair_cosines,
    pairs,
    rescaled,
)
from marble_jax.types import Adapter

RELIABLE = 1.0
"""Standard errors by which a reward's signal must exceed 0 to count."""


@flax.struct.dataclass
class History:
    """What is kept of earlier steps. Sums are decayed: a step of age `a` counts `decay ** a`.

    Attributes:
      gradients: adapter tree, leaves [K, ...] float32: sum of earlier unit gradients.
      counts: float32 [K], how many.
      products: float32 [K, K], sum of the products of every step's unit gradients with those before it.
      num_pairs: float32 [K, K], how many pairs of steps are in it.
      squares: float32 [K], sum over steps of the pairs' mean own product squared, times their number.
      square_pairs: float32 [K], sum over steps of the number of pairs squared.
      update: adapter tree, the gradient that the optimiser was last given; zeros before the first step.
    """

    gradients: Adapter
    counts: jax.Array
    products: jax.Array
    num_pairs: jax.Array
    squares: jax.Array
    square_pairs: jax.Array
    update: Adapter


@flax.struct.dataclass
class Signal:
    """What pairs of steps say about the true gradients.

    Attributes:
      share: float32 [K], own product of a reward's unit gradients of different steps, which is their cosine: 1 without
        noise, 0 without signal. NaN while there is no pair.
      error: float32 [K], standard error of `share`; infinite with one step's pairs.
      products: float32 [K, K], products between steps, symmetric, `share` on the diagonal; NaN without a pair.
      reliable: bool [K], the share exceeds its own error.
    """

    share: jax.Array
    error: jax.Array
    products: jax.Array
    reliable: jax.Array


def init(adapter: Adapter, num_rewards: int) -> History:
    """History before the first step."""
    per_reward = jnp.zeros(num_rewards)
    per_pair = jnp.zeros((num_rewards, num_rewards))
    return History(
        gradients=tree.zeros_like(adapter, num_rewards),
        counts=per_reward,
        products=per_pair,
        num_pairs=per_pair,
        squares=per_reward,
        square_pairs=per_reward,
        update=tree.zeros_like(adapter),
    )


@flax.struct.dataclass
class NewStep:
    """A step's gradients beside those that a history holds.

    Attributes:
      unit: adapter tree, leaves [K, ...]: unit gradients; zeros of rewards that are not active.
      active: bool [K], rewards with a finite gradient above 0.
      with_earlier: float32 [K, K], products of this step's unit gradients (rows) with the sums of earlier ones.
    """

    unit: Adapter
    active: jax.Array
    with_earlier: jax.Array


def new_step(
    history: History,
    gradients: Adapter,
    norms: Float[Array, " k"],
    active: Bool[Array, " k"],
) -> NewStep:
    """A step's gradients, to be compared with a history and taken into it.

    Args:
      history: of earlier steps.
      gradients: raw ones of this step, leaves [K, ...]; those of rewards that are not active may hold anything.
      norms: their lengths.
      active: rewards with a finite gradient above 0.
    """
    # A factor of 0 leaves a reward out, whatever its gradient and its norm are.
    factors = jnp.where(active, inverse(norms), 0.0)
    unit = _scaled(gradients, factors)
    return NewStep(unit, active, tree.products(unit, history.gradients))


def observe(history: History, step: NewStep, window: float) -> History:
    """The history after a step. A reward that is not active leaves its part as it was.

    Args:
      history: the one that the step was made for.
      step: from `new_step`.
      window: steps, at least 1; sums decay by `1 - 1 / window` a step, so that this is about how many they hold.
    """
    decay = 1.0 - 1.0 / window
    active = step.active
    # Either of two rewards meets the earlier steps of the other: the mean of both ways.
    both_ways = step.with_earlier + step.with_earlier.T
    new_products = 0.5 * both_ways
    # Steps that an absent reward was compared with: none.
    counts = jnp.where(active, history.counts, 0.0)
    both_counts = counts[:, None] + counts[None]
    new_pairs = 0.5 * both_counts
    own_product = jnp.diagonal(new_products)
    # Mean over the pairs, squared, times their number; a first step has no pair.
    own_square = divide(jnp.square(own_product), counts, counts > 0)

    def decayed(mask: jax.Array, total: jax.Array, addend: jax.Array, factor: float) -> jax.Array:
        # What is absent does not age either: its sum and its number stay those of its own last steps.
        return jnp.where(mask, factor * total + addend, total)

    def extended(total: jax.Array, addend: jax.Array) -> jax.Array:
        mask = tree.along_first(active, total)
        return decayed(mask, total, addend, decay)

    both = pairs(active)
    return dataclasses.replace(
        history,
        gradients=jax.tree.map(extended, history.gradients, step.unit),
        counts=decayed(active, history.counts, jnp.ones_like(counts), decay),
        products=decayed(both, history.products, new_products, decay),
        num_pairs=decayed(both, history.num_pairs, new_pairs, decay),
        squares=decayed(active, history.squares, own_square, decay),
        # Weights of a mean enter its error squared.
        square_pairs=decayed(active, history.square_pairs, jnp.square(counts), decay**2),
    )


def _scaled(stacked: Adapter, factors: Float[Array, " k"]) -> Adapter:
    """Every tree of a stack times its factor; a factor of 0 leaves zeros whatever the tree holds."""

    def one(leaf: jax.Array) -> jax.Array:
        factor = tree.along_first(factors, leaf)
        # 0 times a number that is not finite would not be 0.
        return jnp.where(factor != 0, leaf * factor, 0.0)

    return jax.tree.map(one, stacked)


def estimate_signal(history: History) -> Signal:
    """Returns what the pairs of steps in a history say."""
    known = history.num_pairs > 0
    products = divide(history.products, history.num_pairs, known)
    share = jnp.diagonal(products)
    weight = jnp.diagonal(history.num_pairs)
    known_share = jnp.diagonal(known)
    mean_square = divide(history.squares, weight, known_share)
    # Rounding can leave a variance slightly below 0.
    variance = jnp.maximum(mean_square - jnp.square(share), 0.0)
    # 1 / effective number of steps.
    concentration = divide(history.square_pairs, jnp.square(weight), known_share)
    # It is 1, up to rounding, with a single one, which has no spread to judge its error by.
    several = known_share & (concentration < 1.0 - 1e-6)
    error = jnp.sqrt(divide(variance * concentration, 1.0 - concentration, several))
    # What is not known must not read as 0, which is no signal, or no error.
    return Signal(
        share=jnp.where(known_share, share, jnp.nan),
        error=jnp.where(several, error, jnp.inf),
        products=jnp.where(known, products, jnp.nan),
        reliable=several & (share > RELIABLE * error),
    )


def cosines(signal: Signal) -> Float[Array, "k k"]:
    """Cosines of the true gradients, in [-1, 1] with 1 on the diagonal; NaN where a reward is not reliable."""
    # A share that is not reliable may be below 0, or NaN; 1 stands in under the root.
    length = jnp.sqrt(jnp.where(signal.reliable, signal.share, 1.0))
    cosine = rescaled(signal.products, 1.0 / length)
    # Noise can carry an estimate past 1.
    cosine = jnp.clip(cosine, -1.0, 1.0)
    return jnp.where(pairs(signal.reliable), cosine, jnp.nan)


def signal_lengths(signal: Signal, active: Bool[Array, " k"]) -> Float[Array, " k"]:
    """Lengths of the true gradients as shares of those of this step's, in (0, 1].

    A signal that its own error hides is taken to be as long as the error allows. All are 1 as long as an active reward
    has no error yet: lengths would be compared with what is none.
    """
    square = jnp.clip(jnp.maximum(signal.share, signal.error), 0.0, 1.0)
    known = jnp.isfinite(signal.error) & (square > 0)
    # A reward without a gradient in this step is compared with none.
    usable = jnp.all(known | ~active)
    # The root of 1 stands in where nothing is known.
    length = jnp.sqrt(jnp.where(known, square, 1.0))
    return jnp.where(usable, length, 1.0)


def cleaned_gram(
    gram: Float[Array, "k k"], signal: Signal, shrinkage: float
) -> Float[Array, "k k"]:
    """Gram matrix with the norms of this step's gradients and cosines that are freed of noise.

    Cosines are `shrinkage` times this step's plus `1 - shrinkage` times those of the signal; eigenvalues below 0, which
    only noise brings, are cut off. A pair with a reward that is not reliable keeps this step's cosine.

    Args:
      gram: inner products of this step's gradients; rows that are not finite or zero stay as they are.
      signal: from `estimate_signal`.
      shrinkage: in [0, 1]; 1 returns `gram` up to rounding.
    """
    norms, alive = finite_lengths(gram)
    in_sample = pair_cosines(gram, norms, alive)
    clean = cosines(signal)
    known = jnp.isfinite(clean)
    # 0 stands in for NaN: it would still raise the alarm of a NaN checker.
    clean = jnp.where(known, clean, 0.0)
    mixed = shrinkage * in_sample + (1.0 - shrinkage) * clean
    mixed = jnp.where(known, mixed, in_sample)
    is_own = jnp.eye(len(gram), dtype=bool)
    # A gradient without a length has the cosine 0 with itself, which is no matrix of cosines.
    mixed = jnp.where(is_own, 1.0, mixed)
    nearest = _positive_part(mixed)
    # Rows of what is not finite or 0 go on to the balancer, which screens them.
    return jnp.where(pairs(alive), rescaled(nearest, norms), gram)


def _positive_part(matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The matrix without its negative eigenvalues, scaled back to a diagonal of 1."""
    values, vectors = jnp.linalg.eigh(matrix)
    positive = jnp.maximum(values, 0.0)
    product = jnp.einsum("ki,i,li->kl", vectors, positive, vectors, precision=tree.HIGHEST)
    return rescaled(product, inverse(lengths(product)))
