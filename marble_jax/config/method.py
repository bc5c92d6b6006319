"""Settings of the method: advantages, which rewards teach when, the objective, and how gradients are harmonised."""

from __future__ import annotations

import dataclasses

from marble_jax.config.keys import key


@dataclasses.dataclass(frozen=True)
class AdvantageSettings:
    """How scores become advantages."""

    scale: str = key(
        "global",
        "standard deviation divided by: of the whole batch or of the group",
        "global|group",
        "paper",
    )
    # The constant is part of the loss: optimality is A / (2 A_max) + 1/2.
    clip: float = key(5.0, "A_max: advantages are clipped to [-clip, clip]", "> 0", "paper")
    mode: str = key(
        "all",
        "part of an advantage that is trained on, after the clip: all of it, its positive or negative "
        "side (0 for the other), 1 for what is positive and 0 for the rest, or its sign",
        "all|positive_only|negative_only|one_only|binary",
        "paper",
    )
    # Upstream's name; over the samples of a device's micro-batch there, which few samples make noisy.
    r_normalize_mean: bool = key(
        False,
        "normalise optimality r = A / (2 clip) + 1/2 to mean 1/2 and standard deviation 1, cut off to "
        "[0, 1]: over a reward's valid samples of the step, in mode=upstream over each device's samples "
        "of a micro-batch",
        "-",
        "paper",
    )
    groups: str = key(
        "draw",
        "images whose mean an advantage is measured against: those of one draw of a prompt, or of equal "
        "prompts in a step, drawn together or not, as upstream has it",
        "draw|prompt",
    )
    scalarize: str = key(
        "none",
        "one advantage instead of K: that of the 'weighted_sum' of scores (DiffusionNFT, Flow-GRPO), the "
        "'advantage_sum' of the rewards' own (MixGRPO), or that sum normalised again over the batch ('gdpo')",
        "none|weighted_sum|advantage_sum|gdpo",
    )
    weights: tuple[float, ...] = key(
        (), "one weight a reward, of a scalarized advantage; empty: all one", "> 0"
    )

    @property
    def scalarized(self) -> bool:
        """Whether a single advantage is trained on instead of the rewards' own."""
        return self.scalarize != "none"


@dataclasses.dataclass(frozen=True)
class RewardScheduleSettings:
    """Which rewards teach on which samples of a step."""

    stages: tuple[str, ...] = key(
        (),
        "rewards trained on one stage after the other, each 'reward+reward[@source+source][:steps]': "
        "a reward is missing outside its stage; the last stage goes on to the end; without steps all "
        "are equally long; empty: every reward at every step",
        "-",
        "NFT",
    )
    dropout: float = key(
        0.0,
        "probability, for a step and a target (with harmonize.mode=upstream for each of the step's "
        "timesteps), that the reward ignores the samples on which rewards that are no targets have "
        "scores; 0: off",
        "[0, 1]",
        "paper",
    )
    dropout_targets: tuple[str, ...] = key((), "rewards that dropout may drop", "-", "paper")
    dropout_warmup: int = key(
        0, "steps over which the probability of dropout rises from 0", "steps, >= 0", "paper"
    )


@dataclasses.dataclass(frozen=True)
class HarmonizeSettings:
    """How K gradients become one update."""

    balancer: str = key(
        "marble",
        "how K gradients become one update; upgrad, pcgrad, cagrad, imtl and nash are experimental: right by their "
        "formulas, not compared in training yet",
        "marble|equal|fixed|upgrad|pcgrad|cagrad|imtl|nash",
    )
    mode: str = key(
        "exact",
        "when per-reward gradients are taken: every step ('exact'), every refresh_every steps "
        "('amortized': the paper's schedule, on the whole batch), or as upstream's code does ('upstream')",
        "exact|amortized|upstream",
    )
    # The best of 5, 10 and 20 in the paper's ablation.
    refresh_every: int = key(
        10,
        "N: optimiser steps from one with a solve to the next in the amortized and the upstream mode; where a step has "
        "several updates, each of them solves",
        "steps, >= 1",
        "paper",
    )
    # The best of 0.1, 0.3, 0.5, 0.7 and 0.9 in the paper's ablation.
    rho: float = key(0.7, "weight of the old alpha in its running average", "[0, 1)", "paper")
    smooth_exact: bool = key(False, "apply the running average in exact mode too")
    # One step's cosines are mostly those of its errors where a step has few samples.
    gram: str = key(
        "step",
        "inner products that are solved on: those of this step's gradients ('step'), or with "
        "cosines cleaned of noise by pairs of steps ('cleaned')",
        "step|cleaned",
    )
    window: float = key(
        10.0,
        "about how many steps that take per-reward gradients the pairs of steps reach back; above 1 with "
        "gram=cleaned",
        "steps, >= 1",
    )
    shrinkage: float = key(0.5, "weight of this step's cosines beside the cleaned ones", "[0, 1]")
    unit: str = key(
        "gradient",
        "length that a cleaned solve gives a gradient, which normalize then makes 1: its own ('gradient'), or "
        "that of its signal ('signal'), so that a noisy reward weighs more",
        "gradient|signal",
    )
    normalize: bool = key(True, "solve on unit gradients", "-", "paper")
    reward_weights: tuple[float, ...] = key(
        (),
        "one weight a reward, applied to unit gradients before balancer=marble solves; empty: all one",
        "> 0",
        "paper",
    )
    groups: tuple[str, ...] = key(
        (),
        "a group name for each reward: rewards of one group enter the solve as their mean and share "
        "its alpha; with mode=upstream mean and share are over all of a group's rewards, otherwise over those with a "
        "gradient; empty: every reward by itself",
        "-",
        "paper",
    )
    upstream_ranks: int = key(
        1,
        "with mode=upstream: devices among which a micro-batch is shared out there (16 in its recipe), "
        "each of which averages a reward over its own valid samples before devices are averaged",
        "devices, >= 1",
    )
    fixed_alpha: tuple[float, ...] = key(
        (), "alpha of the 'fixed' balancer, one a reward, sum 1", "[0, 1]", "paper"
    )
    alpha_floor: float = key(
        0.0, "least alpha of every reward, of balancer=marble", "[0, 1/K]", "paper"
    )
    # Other chunks give the same sums, up to rounding.
    chunk_size: int = key(
        8,
        "samples whose per-sample adapter gradients are held at once, a device",
        "samples, >= 1",
        resumable=True,
    )
    # These terms need no precision that the advantages lack: a share of them, weighted up, has the same mean.
    anchor_every: int = key(
        8,
        "a solve takes the terms that no advantage scales (pull to the rollout policy, divergence "
        "from the base) at one micro-batch in n, n times as strong, other slices of images from "
        "timestep to timestep and from step to step; so do steps between solves the divergence; 1: at all, "
        "as mode=upstream always does",
        "micro-batches, >= 1",
    )
    anchor_error: float = key(
        0.0,
        "relative error of a solve's update, |with the sampled terms - with all of them| / |update|, "
        "that more micro-batches than one in anchor_every have these terms for; measured by their "
        "variance between micro-batches, averaged over steps, at the price of one more backward pass "
        "where they are taken; 0: no more",
        "[0, 1)",
    )

    @property
    def is_upstream(self) -> bool:
        """Whether the optimiser step is upstream's."""
        return self.mode == "upstream"


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """Which objective is trained."""

    name: str = key(
        "nft",
        "objective by its registered name: nft is DiffusionNFT's, policy_gradient that of Flow-GRPO and its "
        "relatives, awm advantage-weighted matching",
        "-",
        "paper",
    )


@dataclasses.dataclass(frozen=True)
class NftSettings:
    """Constants of DiffusionNFT's objective."""

    beta: float = key(
        0.1,
        "mixing of current and rollout velocity in the positive and negative branch",
        "(0, 1]",
        "paper",
    )
    kl_weight: float = key(
        1e-4, "weight of the squared distance to the base model's velocity", "[0, 1000000]", "paper"
    )
    skip_rollout_pass: bool = key(
        False,
        "micro-batches without anchors take the trained policy's velocity for the rollout policy's, a forward pass "
        "less, at steps that follow one in which the two agreed to within rounding of model.dtype; with "
        "training.updates_per_rollout=1",
    )


@dataclasses.dataclass(frozen=True)
class PolicyGradientSettings:
    """Constants of the policy-gradient objective."""

    form: str = key(
        "ppo",
        "ratio of densities: of mean log-probabilities ('ppo', Flow-GRPO's), or centred and alike at all steps "
        "('guard', GRPO-Guard's)",
        "ppo|guard",
    )
    clip_range: float = key(
        0.0,
        "a ratio counts within 1 +- clip_range; 0: no clip, as with one update a rollout, whose ratio is 1",
        "[0, 1)",
    )
    kl_weight: float = key(
        0.0, "weight of the divergence of a step's mean from the base model's", "[0, 1000000]"
    )


@dataclasses.dataclass(frozen=True)
class AwmSettings:
    """Constants of advantage-weighted matching."""

    weighting: str = key(
        "sigma_huber",
        "of a sample's mean squared error: none, times its noise level or the level's square, a root of the error, "
        "or a root times the level",
        "uniform|sigma|sigma_squared|huber|sigma_huber",
    )
    power: float = key(0.25, "exponent of the roots", "(0, 1]")
    rollout_weight: float = key(
        0.0,
        "weight of the squared distance to the rollout policy's velocity, for a rollout policy that lags behind; 0 "
        "with rollout_policy.schedule=copy, and only there, as samples are not weighed by a ratio to the policy that "
        "drew them",
        "[0, 1000000]",
    )
    kl_weight: float = key(
        0.0, "weight of the squared distance to the base model's velocity", "[0, 1000000]"
    )
