"""The README.md of an exported adapter: what the hub shows and indexes, from the records of the run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from marble_jax.families.base import DiffusersNames, Size
from marble_jax.report.records import Records, step_of
from marble_jax.trainable.lora import LoraSpec

NUM_IMAGES = 4
_POLICIES = {
    "ema": "averaged policy, the one that is evaluated",
    "current": "policy that the optimiser updates",
    "rollout": "policy that drew the training images",
    "best": "averaged policy with the best evaluation",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card says besides the records.

    Attributes:
      name: of the run.
      base: hub id of the base model, "embedded", or its directory's name.
      on_hub: whether `base` is a hub id.
      embedded: whether it is the pipeline that ships with this package.
      diffusers: what the family's models are called in diffusers.
      policy: the exported policy, a key of `_POLICIES`.
      step: optimiser steps it was trained for.
      spec: rank, alpha and targets.
      num_layers: adapted layers.
      num_values: numbers in the adapter.
      size: of the images in training.
      max_sequence_length: tokens a prompt in training.
      records: of the run.
    """

    name: str
    base: str
    on_hub: bool
    embedded: bool
    diffusers: DiffusersNames
    policy: str
    step: int
    spec: LoraSpec
    num_layers: int
    num_values: int
    size: Size
    max_sequence_length: int
    records: Records


def model_card(
    facts: Facts, checks: Mapping[str, Any] | None, merged: bool
) -> tuple[str, dict[str, epath.Path]]:
    """The text, and the images it shows: {name in the folder: file}.

    Args:
      facts: what to say.
      checks: result of the verification; None if there was none.
      merged: whether the folder holds merged weights.
    """
    evaluation = evaluation_of(facts)
    shown, images = _images(facts, evaluation)
    parts = [
        _header(facts, shown),
        _introduction(facts),
        _results(facts, evaluation),
        _strip(shown),
        _usage(facts, merged),
        _verified(checks),
        _licence(facts),
    ]
    return "\n".join(part for part in parts if part), images


def evaluation_of(facts: Facts) -> dict[str, Any] | None:
    """The newest evaluation of trained weights up to the exported step."""
    found = [e for e in facts.records.trained if step_of(e) <= facts.step]
    return found[-1] if found else None


def _header(facts: Facts, shown: list[tuple[str, str, str]]) -> str:
    lines = ["---"]
    if facts.on_hub:
        lines += [f"base_model: {facts.base}", "base_model_relation: adapter"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image"]
    if facts.embedded:
        lines.append("license: apache-2.0")
    elif facts.on_hub and facts.base.startswith("stabilityai/"):
        lines += [
            "license: other",
            "license_name: stabilityai-ai-community",
            f"license_link: https://huggingface.co/{facts.base}/blob/main/LICENSE.md",
        ]
    lines += [
        "tags:",
        *(
            f"- {tag}"
            for tag in (
                "lora",
                "diffusers",
                "peft",
                facts.diffusers.tag,
                "text-to-image",
                "reinforcement-learning",
                "marble",
            )
        ),
    ]
    if shown:
        lines.append("widget:")
        for prompt, _, after in shown:
            lines += [f"- text: {json.dumps(prompt)}", "  output:", f"    url: {after}"]
    return "\n".join([*lines, "---", ""])


def _introduction(facts: Facts) -> str:
    run = facts.records.run
    base = (
        f"[{facts.base}](https://huggingface.co/{facts.base})"
        if facts.on_hub
        else ("the pipeline that ships with marble_jax" if facts.embedded else f"`{facts.base}`")
    )
    lines = [
        f"# {facts.name}",
        "",
        f"LoRA adapter for {base}: rank {facts.spec.rank}, alpha {facts.spec.alpha:g}, {facts.num_layers} layers, "
        f"{facts.num_values:,} values. Trained with reinforcement learning on several rewards at once (MARBLE, "
        "arXiv 2605.06507, by marble_jax), without classifier-free guidance.",
        "",
        f"- policy: {facts.policy}, the {_POLICIES[facts.policy]}; after step {facts.step}",
    ]
    if run.get("method"):
        lines.append(f"- method: {run['method']}")
    if facts.records.rewards:
        lines.append(f"- rewards: {', '.join(facts.records.rewards)}")
    if facts.records.heldout:
        lines.append(f"- measured, never trained on: {', '.join(facts.records.heldout)}")
    lines += [
        f"- size: {facts.size} px; tokens a prompt: {facts.max_sequence_length}",
        f"- adapted layers: {', '.join(f'`{t}`' for t in facts.spec.targets)}",
        "",
    ]
    return "\n".join(lines)


def _results(facts: Facts, evaluation: dict[str, Any] | None) -> str:
    records = facts.records
    if evaluation is None or records.base is None:
        return "## Results\n\nNot evaluated.\n"
    config = records.run.get("config") or {}
    how = ", ".join(
        text + str(config[key])
        for key, text in (
            ("evaluation.solver", ""),
            ("evaluation.num_steps", "steps: "),
            ("evaluation.seed", "seed: "),
        )
        if key in config
    )
    of = (
        ""
        if facts.policy in ("ema", "best") and step_of(evaluation) == facts.step
        else (f" These are the scores of the averaged policy after step {step_of(evaluation)}.")
    )
    lines = [
        "## Results",
        "",
        f"{evaluation.get('num_prompts', '?')} held-out prompts, the same noise before and after ({how}); gain "
        f"with 95 % bootstrap interval over the prompts.{of}",
        "",
        "| reward | base model | with the adapter | gain | prompts |",
        "|---|---|---|---|---|",
    ]
    for name in records.names:
        before, after = records.score(records.base, name), records.score(evaluation, name)
        gain = records.score(evaluation, name, "gain")
        label = name + (" (never trained on)" if name in records.heldout else "")
        change = (
            "-"
            if math.isnan(gain.mean)
            else f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        )
        count = "-" if math.isnan(after.count) else f"{after.count:.0f}"
        lines.append(
            f"| {label} | {_figure(before.mean)} | {_figure(after.mean)} | {change} | {count} |"
        )
    return "\n".join([*lines, ""])


def _images(
    facts: Facts, evaluation: dict[str, Any] | None
) -> tuple[list[tuple[str, str, str]], dict[str, epath.Path]]:
    """(prompt, name before, name after) of the images shown, and the files by name."""
    shown, files = [], {}
    for number, strip in enumerate(facts.records.strips if evaluation else ()):
        steps = dict(strip.images)
        if 0 in steps and step_of(evaluation) in steps and len(shown) < NUM_IMAGES:
            before, after = (f"images/{number:02d}_{when}.png" for when in ("before", "after"))
            files |= {before: steps[0], after: steps[step_of(evaluation)]}
            shown.append((strip.prompt, before, after))
    return shown, files


def _strip(shown: list[tuple[str, str, str]]) -> str:
    if not shown:
        return ""
    rows = ["| prompt | base model | with the adapter |", "|---|---|---|"]
    for prompt, before, after in shown:
        text = " ".join(prompt.replace("|", "\\|").split())
        rows.append(f"| {text} | ![before]({before}) | ![after]({after}) |")
    return "\n".join(["## Images", "", "Same prompt, same noise.", "", *rows, ""])


def _usage(facts: Facts, merged: bool) -> str:
    base = facts.base
    opening = ""
    if facts.embedded:
        opening, place = (
            "from importlib.resources import files\n",
            'str(files("marble_jax") / "embedded/pipeline")',
        )
    else:
        place = f'"{base}"'
    call = (
        f'image = pipe("...", num_inference_steps=40, guidance_scale=1.0, height={facts.size.height}, '
        f"width={facts.size.width}, max_sequence_length={facts.max_sequence_length}).images[0]"
    )
    text = f"""## Use

`DIR` is this folder, or its name on the hub.

```python
{opening}import torch
from diffusers import {facts.diffusers.pipeline}

pipe = {facts.diffusers.pipeline}.from_pretrained({place}, torch_dtype=torch.bfloat16)
pipe.load_lora_weights("DIR", weight_name="pytorch_lora_weights.safetensors")
{call}
```

With PEFT, in place of `load_lora_weights`:

```python
from peft import PeftModel

pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "DIR").merge_and_unload()
```
"""
    if merged:
        text += f"""
Merged weights, without any LoRA code:

```python
from diffusers import {facts.diffusers.transformer}

pipe.transformer = {facts.diffusers.transformer}.from_pretrained("DIR", subfolder="transformer", torch_dtype=torch.bfloat16)
```
"""
    fits = (facts.spec.rank, facts.spec.alpha) == (32, 64.0)
    return (
        text
        + f"""
ComfyUI and other readers of single files: take `pytorch_lora_weights.safetensors`, strength 1. alpha / rank =
{facts.spec.scale:g} is part of its matrices, as these readers (and diffusers) run a file without alpha at alpha = rank.
`adapter_model.safetensors` is PEFT's: its strength is in `adapter_config.json`, and without that file it acts at
1/{facts.spec.scale:g} of its strength. `lora/` holds PEFT's files once more, for `evaluation.py --checkpoint_path` of
MARBLE, which assumes rank 32 and alpha 64{"" if fits else " (not this adapter's: use its `--lora_hf_path`)"}.
"""
    )


def _verified(checks: Mapping[str, Any] | None) -> str:
    if not checks:
        return ""
    lines = [
        "## Verified",
        "",
        f"One prompt drawn in {checks['num_steps']} steps in float32 and compared with the trainer's own image, "
        f"which the adapter changes by up to {checks['effect']:.3f} a pixel (of 1). Strength is the share of that "
        "change that the reader makes: 1 is right.",
        "",
        "| read by | largest difference a pixel | strength |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {c['difference']:.2g} | {c['strength']:.3f} |"
        for name, c in checks["readers"].items()
    ]
    return "\n".join([*lines, ""])


def _licence(facts: Facts) -> str:
    if facts.embedded:
        return "## Licence\n\nApache-2.0, as the pipeline it was trained on.\n"
    if facts.on_hub and facts.base.startswith("stabilityai/"):
        return (
            "## Licence\n\nDerived from a Stability AI model: the Stability AI Community License of "
            f"[{facts.base}](https://huggingface.co/{facts.base}) applies to this adapter and to what is made with "
            "it.\n"
        )
    return (
        "## Licence\n\nAn adapter is derived from its base model; the licence of the base model applies. Add it as "
        "`license:` at the top before publishing.\n"
    )


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
