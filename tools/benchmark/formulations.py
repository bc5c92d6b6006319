"""Other ways to the same sums, measured to choose by: none of them is what training runs.

Every core returns the gradients of the K rewards, summed over valid samples, and that of the divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from marble_jax.families.sd3 import transformer
from marble_jax.networks.lora_dense import COLLECTION, LoraDense
from marble_jax.objectives import nft
from marble_jax.objectives.nft import NftBatch
from marble_jax.types import Adapter
from tools.benchmark.ours import Body, Core, by_reward, inputs, weighted_sum
from tools.benchmark.sizes import Problem


def seeds_of(problem: Problem, v: jax.Array, flow: NftBatch, anchors: bool) -> jax.Array:
    """[J, n, ...] cotangents of v: signal, and with anchors the loss at r = 1/2 and the divergence."""
    beta = problem.size.nft_beta
    parts = nft.error_parts(v, flow.v_rollout, flow.x0, flow.xt, flow.sigma, beta)
    signal, anchor = nft.signal_and_anchor(parts)
    elements = v[0].size
    factor = (2 * flow.sigma * problem.size.clip / elements).reshape((-1,) + (1,) * (v.ndim - 1))
    return jnp.stack(
        [factor * signal, factor * anchor, 2 / elements * (v - flow.v_base)]
        if anchors
        else [factor * signal]
    )


def mixes(problem: Problem, advantages: jax.Array, valid: jax.Array, anchors: bool) -> jax.Array:
    """[J, K + 1, n] weight of every seed and sample in the K rewards' gradients and, last, the divergence's."""
    # Rewards before samples here: the own pull-back of `weighted_sums` gets a row for every reward.
    r, valid = nft.optimality(advantages, problem.size.clip).T, valid.T
    mask, zeros = valid.astype(r.dtype), jnp.zeros_like(r[:1])
    signal = jnp.concatenate([jnp.where(valid, r - 0.5, 0), zeros])
    if not anchors:
        return signal[None]
    return jnp.stack([signal, jnp.concatenate([mask, zeros]), jnp.zeros_like(signal).at[-1].set(1)])


def assemble(
    problem: Problem, pulled: Adapter, advantages: jax.Array, valid: jax.Array, anchors: bool
) -> dict[str, Adapter]:
    """From per-sample pull-backs, leaves [n, J, ...], to the sums."""
    mix = mixes(problem, advantages, valid, anchors)

    def total(leaf: jax.Array) -> jax.Array:
        return jnp.einsum("jkn,nj...->k...", mix, leaf, precision=jax.lax.Precision.HIGHEST)

    return by_reward(jax.tree.map(total, pulled))


def vmapped(problem: Problem, anchors: bool) -> Core:
    """`vmap` over samples of a pull-back that is a `vmap` over seeds."""

    def core(params, current, flow, advantages, valid):

        def one(sample: NftBatch) -> Adapter:
            alone = jax.tree.map(lambda x: x[None], sample)
            v, pull_back = jax.vjp(
                lambda a: transformer.velocity(
                    problem.model, params, a, alone.xt, alone.sigma, alone.cond
                ),
                current,
            )
            return jax.vmap(pull_back)(seeds_of(problem, v, alone, anchors))[0]

        return assemble(problem, jax.vmap(one)(flow), advantages, valid, anchors)

    return core


def copied_adapters(problem: Problem, anchors: bool) -> Core:
    """A copy of the adapter for every sample, and one pull-back of the whole batch to all (a `vmap` over seeds)."""

    def core(params, current, flow, advantages, valid):
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (problem.size.num, *x.shape)), current)

        def one(adapter: Adapter, xt: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
            alone = jax.tree.map(lambda x: x[None], (xt, t, cond))
            return transformer.velocity(problem.model, params, adapter, *alone)[0]

        v, pull_back = jax.vjp(lambda a: jax.vmap(one)(a, flow.xt, flow.sigma, flow.cond), copies)
        pulled = jax.vmap(pull_back, out_axes=1)(seeds_of(problem, v, flow, anchors))[0]
        return assemble(problem, pulled, advantages, valid, anchors)

    return core


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(
    scale: float,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    sums: dict[str, jax.Array],
    mix: jax.Array,
) -> jax.Array:
    """scale (x a) b, whose cotangents of `sums` (a [R, in, r], b [R, r, out]; values unused) are the R sums over
    samples, weighted by `mix` [R, n], of the cotangents of a and b."""
    return (scale * (x @ a)) @ b


def _low_rank_forward(scale, x, a, b, sums, mix):
    return _low_rank(scale, x, a, b, sums, mix), (x, a, b, mix)


def _low_rank_backward(scale, kept, dy):
    """One product of [in, n T] with [n T, R r] instead of n products of [in, T] with [T, r]."""
    x, a, b, mix = kept
    waist, dwaist = scale * (x @ a), scale * (dy @ b.T)

    def weighted(y: jax.Array) -> jax.Array:
        y = y.reshape(len(y), -1, y.shape[-1])
        return mix.astype(y.dtype)[:, :, None, None] * y

    def product(spec: str, y: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.einsum(spec, y, z, preferred_element_type=jnp.float32)

    flat_x, flat_dy = (y.reshape(len(y), -1, y.shape[-1]) for y in (x, dy))
    sums = {
        "a": product("nti,kntr->kir", flat_x, weighted(dwaist)),
        "b": product("kntr,nto->kro", weighted(waist), flat_dy),
    }
    return dwaist @ a.T, None, None, sums, None


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _with_sums(mix: jax.Array) -> Callable:
    """Interceptor under which adapted layers take `_low_rank`, with its sums as two more leaves of their adapter."""

    def call(following, args, kwargs, context):
        module = context.module
        if not isinstance(module, LoraDense) or not module.has_variable(COLLECTION, "a"):
            return following(*args, **kwargs)
        kernel, bias = (module.get_variable("params", name) for name in ("kernel", "bias"))
        x, kernel, bias = nn.dtypes.promote_dtype(args[0], kernel, bias, dtype=module.dtype)
        a, b, sum_a, sum_b = (
            module.get_variable(COLLECTION, name) for name in ("a", "b", "sum_a", "sum_b")
        )
        low = _low_rank(
            module.lora_scale,
            x,
            a.astype(x.dtype),
            b.astype(x.dtype),
            {"a": sum_a, "b": sum_b},
            mix,
        )
        y = x @ kernel + low
        return y if bias is None else y + bias

    return call


def weighted_sums(problem: Problem, anchors: bool) -> Core:
    """The LoRA product's own pull-back returns the weighted sums; per-sample gradients never exist."""

    def core(params, current, flow, advantages, valid):
        rows = advantages.shape[1] + 1

        def is_layer(node: Any) -> bool:
            return isinstance(node, dict) and set(node) == {"a", "b"}

        def zeros(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
            # The axis of a scanned run stays first, in front of the rows.
            return {
                name: jnp.zeros((*leaf.shape[:-2], rows, *leaf.shape[-2:]))
                for name, leaf in layer.items()
            }

        sums = jax.tree.map(zeros, current, is_leaf=is_layer)

        def velocity(sums: Adapter, mix: jax.Array) -> jax.Array:
            joined = jax.tree.map(
                lambda layer, s: {**layer, "sum_a": s["a"], "sum_b": s["b"]},
                current,
                sums,
                is_leaf=is_layer,
            )
            with nn.intercept_methods(_with_sums(mix)):
                v = problem.model.apply(
                    {"params": params, COLLECTION: joined},
                    flow.xt,
                    flow.sigma * transformer.NUM_TRAIN_TIMESTEPS,
                    flow.cond["embeds"],
                    flow.cond["pooled"],
                )
            return v.astype(jnp.float32)

        def pull(mix: jax.Array, chosen: jax.Array) -> Adapter:
            v, pull_back = jax.vjp(lambda s: velocity(s, mix), sums)
            return pull_back(jnp.tensordot(chosen, seeds_of(problem, v, flow, anchors), 1))[0]

        mix = mixes(problem, advantages, valid, anchors)
        # Under the vmap over seeds only the backward pass has the axis: v depends on neither argument.
        pulled = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(pull)(mix, jnp.eye(len(mix))))
        return by_reward(jax.tree.map(lambda x: jnp.moveaxis(x, -3, 0), pulled))

    return core


def stacked_policies(problem: Problem, current: Adapter, rollout: Adapter) -> Adapter:
    """Leaves [3, ...]: current, rollout and reference policy, the last one zeros."""
    return jax.tree.map(lambda c, r: jnp.stack([c, r, jnp.zeros_like(r)]), current, rollout)


def three_forwards(problem: Problem, batched: bool) -> Body:
    """Velocities of the three policies, without any gradient: three calls, or one call of three times the batch."""

    def body(params, current, rollout, batch, plan):
        flow, _, _ = inputs(problem, params, rollout, batch, plan, not batched)
        at = lambda adapter: transformer.velocity(
            problem.model, params, adapter, flow.xt, flow.sigma, flow.cond
        )
        if not batched:
            return jnp.stack([at(current), flow.v_rollout, flow.v_base])
        return jax.vmap(at)(stacked_policies(problem, current, rollout))

    return body


def weighted_sum_batched(problem: Problem) -> Body:
    """The weighted sum with the two passes that need no gradient in one call."""

    def body(params, current, rollout, batch, plan):
        flow, advantages, valid = inputs(problem, params, rollout, batch, plan, False)
        both = jax.tree.map(lambda x: x[1:], stacked_policies(problem, current, rollout))
        v_rollout, v_base = jax.lax.stop_gradient(
            jax.vmap(
                lambda a: transformer.velocity(
                    problem.model, params, a, flow.xt, flow.sigma, flow.cond
                )
            )(both)
        )
        return weighted_sum(problem)(
            params, current, flow.replace(v_rollout=v_rollout, v_base=v_base), advantages, valid
        )

    return body


def weighted_sum_merged(problem: Problem) -> Body:
    """The weighted sum, the rollout policy folded into a second copy of the weights: `params` is the pair of both."""

    def body(params, current, rollout, batch, plan):
        base, merged = params
        flow, advantages, valid = inputs(problem, merged, None, batch, plan, False)
        v_base = jax.lax.stop_gradient(
            transformer.velocity(problem.model, base, None, flow.xt, flow.sigma, flow.cond)
        )
        return weighted_sum(problem)(base, current, flow.replace(v_base=v_base), advantages, valid)

    return body
