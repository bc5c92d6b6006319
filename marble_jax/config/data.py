"""Settings of what is trained on: prompts, rollouts and the rewards that score them."""

from __future__ import annotations

import dataclasses

from marble_jax.config.keys import key


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """Where prompts come from."""

    path: str = key(
        "",
        "directory with SOURCE/{train,test} prompt files, also hf://datasets/OWNER/NAME[@REVISION] of the "
        "Hub, 'generated' for the ready-made sets, 'embedded' or 'embedded_video'",
        "path",
    )
    # The same embeddings either way: only where they are kept differs.
    embedding_cache: str = key(
        "",
        "folder for text embeddings, filled before training so that no text encoder stays in memory; "
        "may be shared by runs; 'auto': WORKDIR/embeddings with several processes, which fill it together, else "
        "~/.cache/marble_jax/embeddings; empty: encoders stay",
        "path",
        resumable=True,
    )
    sources: tuple[str, ...] = key(
        ("general", "ocr", "geneval"),
        "sources drawn from, in equal shares; prompts of a draw that these do not divide come from them in turn",
        "-",
        "paper",
    )


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How the rollout policy samples the images of an optimiser step."""

    prompts_per_step: int = key(
        48, "distinct prompts an optimiser step, over all devices", "prompts, >= 1", "paper"
    )
    images_per_prompt: int = key(24, "size of a group", "images, >= 2", "paper")
    batch_size: int = key(
        144,
        "images sampled at once, over all devices, in rollouts and in evaluations",
        "images, >= 1",
        "paper",
    )
    # A second-order solver needs fewer steps than the Euler solver of evaluations.
    num_steps: int = key(25, "solver steps", "steps, [1, 10000]", "paper")
    prompt_draws: str = key(
        "step",
        "prompts that differ: all of a step's, as far as there are enough, or those of a rollout batch, "
        "so that one may come twice in a step, as upstream has it",
        "step|batch",
    )
    solver: str = key(
        "dpm2",
        "solver: of the ODE, or with noise along the way, which policy gradients need: 'flow_sde' (Flow-GRPO), "
        "'dance_sde' (DanceGRPO) or 'cps' (coefficients-preserving sampling)",
        "euler|dpm1|dpm2|ddim|unipc|flow_sde|dance_sde|cps",
        "paper",
    )
    noise_level: float = key(
        0.7, "strength of the noise of a stochastic solver; at most 1 for cps", "(0, 100]"
    )
    window_size: int = key(
        0,
        "steps of a stochastic solver that have noise and are trained on, one after the other; 0: all that "
        "window_range allows",
        "steps, >= 0",
    )
    window_range: float = key(
        0.99,
        "share of the steps, from the first on, that have noise: int(share * N); the last step has none by "
        "default",
        "(0, 1]",
    )
    window_schedule: str = key(
        "random",
        "where in the range a smaller window begins: at its first step, drawn for every optimiser step, or moving "
        "on by one step every window_every optimiser steps",
        "fixed|random|sliding",
    )
    window_every: int = key(25, "optimiser steps that a sliding window stays", "steps, >= 1")
    integer_timesteps: bool = key(
        False, "truncate the network's timestep to an integer, as upstream does"
    )
    guidance_scale: float = key(
        1.0,
        "classifier-free guidance of rollouts and of the run's evaluations, on above 1; what is trained is the guided "
        "velocity with objective.name=policy_gradient, with others the velocity under the prompt alone",
        "[0, 1000]",
    )
    negative_prompt: str = key("", "what guidance leads away from; without guidance unused")
    merge_adapter: bool = key(
        False,
        "fold the adapter into a copy of the weights for rollouts and the run's evaluations: faster; with "
        "model.dtype=float32 and products=model alone, as rounding would lose most of a small adapter",
    )
    products: str = key(
        "model",
        "products of the blocks' dense layers in rollouts: of model.dtype, or of eight bits with a scale for each "
        "token and output; evaluations and training keep model.dtype",
        "model|int8|fp8",
    )

    @property
    def guided(self) -> bool:
        """Whether rollouts and evaluations are drawn with classifier-free guidance."""
        return self.guidance_scale > 1


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Which rewards score images, and what happens when one fails."""

    train: tuple[str, ...] = key(
        ("pickscore", "hpsv2", "clipscore", "ocr", "geneval"),
        "rewards trained on: names in rewards.json, or functions of your own as module:function",
        "-",
        "paper",
    )
    heldout: tuple[str, ...] = key(
        (), "rewards only evaluated: they tell progress from reward hacking"
    )
    path: str = key(
        "", "directory with the reward models, 'hub', 'embedded' or 'embedded_video'", "path"
    )
    upstream_scoring: bool = key(
        False,
        "score OCR and GenEval by the rules of MARBLE's released code instead of the published ones",
    )
    frames: str = key(
        "",
        "frames of a clip that rewards of images see, unless their entry says otherwise: all, first, every:K (frames "
        "0, K, 2 K, ...) or count:M (M evenly spread, first and last included); without a choice they refuse clips; "
        "no meaning for images",
    )
    frame_reduction: str = key(
        "mean", "how a reward of images makes one score of a clip's frames", "mean|min"
    )
    # What follows decides what becomes of failures and how fast scores come, not which scores a sound reward gives:
    # a run that a reward stopped can go on under other rules.
    on_error: str = key(
        "mask",
        "what a failed reward does: its samples are missing, the run stops, or one retry",
        "mask|fail|retry",
        resumable=True,
    )
    max_missing_share: float = key(
        0.5,
        "share of one reward's scores that may fail; the run stops, saved, once it is exceeded by 8 "
        "batches' worth",
        "[0, 1]",
        resumable=True,
    )
    timeout: float = key(
        120.0,
        "longest a call of a host reward may take before it counts as failed",
        "s, (0, 1000000]",
        resumable=True,
    )
    check: bool = key(
        True,
        "score golden images first, and do not start with a reward that is broken",
        resumable=True,
    )
    num_workers: int = key(
        0,
        "host threads for host rewards; 0: as many as this process may use cores",
        "threads, [0, 1024]",
        resumable=True,
    )
