"""One optimiser step once more, from the formulas: torch autograd in float64, one backward pass a reward, SciPy's SLSQP
for alpha, torch's clipping and AdamW. Only the draws (noise, timesteps, order) are taken from the package."""

import functools

import jax
import numpy as np
import pytest
import toy_policy as toy
from scipy.optimize import minimize

from marble_jax.training.micro_batches import frozen_policies, micro_batch, training_order

torch = pytest.importorskip("torch")


def tensors(tree):
    return jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float64)), tree)


def arrays(tree):
    return jax.tree.map(lambda x: x.detach().numpy(), tree)


def velocity(params, adapter, xt, sigma, cond):
    def dense(name, x):
        out = x @ params[name]["kernel"]
        return (
            out
            if adapter is None
            else out + toy.SCALE * (x @ adapter[name]["a"]) @ adapter[name]["b"]
        )

    embeds, pooled = cond
    x = torch.cat([xt.flatten(1), sigma[:, None], pooled, embeds.mean(1)], 1)
    return dense("second", torch.tanh(dense("first", x))).reshape(xt.shape)


def slsqp(gram):
    """argmin over the simplex of a^T G a."""
    count = len(gram)
    found = minimize(
        lambda a: a @ gram @ a,
        np.full(count, 1 / count),
        jac=lambda a: 2 * gram @ a,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.success
    return found.x


class Twin:
    """Policies, AdamW and alpha in torch, stepped beside a `TrainState`."""

    def __init__(self, state, recipe):
        self.recipe = recipe
        self.params = tensors(toy.base_params())
        self.current, self.rollout, self.ema = (
            tensors(state.current),
            tensors(state.rollout),
            tensors(state.ema),
        )
        self.leaves = [leaf.requires_grad_() for leaf in jax.tree.leaves(self.current)]
        self.adamw = torch.optim.AdamW(
            self.leaves, lr=toy.RATE, betas=toy.BETAS, eps=toy.EPSILON, weight_decay=toy.DECAY
        )
        self.alpha, self.step_count = None, 0

    def draws(self, state, batch):
        """What the package draws for this step: a list of micro-batches, each a dict of float64 tensors."""
        drawn = _draws(state.key, state.step, state.rollout, batch, self.recipe)
        return [
            {name: torch.tensor(np.asarray(x[m], np.float64)) for name, x in drawn.items()}
            for m in range(len(drawn["sigma"]))
        ]

    def errors(self, part):
        """P, N and the divergence of every sample."""
        beta, sigma = self.recipe.objective.beta, part["sigma"].reshape(-1, 1, 1, 1)
        arguments = (part["xt"], part["sigma"], (part["embeds"], part["pooled"]))
        with torch.no_grad():
            v_rollout = velocity(self.params, self.rollout, *arguments)
            v_ref = velocity(self.params, None, *arguments)
        v = velocity(self.params, self.current, *arguments)
        sides = []
        for mixed in (
            beta * v + (1 - beta) * v_rollout,
            (1 + beta) * v_rollout - beta * v,
        ):
            error = part["xt"] - sigma * mixed - part["x0"]
            sides.append(
                (error**2).flatten(1).mean(1)
                / error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
            )
        return *sides, ((v - v_ref) ** 2).flatten(1).mean(1)

    def each(self, part, advantage):
        """The loss of every sample under an advantage [n], and its divergence."""
        positive, negative, divergence = self.errors(part)
        clip = self.recipe.objective.clip
        r = (advantage / (2 * clip) + 0.5).clamp(0, 1)
        return clip * (r * positive + (1 - r) * negative) / self.recipe.objective.beta, divergence

    def gradient(self, loss):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, self.leaves, retain_graph=True)]
        )

    def harmonised(self, part):
        """Gradients of the rewards valid in `part`, alpha of the solve [K], mean|g| / |g_k| [K], gradient of the KL."""
        found = {}
        for k in range(self.recipe.harmonization.num_rewards):
            each, divergence = self.each(part, part["advantages"][:, k])
            mask = part["valid"][:, k]
            if mask.sum():
                found[k] = self.gradient((each * mask).sum() / mask.sum())
        unit = torch.stack([g / g.norm() for g in found.values()])
        mean_norm = float(torch.stack([g.norm() for g in found.values()]).mean())
        alpha, scale = (
            np.zeros(self.recipe.harmonization.num_rewards),
            np.zeros(self.recipe.harmonization.num_rewards),
        )
        alpha[list(found)] = slsqp((unit @ unit.T).numpy())
        scale[list(found)] = [mean_norm / float(g.norm()) for g in found.values()]
        return found, alpha, scale, self.gradient(divergence.mean())

    def smoothed(self, fresh):
        self.alpha = (
            fresh
            if self.alpha is None
            else self.recipe.harmonization.rho * self.alpha
            + (1 - self.recipe.harmonization.rho) * fresh
        )
        return self.alpha

    def finish(self, total):
        """Clip, AdamW, averaged and rollout policy; returns the norm before clipping."""
        offset = 0
        for leaf in self.leaves:
            leaf.grad = total[offset : offset + leaf.numel()].reshape(leaf.shape).clone()
            offset += leaf.numel()
        norm = float(torch.nn.utils.clip_grad_norm_(self.leaves, toy.CLIP_NORM))
        self.adamw.step()
        self.step_count += 1
        count = self.step_count
        for slow, decay in (
            (self.ema, min((1 + count) / (10 + count), self.recipe.averages.ema_decay)),
            (self.rollout, min(0.3 * count, 0.95)),
        ):
            for leaf, new in zip(jax.tree.leaves(slow), self.leaves):
                leaf.copy_(decay * leaf + (1 - decay) * new.detach())
        return norm


@functools.partial(jax.jit, static_argnums=4)
def _draws(key, step, rollout, batch, recipe):
    """Every micro-batch's inputs, stacked: leaves [M, n, ...]."""
    order = training_order(
        batch,
        jax.random.wrap_key_data(key),
        step,
        recipe.timesteps,
        recipe.micro_batching.size,
    )
    policies = frozen_policies(toy.velocity, toy.base_params(), rollout)

    def one(m):
        part = micro_batch(recipe.objective, policies, order, batch.cond, m, False)
        flow = part.samples
        return {
            "x0": flow.x0,
            "xt": flow.xt,
            "sigma": flow.sigma,
            "embeds": flow.cond["embeds"],
            "pooled": flow.cond["pooled"],
            "advantages": part.advantages,
            "valid": part.valid,
        }

    return jax.lax.map(one, jax.numpy.arange(order.num_micro_batches))


def joined(parts):
    """All micro-steps as one batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
