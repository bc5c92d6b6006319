"""What a training run says at its start and at its end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax

from marble_jax import distributed
from marble_jax.config import RolloutSettings, Settings
from marble_jax.console import Console, duration, joined, quantity, shown
from marble_jax.programs.build import Run
from marble_jax.programs.locations import AUTO
from marble_jax.programs.noisy_rollouts import trains_guided
from marble_jax.programs.passed_over import passed_over
from marble_jax.programs.prompt_remarks import reach_line
from marble_jax.programs.run_record import method_name
from marble_jax.rewards.base import seen_frames
from marble_jax.storage.files import is_remote
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable.lora import num_parameters
from marble_jax.training.batch_sizes import is_stochastic, window_of

FILES = "config.json metrics.jsonl evaluation.jsonl tensorboard/ samples/ checkpoints/ report.html"


def announce_start(
    run: Run,
    workdir: Workdir,
    console: Console,
    resumed: int | None,
    stated: Collection[str] | None = None,
) -> None:
    """Prints what the run is: devices, model, rewards, sizes of a step, memory, and what it passes over.

    Args:
      run: the run.
      workdir: its directory.
      console: the terminal.
      resumed: steps done where it goes on from earlier ones.
      stated: see `passed_over`.
    """
    settings = run.settings
    title = f"marble_jax: {settings.name}, {method_name(settings)}"
    if resumed is not None:
        title += f", resumed after step {resumed}"
    console.say(title)
    rewards = settings.rewards
    layout = run.networks.sharding_rules.describe(run.mesh, run.networks.params)
    heldout = joined(rewards.heldout)
    rows = [
        ("devices", _device_line(run)),
        ("model", _model_line(run)),
        ("base weights", layout),
        ("rewards", f"{joined(rewards.train)}; never trained on: {heldout}"),
        *_frame_rows(run),
        *_group_rows(run),
        ("prompts", _prompts_line(run)),
        ("texts", _texts_line(run)),
        ("step", _step_line(run)),
        ("sampling", _sampling_line(run)),
        ("memory", _memory_line(run)),
        ("evaluation", _evaluation_line(run)),
        ("workdir", f"{workdir.path}: {FILES}"),
    ]
    console.table(rows)
    for line in (_guidance_remark(settings), passed_over(settings, stated)):
        if line:
            console.say(line)


def _device_line(run: Run) -> str:
    devices = jax.devices()
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    return f"{len(devices)} {devices[0].device_kind}, mesh {mesh}, jax {jax.__version__}"


def _frame_rows(run: Run) -> list[tuple[str, str]]:
    """Which frames each reward sees; no row where samples are images."""
    if run.size.num_frames == 1:
        return []
    names: dict[str, list[str]] = {}
    for reward in run.evaluator.scorer.rewards:
        names.setdefault(seen_frames(reward), []).append(reward.name)
    choices = []
    for words, seeing in names.items():
        choices.append(f"{words}: {joined(seeing)}")
    return [("frames", "; ".join(choices))]


def _group_rows(run: Run) -> list[tuple[str, str]]:
    """What rewards that compare the images of a prompt are given; no row without such a reward."""
    evaluator = run.evaluator
    comparing = [reward.name for reward in evaluator.scorer.rewards if reward.needs_full_group]
    if not comparing:
        return []
    evaluated = f"{evaluator.images_per_prompt} in evaluations"
    if not evaluator.comparing:
        evaluated = "in evaluations scored on single images (evaluation.images_per_prompt)"
    rollout = ""
    if set(comparing) & set(run.settings.rewards.train):
        rollout = f"{run.settings.rollout.images_per_prompt} in rollouts, "
    return [("compared", f"images of a prompt, by {joined(comparing)}: {rollout}{evaluated}")]


def _prompts_line(run: Run) -> str:
    """Training prompts, how a draw that they do not divide takes turns, and rewards that apply to some of them."""
    prompts, sampling = run.train_prompts, run.sampling
    words = f"{sum(map(len, prompts.values()))} of {joined(sorted(prompts))}"
    of_draw = sampling.prompts_per_step // sampling.draws_per_step
    if of_draw % len(prompts):
        words += f" (a draw has {of_draw}: they take turns at what is left over)"
    applied = reach_line(run.reach)
    return f"{words}; {applied}" if applied else words


def _texts_line(run: Run) -> str:
    """Where text embeddings are, and which processes encode them."""
    place = run.encode.place
    if not place:
        return "text encoders stay in memory (prompts.embedding_cache takes them away)"
    words = f"embeddings in {place}, no text encoder in memory"
    count = distributed.count()
    if count == 1:
        return words
    if run.settings.prompts.embedding_cache == AUTO or is_remote(place):
        return f"{words}; {count} processes encode a share each"
    # Whether a directory is one and the same on all hosts is known of the workdir alone.
    return f"{words}; {count} processes encode a share each, or all texts each unless they share the folder"


def _step_line(run: Run) -> str:
    sizes, rollout = run.sizes, run.settings.rollout
    return (
        f"{rollout.prompts_per_step} prompts x {rollout.images_per_prompt} = {sizes.images} "
        f"{run.size.samples} in {sizes.rollout_batches} batches, {sizes.timesteps} of {rollout.num_steps} "
        f"timesteps: {sizes.samples} samples in {sizes.micro_batches} micro-batches"
    )


def _sampling_line(run: Run) -> str:
    """Solver, guidance and frames of rollouts, as far as they decide what a sample looks like."""
    rollout = run.settings.rollout
    guidance = "no guidance"
    if rollout.guided:
        guidance = (
            f"guidance {rollout.guidance_scale:g} away from {rollout.negative_prompt!r}, in evaluations "
            f"too; trained {'with it' if trains_guided(run.settings) else 'without'}"
        )
    told = ""
    if run.networks.network_levels(rollout.num_steps, run.collector.latent_shape) is not None:
        told = ", whole timesteps as the model's pipeline"
    split = ""
    if run.collector.stack is not None:
        split = "; latents split over the devices"
    return (
        f"{rollout.num_steps} steps of {rollout.solver}{_noise(rollout)}{told}, {guidance}{split}"
    )


def _guidance_remark(settings: Settings) -> str:
    """What guidance does to an objective whose samples are to be those of the policy that is trained; "" without."""
    rollout = settings.rollout
    if settings.objective.name != "awm" or not rollout.guided:
        return ""
    return (
        f"rollout.guidance_scale={rollout.guidance_scale:g}: advantage-weighted matching trains the velocity under the "
        "prompt alone and takes what guidance drew for samples of it (--config.rollout.guidance_scale=1 draws its own)"
    )


def _noise(rollout: RolloutSettings) -> str:
    """Strength of the noise of a stochastic solver, and at which steps it is."""
    if not is_stochastic(rollout):
        return ""
    window = window_of(rollout)
    where = f"steps 1 to {window.end}"
    if window.num_starts > 1:
        where = f"{window.size} steps within {where} ({window.schedule})"
    return f", noise {rollout.noise_level:g} at {where}"


def _model_line(run: Run) -> str:
    settings = run.settings
    base = quantity(num_parameters(run.networks.params))
    adapter = quantity(num_parameters(run.state.current))
    start = ""
    if settings.lora.init:
        start = f", from {settings.lora.init}"
    return (
        f"{settings.model.path}: transformer {base} {settings.model.dtype}, adapter {adapter} (rank "
        f"{settings.lora.rank}{start}), {run.size} px"
    )


def _memory_line(run: Run) -> str:
    # Adapters are float32 whatever the compute dtype.
    adapter_bytes = 4 * num_parameters(run.state.current)
    num_directions = run.recipe.objective.num_directions
    gradient_bytes = adapter_bytes * num_directions * run.recipe.micro_batching.chunk_size
    num_rewards = len(run.settings.rewards.train)
    return (
        f"per-sample adapter gradients up to {gradient_bytes / 1e6:.0f} MB at a time, "
        f"{num_rewards} accumulators of {adapter_bytes / 1e6:.1f} MB"
    )


def _evaluation_line(run: Run) -> str:
    evaluation, evaluator = run.settings.evaluation, run.evaluator
    every = ""
    if evaluation.every_steps:
        every = f", every {evaluation.every_steps} steps"
    return (
        f"{len(evaluator.prompts)} held-out prompts x {evaluator.images_per_prompt}, "
        f"{evaluation.num_steps} steps of {evaluation.solver}{every}"
    )


def announce_gains(run: Run, workdir: Workdir, console: Console, step: int, seconds: float) -> None:
    """Prints the table of gains over the base model, if there is an evaluation besides it.

    Args:
      run: the run.
      workdir: holds its evaluations.
      console: the terminal.
      step: optimiser steps done.
      seconds: that the command took.
    """
    records = workdir.read(workdir.evaluations)
    # The first is that of the base model.
    if len(records) < 2:
        return
    base, last = records[0], records[-1]
    rewards = run.settings.rewards
    rows = []
    for name in (*rewards.train, *rewards.heldout):
        label = f"{name} (never trained)" if name in rewards.heldout else name
        rows.append(_gain_row(name, label, base, last))
    console.say(
        f"\nbefore and after {step} steps, {last['num_prompts']} held-out prompts, gain with 95 % "
        f"bootstrap interval ({duration(seconds)} in all):"
    )
    samples = run.size.samples
    console.table(rows, ("reward", "before", "after", "gain", samples, ""))
    for rates in last.get("joint", {}).values():
        console.say(_joint_line(rates, samples))


def _joint_line(rates: Mapping[str, Any], samples: str) -> str:
    """Shares of samples above, and below, the base model's on all rewards of a set at once."""
    names = rates["rewards"]
    if not rates["count"]:
        return f"no {samples} with scores of {joined(names)}"
    shares = []
    for rate, words in (("domination", "above"), ("collapse", "below")):
        share = rates[rate]
        shares.append(f"{share['mean']:.1%} {words} ({share['low']:.1%} to {share['high']:.1%})")
    return (
        f"against the base model's {samples} on all of {joined(names)} at once: {', '.join(shares)} of "
        f"{rates['count']} {samples}"
    )


def _gain_row(
    name: str, label: str, base: Mapping[str, Any], last: Mapping[str, Any]
) -> tuple[str, ...]:
    """One reward's means before and after, its gain, and whether that is clear."""
    gain = last["gain"][name]
    # JSON has no NaN: a mean over nothing is null.
    if gain["mean"] is None:
        return label, "-", "-", "no valid sample", "", ""
    before, after = base["scores"][name], last["scores"][name]
    # A gain is clear where its whole interval is on one side of zero.
    verdict = "not clear"
    if gain["low"] > 0:
        verdict = "up"
    elif gain["high"] < 0:
        verdict = "down"
    change = shown(gain["mean"], gain["low"], gain["high"], sign=True)
    return label, shown(before["mean"]), shown(after["mean"]), change, str(after["count"]), verdict
