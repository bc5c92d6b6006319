"""The README.md of an exported adapter: what the hub shows and indexes, from the records of the run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from marble_jax.families.descriptions import DiffusersNames, Licence, Size
from marble_jax.programs.locations import SHIPPED
from marble_jax.programs.markdown import code, plain
from marble_jax.report.records import Records, step_of
from marble_jax.trainable.lora import LoraSpec

NUM_IMAGES = 4
UPSTREAM_STRENGTH = (32, 64.0)
"""Rank and alpha that MARBLE's `evaluation.py --checkpoint_path` takes for granted."""

_TAGS_BEFORE = ("lora", "diffusers", "peft")
_TAGS_AFTER = ("reinforcement-learning", "marble")
_POLICIES = {
    "ema": "averaged policy, the one that is evaluated",
    "current": "policy that the optimiser updates",
    "rollout": "policy that drew the training images",
    "best": "averaged policy with the best evaluation",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card says, with the records of the run.

    Attributes:
      name: of the run.
      base: hub id of the base model, the name of a shipped one, or its directory's name.
      on_hub: whether `base` is a hub id.
      embedded: whether it is a pipeline that ships with this package.
      diffusers: what the family's models are called in diffusers.
      policy: the exported policy, a key of `_POLICIES`.
      step: optimiser steps it was trained for.
      spec: rank, alpha and targets.
      num_layers: adapted layers.
      num_values: numbers in the adapter.
      size: of the images in training.
      max_sequence_length: tokens a prompt in training.
      embedded_guidance: guidance scale that the model took as an input in training; None for a model that takes none.
      guidance: classifier-free guidance scale of the samples trained on; 1 for none.
      solver: that draws evaluations.
      num_steps: of that solver.
      seed: of the evaluations' noise.
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
    embedded_guidance: float | None
    guidance: float
    solver: str
    num_steps: int
    seed: int
    records: Records

    @property
    def licence(self) -> Licence | None:
        """Licence of the base model; None where it is not one of the models whose licence is known."""
        licence = self.diffusers.licence
        if licence is None or not self.on_hub:
            return None
        owner, _, _ = self.base.partition("/")
        return licence if owner == licence.owner else None

    @property
    def base_link(self) -> str:
        """The base model in Markdown, as a link where it is on the hub."""
        return f"[{self.base}](https://huggingface.co/{self.base})"


@dataclasses.dataclass(frozen=True)
class ShownImages:
    """One prompt's images in a card.

    Attributes:
      prompt: the text.
      before: name of the base model's image in the folder.
      after: name of the exported policy's image in the folder.
    """

    prompt: str
    before: str
    after: str


def model_card(
    facts: Facts, checks: Mapping[str, Any] | None, merged: bool
) -> tuple[str, dict[str, epath.Path]]:
    """Returns the text of a card, and the images it shows: {name in the folder: file}.

    Args:
      facts: what to say.
      checks: result of the verification; None if there was none.
      merged: whether the folder holds merged weights.
    """
    evaluation = evaluation_of(facts)
    shown: list[ShownImages] = []
    files: dict[str, epath.Path] = {}
    if evaluation is not None:
        shown, files = _images(facts, step_of(evaluation))
    parts = [
        _header(facts, shown),
        _introduction(facts),
        _results(facts, evaluation),
        _strip(shown, facts.size.samples),
        _usage(facts, merged),
        _verified(checks),
        _licence(facts),
    ]
    return "\n".join(part for part in parts if part), files


def evaluation_of(facts: Facts) -> dict[str, Any] | None:
    """Returns the newest evaluation of trained weights up to the exported step."""
    newest = None
    for evaluation in facts.records.trained:
        if step_of(evaluation) <= facts.step:
            newest = evaluation
    return newest


def _header(facts: Facts, shown: list[ShownImages]) -> str:
    """What the hub reads: YAML between two lines of dashes."""
    lines = ["---"]
    if facts.on_hub:
        lines += [f"base_model: {facts.base}", "base_model_relation: adapter"]
    lines += ["library_name: diffusers", f"pipeline_tag: {facts.diffusers.task}"]
    if facts.embedded:
        lines.append("license: apache-2.0")
    elif facts.licence is not None:
        lines += [
            "license: other",
            f"license_name: {facts.licence.name}",
            f"license_link: https://huggingface.co/{facts.base}/blob/main/{facts.licence.file}",
        ]
    lines.append("tags:")
    diffusers = facts.diffusers
    for tag in (*_TAGS_BEFORE, diffusers.tag, diffusers.task, *_TAGS_AFTER):
        lines.append(f"- {tag}")
    if shown:
        lines.append("widget:")
    for images in shown:
        # A prompt may hold anything; a JSON string is a YAML string too.
        text = json.dumps(images.prompt, ensure_ascii=False)
        lines += [f"- text: {text}", "  output:", f"    url: {images.after}"]
    return "\n".join([*lines, "---", ""])


def _guidance_words(facts: Facts) -> str:
    """What the run's samples were guided by."""
    if facts.guidance > 1:
        return f"on samples with classifier-free guidance {facts.guidance:g}"
    return "without classifier-free guidance"


def _introduction(facts: Facts) -> str:
    """What the adapter is, and how it was trained."""
    records, spec = facts.records, facts.spec
    lines = [
        f"# {plain(facts.name)}",
        "",
        f"LoRA adapter for {_base_in_words(facts)}: rank {spec.rank}, alpha {spec.alpha:g}, "
        f"{facts.num_layers} layers, {facts.num_values:,} values. Trained with reinforcement learning "
        f"on several rewards at once (MARBLE, arXiv 2605.06507, by marble_jax), {_guidance_words(facts)}.",
        "",
        f"- policy: {facts.policy}, the {_POLICIES[facts.policy]}; after step {facts.step}",
    ]
    if records.run.get("method"):
        lines.append(f"- method: {plain(records.run['method'])}")
    if records.rewards:
        lines.append(f"- rewards: {', '.join(map(plain, records.rewards))}")
    if records.heldout:
        lines.append(f"- measured, never trained on: {', '.join(map(plain, records.heldout))}")
    targets = ", ".join(code(target) for target in spec.targets)
    lines += [
        f"- size: {facts.size} px; tokens a prompt: {facts.max_sequence_length}",
        f"- adapted layers: {targets}",
        "",
    ]
    return "\n".join(lines)


def _base_in_words(facts: Facts) -> str:
    if facts.on_hub:
        return facts.base_link
    if facts.embedded:
        return "the pipeline that ships with marble_jax"
    return code(facts.base)


def _results(facts: Facts, evaluation: dict[str, Any] | None) -> str:
    """The table of scores before and after."""
    records = facts.records
    if evaluation is None or records.base is None:
        return "## Results\n\nNot evaluated.\n"
    evaluated_policy = ""
    if facts.policy not in ("ema", "best") or step_of(evaluation) != facts.step:
        evaluated_policy = (
            f" These are the scores of the averaged policy after step {step_of(evaluation)}."
        )
    lines = [
        "## Results",
        "",
        f"{evaluation.get('num_prompts', '?')} held-out prompts, the same noise before and after "
        f"({plain(facts.solver)}, steps: {facts.num_steps}, seed: {facts.seed}); gain with 95 % bootstrap "
        "interval over the prompts."
        f"{evaluated_policy}",
        "",
        f"| reward | base model | with the adapter | gain | {records.samples} with a score |",
        "|---|---|---|---|---|",
    ]
    for name in records.names:
        lines.append(_result_row(records, evaluation, name))
    return "\n".join([*lines, ""])


def _result_row(records: Records, evaluation: dict[str, Any], name: str) -> str:
    """One reward's line of the table."""
    before = records.score(records.base, name)
    after = records.score(evaluation, name)
    gain = records.score(evaluation, name, "gain")
    label, change, count = plain(name), "-", "-"
    if name in records.heldout:
        label += " (never trained on)"
    if not math.isnan(gain.mean):
        change = f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
    if not math.isnan(after.count):
        count = f"{after.count:.0f}"
    return f"| {label} | {_figure(before.mean)} | {_figure(after.mean)} | {change} | {count} |"


def _images(facts: Facts, step: int) -> tuple[list[ShownImages], dict[str, epath.Path]]:
    """The first prompts that have images both of the base model and after `step`, and the files by name."""
    shown: list[ShownImages] = []
    files: dict[str, epath.Path] = {}
    for number, strip in enumerate(facts.records.strips):
        by_step = dict(strip.images)
        if len(shown) == NUM_IMAGES:
            break
        if 0 not in by_step or step not in by_step:
            continue
        before, after = f"images/{number:02d}_before.png", f"images/{number:02d}_after.png"
        files[before], files[after] = by_step[0], by_step[step]
        shown.append(ShownImages(strip.prompt, before, after))
    return shown, files


def _strip(shown: list[ShownImages], samples: str) -> str:
    """The table of samples, which are images or clips."""
    if not shown:
        return ""
    rows = ["| prompt | base model | with the adapter |", "|---|---|---|"]
    for images in shown:
        rows.append(
            f"| {plain(images.prompt)} | ![before]({images.before}) | ![after]({images.after}) |"
        )
    return "\n".join([f"## {samples.capitalize()}", "", "Same prompt, same noise.", "", *rows, ""])


def _usage(facts: Facts, merged: bool) -> str:
    """How each library opens the folder."""
    parts = [_usage_of_lora(facts)]
    if merged:
        parts.append(_usage_of_merged(facts))
    parts.append(_usage_of_single_files(facts.spec))
    return "\n".join(parts)


def _usage_of_lora(facts: Facts) -> str:
    pipeline, size = facts.diffusers.pipeline, facts.size
    guidance = facts.embedded_guidance or facts.guidance
    # In the quotes of JSON, which are Python's, too.
    opening, place = "", json.dumps(facts.base)
    if facts.embedded:
        opening = "from importlib.resources import files\n"
        place = f'str(files("marble_jax") / "{SHIPPED[facts.base]}/pipeline")'
    # Pipelines of clips return frames and take their number; those of images know neither.
    result, sample, frames = "image", "images", ""
    if facts.diffusers.num_frames is not None:
        result, sample = "frames", "frames"
        frames = f"{facts.diffusers.num_frames}={size.num_frames}, "
    call = (
        f'{result} = pipe("...", num_inference_steps=40, guidance_scale={guidance}, {frames}height={size.height}, '
        f"width={size.width}, max_sequence_length={facts.max_sequence_length}).{sample}[0]"
    )
    return f"""## Use

`DIR` is this folder, or its name on the hub.

```python
{opening}import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({place}, torch_dtype=torch.bfloat16)
pipe.load_lora_weights("DIR", weight_name="pytorch_lora_weights.safetensors")
{call}
```

With PEFT, in place of `load_lora_weights`:

```python
from peft import PeftModel

pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "DIR").merge_and_unload()
```
"""


def _usage_of_merged(facts: Facts) -> str:
    transformer = facts.diffusers.transformer
    return f"""Merged weights, without any LoRA code:

```python
from diffusers import {transformer}

pipe.transformer = {transformer}.from_pretrained("DIR", subfolder="transformer", torch_dtype=torch.bfloat16)
```
"""


def _usage_of_single_files(spec: LoraSpec) -> str:
    other_strength = ""
    if (spec.rank, spec.alpha) != UPSTREAM_STRENGTH:
        other_strength = " (not this adapter's: use its `--lora_hf_path`)"
    return f"""ComfyUI and other readers of single files: take `pytorch_lora_weights.safetensors`, strength 1.
alpha / rank = {spec.scale:g} is part of its matrices, as these readers (and diffusers) run a file without alpha
at alpha = rank.
`adapter_model.safetensors` is PEFT's: its strength is in `adapter_config.json`, and without that file it acts at
1/{spec.scale:g} of its strength. `lora/` holds PEFT's files once more, for `evaluation.py --checkpoint_path` of
MARBLE, which assumes rank 32 and alpha 64{other_strength}.
"""


def _verified(checks: Mapping[str, Any] | None) -> str:
    """The table of a verification; empty if there was none."""
    if not checks:
        return ""
    lines = [
        "## Verified",
        "",
        f"One prompt drawn in {checks['num_steps']} steps in float32 and compared with the trainer's "
        f"own image, which the adapter changes by up to {checks['effect']:.3f} a pixel (of 1). "
        "Strength is the share of that change that the reader makes: 1 is right.",
        "",
        "| read by | largest difference a pixel | strength |",
        "|---|---|---|",
    ]
    for name, check in checks["readers"].items():
        lines.append(f"| {plain(name)} | {check['difference']:.2g} | {check['strength']:.3f} |")
    return "\n".join([*lines, ""])


def _licence(facts: Facts) -> str:
    """The licence of the base model, as far as it is known."""
    if facts.embedded:
        return "## Licence\n\nApache-2.0, as the pipeline it was trained on.\n"
    if facts.licence is not None:
        return f"## Licence\n\n{facts.licence.sentence.format(base=facts.base_link)}\n"
    return (
        "## Licence\n\nAn adapter is derived from its base model; the licence of the base model "
        "applies. Add it as `license:` at the top before publishing.\n"
    )


def _figure(value: float) -> str:
    """Four decimals; a dash for what was not measured."""
    if math.isnan(value):
        return "-"
    return f"{value:.4f}"
