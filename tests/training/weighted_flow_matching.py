"""An objective that is no part of the package: what a user writes, in one file."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from marble_jax.config import ObjectiveSettings, Settings
from marble_jax.flow.path import interpolate
from marble_jax.objectives import registry
from marble_jax.objectives.base import Directions, FlowBatch, Objective
from marble_jax.objectives.registry import make_objective, register_objective


@flax.struct.dataclass
class TargetBatch(FlowBatch):
    target: jax.Array


@dataclasses.dataclass(frozen=True)
class WeightedFlowMatching(Objective):
    """Advantage-weighted flow matching, `loss_k = mean_n A_nk |v - (noise - x0)|^2`: one direction, no anchor."""

    bound: float = 4.0

    def prepare(self, draws, policies, divergence):
        noise = jax.random.normal(draws.key, draws.kept.shape)
        xt = interpolate(draws.kept, noise, draws.sigma)
        return TargetBatch(xt, draws.sigma, draws.cond, noise - draws.kept)

    def directions(self, prediction, batch):
        error = prediction - batch.target
        each = jnp.sum(jnp.square(error).reshape(len(error), -1), axis=1)
        return Directions(signals=(2.0 * error,), anchors=(), statistics=each)

    def mix(self, advantages, statistics, valid):
        return jnp.clip(advantages, -self.bound, self.bound)[..., None]

    def losses(self, advantages, statistics):
        return jnp.clip(advantages, -self.bound, self.bound) * statistics[:, None]


def registered(monkeypatch):
    """Registered under a name for one test, and found by it in the settings of a run."""
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    register_objective("flow_matching", lambda settings: WeightedFlowMatching())
    return make_objective(Settings(objective=ObjectiveSettings("flow_matching")))
