"""Everything that is wrong with settings and shows without reading a file."""

from __future__ import annotations

import importlib.util

import jax

from marble_jax.config import LoggingSettings, ModelSettings, Settings, check, flatten
from marble_jax.errors import InputError
from marble_jax.harmonize.registry import balancer_of
from marble_jax.networks import attention
from marble_jax.networks.quantized import MODEL_PRODUCTS
from marble_jax.objectives.registry import make_objective
from marble_jax.programs.noisy_rollouts import (
    check_noisy_rollouts,
    check_objective_mode,
    trains_on_steps,
)
from marble_jax.programs.run_rewards import run_reward_schedule
from marble_jax.programs.unread_keys import check_unread_keys
from marble_jax.programs.upstream import check_upstream
from marble_jax.trainable.averaging import rollout_decay_of
from marble_jax.training.profile import parse_steps
from marble_jax.types import DTYPES
from marble_jax.validation import first_that_holds

_NEEDS = {"cudnn": "a GPU and bfloat16", "splash": "a TPU"}
"""What each fused kernel needs, in words."""


def check_settings(settings: Settings, backend: str = "") -> None:
    """Checks values against the table of keys, against each other and against the machine.

    Args:
      settings: of the run.
      backend: "cpu", "gpu" or "tpu", where it is to run; this machine's by default.

    Raises:
      InputError: a value outside the table of keys, or values that do not fit each other or this machine.
    """
    check(flatten(settings))
    _check_rewards(settings)
    _check_guidance(settings)
    _check_alpha_floor(settings)
    _check_weights(settings)
    _check_cleaning(settings)
    _check_skipped_pass(settings)
    _check_products(settings)
    _check_merging(settings)
    # Made to see that it can be; what is made here is dropped.
    balancer_of(settings.harmonize, settings.rewards.train)
    run_reward_schedule(settings)
    check_upstream(settings)
    make_objective(settings)
    rollout_decay_of(settings.rollout_policy)
    check_noisy_rollouts(settings)
    check_objective_mode(settings)
    check_unread_keys(settings)
    parse_steps(settings.logging.profile_steps)
    _check_attention(settings.model, backend or jax.default_backend())
    _check_wandb(settings.logging)


def _check_rewards(settings: Settings) -> None:
    """Raises InputError for rewards or sources that are missing or do not fit each other."""
    rewards = settings.rewards
    if not rewards.train:
        raise InputError("rewards.train: expected at least one reward; received none")
    if not settings.prompts.sources:
        raise InputError("prompts.sources: expected at least one source; received none")
    for name in rewards.heldout:
        if name in rewards.train:
            raise InputError(
                f"rewards.heldout: expected rewards that are not trained on; received {name!r}"
            )


def _check_guidance(settings: Settings) -> None:
    """Raises InputError for a negative prompt that nothing would read."""
    rollout = settings.rollout
    if rollout.negative_prompt and not rollout.guided:
        raise InputError(
            "rollout.negative_prompt: expected none without guidance (--config.rollout.guidance_scale above "
            f"1 turns it on); received {rollout.negative_prompt!r}"
        )


def _check_alpha_floor(settings: Settings) -> None:
    floor, count = settings.harmonize.alpha_floor, len(settings.rewards.train)
    # Weights of K rewards that sum to 1 cannot all be above 1/K.
    if floor > 1 / count:
        raise InputError(f"harmonize.alpha_floor: expected at most 1/{count}; received {floor}")


def _check_cleaning(settings: Settings) -> None:
    """Raises InputError where alpha is asked for on cleaned cosines and nothing solves on them."""
    harmonize = settings.harmonize
    if harmonize.gram == "step":
        if harmonize.unit != "gradient":
            raise InputError(
                f"harmonize.unit: expected 'gradient' with harmonize.gram=step, which knows no signals; received "
                f"{harmonize.unit!r} (--config.harmonize.gram=cleaned solves on signals)"
            )
        return
    reasons = {
        f"harmonize.balancer={harmonize.balancer}": harmonize.balancer in ("equal", "fixed"),
        f"advantages.scalarize={settings.advantages.scalarize}": settings.advantages.scalarized,
    }
    if reason := first_that_holds(reasons):
        raise InputError(
            f"harmonize.gram: expected 'step' with {reason}, which does not solve on the whole batch's "
            "gradients; received 'cleaned'"
        )
    if harmonize.window <= 1:
        # The pairs of one step have no spread to judge their error by, so that no signal would ever count.
        raise InputError(
            "harmonize.window: expected above 1 with harmonize.gram=cleaned, as the error of a signal takes pairs of "
            f"several steps; received {harmonize.window}"
        )


def _check_skipped_pass(settings: Settings) -> None:
    """Raises InputError where no micro-batch could do without the rollout policy, or none could tell whether."""
    if not settings.nft.skip_rollout_pass:
        return
    harmonize = settings.harmonize
    reasons = {
        f"objective.name={settings.objective.name}": not make_objective(settings).skips_alike,
        "harmonize.mode=upstream": harmonize.is_upstream,
        "harmonize.anchor_every=1": harmonize.anchor_every == 1,
    }
    if reason := first_that_holds(reasons):
        raise InputError(
            f"nft.skip_rollout_pass: expected False with {reason}, which asks the rollout policy at every "
            "micro-batch or at none; received True"
        )
    updates = settings.training.updates_per_rollout
    if updates > 1:
        # A later update's policy has left the one that sampled, by more than the last step's distance tells.
        raise InputError(
            f"nft.skip_rollout_pass: expected False with training.updates_per_rollout={updates}, as each update would "
            "go by the distance of policies that another one saw; received True"
        )


def _check_products(settings: Settings) -> None:
    """Raises InputError for rollouts of eight bits that training could not follow, or whose weights are split or hold
    the adapter, of which rounding would leave next to nothing.
    """
    products, mesh = settings.rollout.products, settings.mesh
    if products == MODEL_PRODUCTS:
        return
    if trains_on_steps(settings):
        raise InputError(
            f"rollout.products: expected '{MODEL_PRODUCTS}' with objective.name={settings.objective.name}, whose "
            f"ratios are to the policy that sampled; received {products!r}"
        )
    if (mesh.fsdp, mesh.tensor) != (1, 1):
        raise InputError(
            f"rollout.products: expected '{MODEL_PRODUCTS}' with weights split over devices (mesh.fsdp={mesh.fsdp}, "
            f"mesh.tensor={mesh.tensor}); received {products!r}"
        )
    if settings.rollout.merge_adapter:
        raise InputError(
            f"rollout.products: expected '{MODEL_PRODUCTS}' with rollout.merge_adapter=True, as an adapter folded into "
            f"weights of eight bits is rounded away; received {products!r} (--config.rollout.merge_adapter=False keeps "
            "the adapter apart)"
        )


def _check_merging(settings: Settings) -> None:
    """Raises InputError where rounding the sum of weights and adapter would lose most of the adapter."""
    dtype = settings.model.dtype
    if settings.rollout.merge_adapter and dtype != "float32":
        raise InputError(
            "model.dtype: expected 'float32' with rollout.merge_adapter=True, as rollouts and evaluations of an "
            f"adapter folded into rounded weights are those of another policy; received {dtype!r} "
            "(--config.rollout.merge_adapter=False keeps the adapter apart)"
        )


def _check_wandb(logging: LoggingSettings) -> None:
    if logging.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "logging.wandb: expected the package wandb; received none (pip install 'marble-jax[wandb]')"
        )


def _check_weights(settings: Settings) -> None:
    """Raises InputError unless weights of a scalarized advantage are one a reward, and go with one."""
    weights, count = settings.advantages.weights, len(settings.rewards.train)
    if weights and not settings.advantages.scalarized:
        raise InputError(
            "advantages.weights: expected none without advantages.scalarize (harmonize.reward_weights "
            f"weighs unit gradients); received {weights}"
        )
    if weights and len(weights) != count:
        raise InputError(
            f"advantages.weights: expected one number for each of {count} rewards "
            f"(--config.advantages.weights= for none); received {len(weights)}"
        )


def _check_attention(model: ModelSettings, backend: str) -> None:
    """Raises InputError where the attention that was chosen does not run on a backend."""
    chosen, dtype = model.attention, DTYPES[model.dtype]
    # What is not fused runs everywhere.
    wrong_backend = attention.FUSED.get(chosen, backend) != backend
    wrong_dtype = chosen == "cudnn" and model.dtype != "bfloat16"
    if wrong_backend or wrong_dtype:
        needs = _NEEDS[chosen]
        fitting = attention.choose("auto", dtype, backend)
        raise InputError(
            f"model.attention: expected {fitting!r}, as {chosen} needs {needs}; received {chosen!r} on "
            f"{backend} in {model.dtype} ('auto' takes what fits)"
        )
    # On this very machine the library can be tried; a plan may be for another one.
    can_try = chosen == "cudnn" and jax.default_backend() == backend
    if can_try and not attention.has_cudnn(dtype):
        raise InputError(
            "model.attention: expected a GPU of compute capability 8.0 and a cuDNN that JAX finds for "
            "'cudnn'; received neither or one (pip install nvidia-cudnn-cu12 or -cu13, or 'xla')"
        )
