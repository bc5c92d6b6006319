"""A two-layer policy on latents [n, 2, 2, 3] with an adapter on each layer, and training problems small enough to
redo by hand: masks, advantages beyond the clip, and a rollout policy that differs from the current one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import marble_jax  # noqa: F401
from marble_jax.distributed import device_mesh
from marble_jax.harmonize.balancers import Marble
from marble_jax.objectives.nft import Nft
from marble_jax.trainable.averaging import rollout_decay
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.recipe import (
    Harmonization,
    MicroBatching,
    PolicyAverages,
    Recipe,
    Timesteps,
)
from marble_jax.training.state import initial_state

LATENT, HIDDEN, RANK, SCALE = (2, 2, 3), 6, 2, 2.0
REWARDS, PROMPTS, IMAGES, MICRO_BATCH, TIMESTEPS = 3, 3, 12, 4, 3
SIGMAS = (1.0, 0.8, 0.55, 0.25)
RATE, BETAS, EPSILON, DECAY, CLIP_NORM = 3e-3, (0.9, 0.95), 1e-6, 0.1, 0.5
ROLLOUT_DECAY = rollout_decay("linear_capped", rate=0.3)


def velocity(params, adapter, xt, sigma, cond):
    """tanh layer and linear layer; `cond` enters through its pooled part and the mean of its tokens."""

    def dense(name, x):
        out = x @ params[name]["kernel"]
        return (
            out if adapter is None else out + SCALE * (x @ adapter[name]["a"]) @ adapter[name]["b"]
        )

    x = jnp.concatenate(
        [xt.reshape(xt.shape[0], -1), sigma[:, None], cond["pooled"], cond["embeds"].mean(axis=1)],
        axis=1,
    )
    return dense("second", jnp.tanh(dense("first", x))).reshape(xt.shape)


def normal(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


@functools.cache
def base_params():
    rng = np.random.default_rng(1)
    return {
        "first": {"kernel": normal(rng, 12 + 1 + 2 + 3, HIDDEN, scale=0.3)},
        "second": {"kernel": normal(rng, HIDDEN, 12, scale=0.4)},
    }


def new_adapter(seed, scale=0.3):
    rng = np.random.default_rng(seed)
    shapes = {name: leaf["kernel"].shape for name, leaf in base_params().items()}
    return {
        name: {
            "a": normal(rng, inner, RANK, scale=scale),
            "b": normal(rng, RANK, outer, scale=scale),
        }
        for name, (inner, outer) in shapes.items()
    }


def recipe(
    *,
    objective=None,
    micro_batch=MICRO_BATCH,
    chunk=2,
    shards=device_mesh.SINGLE_DEVICE,
    alike_below=0.0,
    **harmonization,
):
    """NFT, with a running average of alpha in exact steps; other keywords are those of `Harmonization`."""
    if objective is None:
        objective = Nft(beta=0.1, clip=5.0, kl_weight=0.05)
    settings = {"balancer": Marble(), "num_rewards": REWARDS, "rho": 0.7, "smooth": True}
    return Recipe(
        objective=objective,
        timesteps=Timesteps(SIGMAS, TIMESTEPS),
        micro_batching=MicroBatching(micro_batch, chunk, shards),
        harmonization=Harmonization(**settings | harmonization),
        averages=PolicyAverages(ROLLOUT_DECAY, ema_decay=0.9),
        alike_below=alike_below,
    )


def optimizer():
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(RATE, b1=BETAS[0], b2=BETAS[1], eps=EPSILON, weight_decay=DECAY),
    )


def new_state(adapter_seed=2, seed=5, num_rewards=REWARDS, skips_alike=False):
    """All policies apart from each other, as in the middle of training; no solve yet."""
    adapter = new_adapter(adapter_seed)
    state = initial_state(adapter, optimizer(), num_rewards, (), seed, skips_alike=skips_alike)
    return state.replace(
        rollout=new_adapter(adapter_seed + 100), ema=new_adapter(adapter_seed + 200)
    )


def new_batch(seed=3, objectives=REWARDS, absent=()):
    """12 images of 3 prompts. Objective 1 is missing for prompt 0, 2 for every other image, `absent` ones wholly."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(PROMPTS, dtype=np.int32), IMAGES // PROMPTS)
    valid = np.ones((IMAGES, objectives), bool)
    valid[prompt == 0, 1] = False
    valid[::2, 2] = False
    valid[:, list(absent)] = False
    # Drawn objective by objective: more of them leave the numbers of the first ones alone.
    drawn = 6.0 * rng.normal(size=(objectives, IMAGES)).T
    advantages = np.where(valid, drawn, 0.0)
    cond = {"embeds": normal(rng, PROMPTS, 2, 3), "pooled": normal(rng, PROMPTS, 2)}
    return RolloutBatch(
        normal(rng, IMAGES, *LATENT),
        jnp.asarray(prompt),
        cond,
        jnp.asarray(advantages, jnp.float32),
        jnp.asarray(valid),
    )


def assert_close(found, expected, rtol=2e-4, atol=2e-6):
    """Two trees of the same structure, leaf by leaf."""
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(np.asarray(f), np.asarray(e), rtol=rtol, atol=atol),
        found,
        expected,
    )


def assert_identical(found, expected):
    jax.tree.map(
        lambda f, e: np.testing.assert_array_equal(np.asarray(f), np.asarray(e)), found, expected
    )
