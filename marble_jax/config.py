"""Every configuration key, once: default (the paper's SD3.5 recipe), meaning, unit and source.

`default_config()` turns the table into a `ConfigDict`, the files in `configs/` change values of it, and `check` says
what the table does not allow.
Sources: "paper" is MARBLE (arXiv 2605.06507) and its released configuration, "NFT" DiffusionNFT (arXiv 2509.16117),
"ours" a choice of this project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from marble_jax.errors import InputError, nearest, one_of

_INTERVAL = re.compile(r"([\[(])([\d.]+), ([\d.]+)(?:/K)?([\])])")
_BOUND = re.compile(r"(>=?) ([\d.]+)")


class Key(NamedTuple):
    """One configuration key: default value, meaning, unit, source.

    The unit doubles as the rule that `check` enforces: `a|b` are the choices, `[0, 1)`, `> 0` and `>= 1` the range of
    a number or of every number of a tuple.
    """

    default: Any
    meaning: str
    unit: str = "-"
    source: str = "ours"


KEYS: dict[str, Key] = {
    "name": Key("sd3", "name of the run, shown in the report"),
    "seed": Key(42, "seed of prompts, noise, adapters and timesteps", "integer, >= 0", "paper"),
    # models
    "model.path": Key(
        "",
        "diffusers-layout directory, hub id, or 'embedded' for the shipped tiny pipeline",
        "path",
    ),
    "model.dtype": Key("bfloat16", "matmul dtype of the transformer", "bfloat16|float32"),
    "model.attention": Key(
        "xla",
        "attention implementation: cudnn is fused and needs a GPU and bfloat16, splash is "
        "fused and needs a TPU, auto takes what fits the machine, einsum is the reference",
        "xla|cudnn|splash|auto|einsum",
    ),
    "model.remat": Key("none", "what the backward pass recomputes", "none|full|dots"),
    "model.unroll": Key(
        1,
        "transformer blocks compiled into one turn of the loop over them: more run faster and take "
        "longer to compile",
        ">= 1",
    ),
    "model.resolution": Key(512, "height and width of the pictures", "pixels, >= 1", "paper"),
    "model.max_sequence_length": Key(128, "T5 tokens a prompt", "tokens, >= 1", "paper"),
    "model.t5": Key(
        True, "use the T5 text encoder; without it its tokens are zeros, as in diffusers"
    ),
    # lora
    "lora.rank": Key(32, "rank of every adapter", ">= 1", "paper"),
    "lora.alpha": Key(64.0, "adapter output is scaled by alpha / rank", "> 0", "paper"),
    "lora.targets": Key(
        (
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ),
        "adapted modules, by the end of their diffusers name",
        "-",
        "paper",
    ),
    "lora.init": Key(
        "",
        "LoRA to start from, of this rank: PEFT directory, exported folder, .safetensors file or hub "
        "id; the reference of divergence and gains stays the base model without it",
        "path",
    ),
    # prompts
    "prompts.path": Key(
        "",
        "directory with SOURCE/{train,test} prompt files, 'generated' for the ready-made sets, or "
        "'embedded'",
        "path",
    ),
    "prompts.embedding_cache": Key(
        "",
        "folder for text embeddings, filled before training so that no text encoder "
        "stays in memory; may be shared by runs; empty: encoders stay",
        "path",
    ),
    "prompts.sources": Key(
        ("general", "ocr", "geneval"), "sources drawn from, in equal shares", "-", "paper"
    ),
    # rollout
    "rollout.prompts_per_step": Key(
        48, "distinct prompts an optimiser step, over all devices", "prompts, >= 1", "paper"
    ),
    "rollout.images_per_prompt": Key(24, "size of a group", "pictures, >= 2", "paper"),
    "rollout.batch_size": Key(
        144, "pictures sampled at once, over all devices", "pictures, >= 1", "paper"
    ),
    "rollout.num_steps": Key(25, "solver steps", "steps, >= 1", "paper"),
    "rollout.solver": Key("dpm2", "ODE solver", "euler|dpm1|dpm2|ddim", "paper"),
    "rollout.integer_timesteps": Key(
        False, "truncate the network's timestep to an integer, as upstream does", "-"
    ),
    "rollout.merge_adapter": Key(
        False,
        "fold the adapter into a copy of the weights for sampling: faster, exact only "
        "with float32 weights",
    ),
    # rewards
    "rewards.train": Key(
        ("pickscore", "hpsv2", "clipscore", "ocr", "geneval"),
        "rewards trained on: names in rewards.json, or functions of your own as module:function",
        "-",
        "paper",
    ),
    "rewards.heldout": Key((), "rewards only evaluated: they tell progress from reward hacking"),
    "rewards.path": Key("", "directory with the reward models, 'hub', or 'embedded'", "path"),
    "rewards.on_error": Key(
        "mask",
        "what a failed reward does: its samples are missing, the run stops, or one retry",
        "mask|fail|retry",
    ),
    "rewards.max_missing_share": Key(
        0.5,
        "share of one reward's scores that may fail; the run stops, saved, once it "
        "is exceeded by 8 batches' worth",
        "[0, 1]",
    ),
    "rewards.timeout": Key(
        120.0, "longest a call of a host reward may take before it counts as failed", "s, > 0"
    ),
    "rewards.check": Key(
        True, "score golden pictures first, and do not start with a reward that is broken"
    ),
    "rewards.num_workers": Key(2, "host threads for host rewards", "threads, >= 1"),
    # advantages
    "advantages.scale": Key(
        "global",
        "standard deviation divided by: of the whole batch or of the group",
        "global|group",
        "paper",
    ),
    "advantages.clip": Key(5.0, "A_max: advantages are clipped to [-clip, clip]", "> 0", "paper"),
    "advantages.scalarise": Key(
        "none",
        "one advantage instead of K: 'weighted_sum' of scores (DiffusionNFT) or "
        "'gdpo' (sum of normalised advantages)",
        "none|weighted_sum|gdpo",
    ),
    "advantages.stages": Key(
        (),
        "rewards trained on one stage after the other, each 'reward+reward[@source+source]"
        "[:steps]': a reward is missing outside its stage; the last stage goes on to the end; "
        "without steps all are equally long; empty: every reward at every step",
        "-",
        "NFT",
    ),
    "advantages.dropout": Key(
        0.0,
        "probability, for a step and a target, that the reward ignores the samples on which "
        "rewards that are no targets have scores; 0: off",
        "[0, 1]",
        "paper",
    ),
    "advantages.dropout_targets": Key((), "rewards that dropout may drop", "-", "paper"),
    "advantages.dropout_warmup": Key(
        0, "steps over which the probability of dropout rises from 0", "steps, >= 0", "paper"
    ),
    # harmonisation
    "harmonize.balancer": Key(
        "marble",
        "how K gradients become one update",
        "marble|equal|fixed|upgrad|pcgrad|cagrad|imtl|nash",
    ),
    "harmonize.mode": Key(
        "exact",
        "when per-reward gradients are taken: every step ('exact'), every refresh_every "
        "steps ('amortised', the paper's), or as upstream does ('faithful')",
        "exact|amortised|faithful",
    ),
    "harmonize.refresh_every": Key(
        10, "N: optimiser steps between solves of the amortised mode", "steps, >= 1", "paper"
    ),
    "harmonize.rho": Key(0.7, "weight of the old alpha in its running average", "[0, 1)", "paper"),
    "harmonize.smooth_exact": Key(False, "apply the running average in exact mode too", "-"),
    "harmonize.normalize": Key(True, "solve on unit gradients", "-", "paper"),
    "harmonize.reward_weights": Key(
        (),
        "one weight a reward, applied to unit gradients (or to scores when "
        "scalarised); empty: all one",
        "> 0",
        "paper",
    ),
    "harmonize.groups": Key(
        (),
        "a group name for each reward: rewards of one group enter the solve as their mean and "
        "share its alpha; empty: every reward by itself",
        "-",
        "paper",
    ),
    "harmonize.fixed_alpha": Key(
        (), "alpha of the 'fixed' balancer, one a reward, sum 1", "[0, 1]", "paper"
    ),
    "harmonize.alpha_floor": Key(0.0, "least alpha of every reward", "[0, 1/K]", "paper"),
    "harmonize.chunk_size": Key(
        8, "samples whose per-sample adapter gradients are held at once, a device", "samples, >= 1"
    ),
    "harmonize.anchor_every": Key(
        8,
        "a solve takes the terms that no advantage scales (pull to the rollout policy, "
        "divergence from the base) at every n-th micro-step, n times as strong; 1: at all",
        "micro-steps, >= 1",
    ),
    # objective
    "nft.beta": Key(
        0.1,
        "mixing of current and rollout velocity in the positive and negative branch",
        "(0, 1]",
        "paper",
    ),
    "nft.kl_weight": Key(
        1e-4, "weight of the squared distance to the base model's velocity", ">= 0", "paper"
    ),
    # training
    "training.num_steps": Key(1000, "optimiser steps", "steps, >= 1"),
    "training.micro_batch_size": Key(
        144, "samples (picture, timestep) a micro-step, over all devices", "samples, >= 1", "paper"
    ),
    "training.timestep_fraction": Key(
        0.99, "share of a picture's timesteps trained on: int(fraction * N)", "(0, 1]", "paper"
    ),
    "training.learning_rate": Key(3e-4, "AdamW step size", ">= 0", "paper"),
    "training.schedule": Key("constant", "learning-rate schedule", "constant|cosine", "paper"),
    "training.min_ratio": Key(
        0.0, "last learning rate over the first, with cosine", "[0, 1]", "paper"
    ),
    "training.weight_decay": Key(1e-4, "AdamW decoupled weight decay", ">= 0", "paper"),
    "training.beta1": Key(0.9, "AdamW first moment decay", "[0, 1)", "paper"),
    "training.beta2": Key(0.999, "AdamW second moment decay", "[0, 1)", "paper"),
    "training.epsilon": Key(1e-8, "AdamW epsilon", "> 0", "paper"),
    "training.clip_norm": Key(
        1.0, "global norm the update's gradient is clipped to", "> 0", "paper"
    ),
    "training.non_finite": Key(
        "stop",
        "a gradient that is not finite moves nothing; after some in a row 'stop' saves "
        "and ends the run, 'rollback' goes back to the last checkpoint with other random "
        "numbers, 'skip' goes on",
        "skip|stop|rollback",
    ),
    "training.non_finite_patience": Key(5, "how many in a row", "steps, >= 1"),
    "training.max_rollbacks": Key(
        3, "rollbacks, since the command was given, before the run is stopped after all", ">= 0"
    ),
    # policies
    "policies.schedule": Key(
        "linear_capped",
        "decay of the rollout policy towards the current one over steps",
        "copy|linear_capped|delayed_linear",
        "paper",
    ),
    "policies.rate": Key(0.001, "slope of the schedule", "1/step, >= 0", "paper"),
    "policies.cap": Key(0.95, "largest decay of the schedule", "[0, 1)", "paper"),
    "policies.delay": Key(75, "steps before 'delayed_linear' leaves zero", "steps, >= 0", "NFT"),
    "policies.ema_decay": Key(
        0.9, "decay of the averaged adapter that is evaluated and exported", "[0, 1)", "paper"
    ),
    # evaluation
    "evaluation.num_prompts": Key(
        384, "held-out prompts, in equal shares of the sources", "prompts, >= 1"
    ),
    "evaluation.sources": Key(
        (), "sources of the held-out prompts, in equal shares; empty: those trained on"
    ),
    "evaluation.images_per_prompt": Key(
        1, "pictures of each; intervals resample whole prompts", "pictures, >= 1"
    ),
    "evaluation.every_steps": Key(
        10, "steps between evaluations; 0: only before and after", "steps, >= 0", "paper"
    ),
    "evaluation.num_steps": Key(40, "solver steps", "steps, >= 1", "paper"),
    "evaluation.solver": Key("euler", "ODE solver", "euler|dpm1|dpm2|ddim", "paper"),
    "evaluation.seed": Key(
        1234, "seed of the evaluation noise, the same at every evaluation", "integer, >= 0"
    ),
    "evaluation.num_pictures": Key(12, "fixed prompts whose pictures are kept", "pictures, >= 0"),
    "evaluation.best": Key(
        "heldout",
        "rewards whose mean standardised gain on held-out prompts makes the best policy: "
        "those never trained on (if none, as 'train'), those trained on, or all",
        "heldout|train|all",
    ),
    # checkpoints
    "checkpoints.every_steps": Key(30, "steps between checkpoints", "steps, >= 1", "paper"),
    "checkpoints.keep": Key(
        3, "newest checkpoints kept; each holds the best policy too", "checkpoints, >= 1"
    ),
    "checkpoints.keep_every": Key(
        0, "checkpoints of every so many steps are kept for good; 0: none", "steps, >= 0"
    ),
    # exports
    "export.every_steps": Key(
        30,
        "steps between exports of a LoRA for diffusers and PEFT to exports/step_N, the last "
        "step too; 0: none",
        "steps, >= 0",
    ),
    "export.policy": Key("ema", "exported policy", "ema|current|rollout|best"),
    "export.keep": Key(3, "exports kept", "exports, >= 1"),
    # machine
    "mesh.data": Key(
        -1,
        "devices that split the batch alone; -1, here or for one of the next two: all that are left",
        "devices",
    ),
    "mesh.fsdp": Key(
        1,
        "devices that split the batch and the base weights, which are gathered layer by layer",
        "devices",
    ),
    "mesh.tensor": Key(
        1, "devices that split heads and hidden units and work on the same samples", "devices"
    ),
    "logging.tensorboard": Key(True, "write TensorBoard events"),
    "logging.profile_steps": Key(
        "",
        "steps whose profiler trace is written to profile/, such as 3-5 (1-based); empty: none",
        "steps",
    ),
    "logging.wandb": Key("", "wandb project; empty: off"),
}


def default_config() -> ml_collections.ConfigDict:
    """The table's defaults as a nested ConfigDict; tuples stay tuples."""
    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        *rooms, leaf = name.split(".")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[leaf] = key.default
    return ml_collections.ConfigDict(tree)


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`{"a.b": value}` of a nested configuration."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def check(flat: Mapping[str, Any]) -> None:
    """Holds a flat configuration against the table.

    Raises:
      InputError: an unknown or missing key, or a value that is not of its default's kind or outside its range.
    """
    for name in flat:
        known(name)
    for name in KEYS:
        if name not in flat:
            raise InputError(
                f"config.{name}: expected a value ({KEYS[name].meaning}); received none"
            )
    for name, value in flat.items():
        _check_value(name, KEYS[name], value)


def describe() -> str:
    """Every key with default, meaning, unit and source, one a line, for `--help`."""
    lines = []
    for name, key in KEYS.items():
        lines.append(f"  {name} = {key.default!r}\n      {key.meaning} [{key.unit}; {key.source}]")
    return "\n".join(lines)


def known(name: str) -> None:
    """Raises InputError, naming the nearest key, unless `name` is a key."""
    if name not in KEYS:
        raise InputError(
            f"config.{name}: expected a configuration key; received an unknown one{nearest(name, KEYS)}"
        )


def _check_value(name: str, key: Key, value: Any) -> None:
    default = key.default
    kind = {float: (float, int), tuple: (tuple, list)}.get(type(default), type(default))
    ranged = _INTERVAL.search(key.unit) or _BOUND.search(key.unit)
    parts = value if isinstance(default, tuple) and isinstance(value, (tuple, list)) else (value,)
    part_kind = kind if not isinstance(default, tuple) else (float, int) if ranged else str
    if not isinstance(value, kind) or any(
        not isinstance(part, part_kind) or isinstance(part, bool) != isinstance(default, bool)
        for part in parts
    ):
        what = type(default).__name__ + (
            f" of {'number' if ranged else 'text'}s" if isinstance(default, tuple) else ""
        )
        raise InputError(f"config.{name}: expected {what} ({key.meaning}); received {value!r}")
    if "|" in key.unit:
        one_of(f"config.{name}", value, key.unit.split("|"))
    elif ranged and not all(_inside(part, ranged) for part in parts):
        raise InputError(
            f"config.{name}: expected a number {'in ' if ranged.re is _INTERVAL else ''}{ranged.group()} "
            f"({key.meaning}); received {value!r}"
        )


def _inside(number: float, ranged: re.Match[str]) -> bool:
    if ranged.re is _BOUND:
        sign, least = ranged.groups()
        return number >= float(least) if sign == ">=" else number > float(least)
    opening, low, high, closing = ranged.groups()
    return (number >= float(low) if opening == "[" else number > float(low)) and (
        number <= float(high) if closing == "]" else number < float(high)
    )
