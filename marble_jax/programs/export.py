"""A run's adapter as one folder that other programs open, each at the right strength.

    pytorch_lora_weights.safetensors            diffusers' load_lora_weights, ComfyUI
    adapter_config.json, adapter_model.*        PEFT, upstream's evaluation.py --lora_hf_path
    lora/                                       the same two, where upstream's evaluation.py --checkpoint_path looks
    kohya.safetensors, comfyui.safetensors      the names of the model's original repository, when asked for
    transformer/                                merged weights for from_pretrained, when asked for
    README.md, images/, export.json             model card with metrics and images; the same for programs

A folder is filled beside its place and takes it when it is complete (and, if asked for, verified).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from etils import epath

from marble_jax import distributed, platform
from marble_jax.config import Settings
from marble_jax.console import Console, quantity
from marble_jax.convert.lora_files import merge_transformer
from marble_jax.convert.lora_styles import STYLES, styled_lora
from marble_jax.convert.writing import KEEP
from marble_jax.errors import InputError, one_of
from marble_jax.families.base import Family
from marble_jax.families.descriptions import NetworkOptions
from marble_jax.programs.export_folder import (
    exported_pairs,
    facts_of,
    new_folder,
    write_card,
    write_lora,
)
from marble_jax.programs.model_card import Facts
from marble_jax.programs.open_model import locate
from marble_jax.programs.run_state import restore_policy, run_settings, trained_steps
from marble_jax.programs.uploads import Uploads
from marble_jax.programs.verify import Drawing, check_packages, verify
from marble_jax.storage.files import location
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable import lora
from marble_jax.training.state import TrainState
from marble_jax.types import Adapter
from marble_jax.validation import short
from marble_jax.weights.hub_upload import push_folder, ready_repository

PROMPT = "a photo of a red apple on a wooden table"
"""What a verification draws when the run has no images of its own."""
_STEP = re.compile(r"step_(\d+)")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a run is exported.

    Attributes:
      policy: one of `policies.TRAINED_POLICIES`.
      step: of the checkpoint; the newest if None.
      styles: keys of `convert.lora_styles.STYLES`; a file of that name is written for each.
      merge: also write the merged transformer.
      dtype: of the merged weights, "float32" and so on; the base model's own if None.
      verify: open the result with other libraries and compare, before it takes its place.
      overwrite: replace an earlier export.
      prompt: what to draw for the verification; one of the run's if empty.
      push_to_hub: USER/NAME of the Hub repository that the folder is uploaded to; empty for none.
      private: whether that repository is, where it is new.
    """

    policy: str = "ema"
    step: int | None = None
    styles: tuple[str, ...] = ()
    merge: bool = False
    dtype: str | None = None
    verify: bool = False
    overwrite: bool = False
    prompt: str = ""
    push_to_hub: str = ""
    private: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for a prompt that nothing would draw."""
        if self.prompt and not self.verify:
            raise InputError(
                f"--prompt: expected with --verify, which draws it; received {short(self.prompt)} alone"
            )


def export_run(path: str, out: str, options: ExportOptions) -> None:
    """Exports a policy of a training run as one folder.

    Args:
      path: workdir of the run.
      out: the new folder.
      options: what and how.

    Raises:
      InputError: no such run, checkpoint or policy; a place that is taken; a verification that failed, or a Hub
        repository that may not be written. `out` is then as it was; it is complete where the upload itself failed.
    """
    if options.verify:
        check_packages()
    for style in options.styles:
        one_of("--styles", style, STYLES)
    if options.merge and "://" in out:
        raise InputError(f"--merge: expected an --out on this machine; received {out!r}")
    platform.keep_compilations()
    console, workdir = Console(), Workdir(path)
    settings = run_settings(workdir)
    if options.push_to_hub:
        _check_push(options, out)
    with new_folder(location("--out", out), options.overwrite) as folder:
        root, family = locate(settings.model)
        spec = lora.lora_spec(settings.lora, family)
        shapes = family.outline(root, NetworkOptions()).params
        adapter, step = restore_policy(
            settings, workdir, family, shapes, options.policy, options.step
        )
        pairs = exported_pairs(family, adapter, shapes, spec)
        facts = facts_of(settings, family, workdir, pairs, options.policy, step)
        console.say(
            f"export: {workdir.path}, {options.policy} after step {step}: rank {spec.rank}, alpha "
            f"{spec.alpha:g}, {len(pairs)} layers, {quantity(facts.num_values)} values"
        )
        write_lora(folder, pairs, facts, family)
        for style in options.styles:
            content = styled_lora(pairs, spec, family.formats, shapes, style)
            (folder / f"{style}.safetensors").write_bytes(content)
        if options.merge:
            target = Path(folder / "transformer")
            dtype = options.dtype or KEEP
            merge_transformer(root, target, pairs, spec.scale, family.formats, console, dtype)
        checks = None
        # Before the folder takes its place: what does not verify never shows up there.
        if options.verify:
            drawing = _drawing(options, root, family, facts)
            checks = verify(folder, drawing, adapter, console)
        write_card(folder, facts, checks)
    if options.push_to_hub:
        message = f"{options.policy} after step {step} of {settings.name}"
        console.say(f"Hub: {push_folder(Path(out), options.push_to_hub, message)}")
    _say_how_to_open(console, out, family, options.merge)


def _check_push(options: ExportOptions, out: str) -> None:
    """Makes the repository ready, before the work whose result goes there."""
    if "://" in out:
        raise InputError(f"--push_to_hub: expected an --out on this machine; received {out!r}")
    ready_repository(options.push_to_hub, options.private)


def _drawing(options: ExportOptions, root: Path, family: Family, facts: Facts) -> Drawing:
    """What a verification draws: the prompt asked for, or the first that the run shows."""
    prompt = options.prompt
    if not prompt and facts.records.strips:
        prompt = facts.records.strips[0].prompt
    return Drawing(
        root,
        family,
        prompt or PROMPT,
        facts.size,
        facts.max_sequence_length,
        facts.spec.scale,
        facts.embedded_guidance,
    )


def _say_how_to_open(console: Console, out: str, family: Family, merged: bool) -> None:
    """Prints how each library opens the folder."""
    lora_file = "pytorch_lora_weights.safetensors"
    rows = [
        ("diffusers", f'pipe.load_lora_weights("{out}", weight_name="{lora_file}")'),
        ("PEFT", f'PeftModel.from_pretrained(pipe.transformer, "{out}")'),
    ]
    if merged:
        call = f'{family.diffusers.transformer}.from_pretrained("{out}", subfolder="transformer")'
        rows.append(("merged", call))
    rows.append(("ComfyUI", f"{out}/{lora_file}, strength 1"))
    rows.append(("model card", f"{out}/README.md"))
    console.table(rows)


class PeriodicExports:
    """Exports of a run while it trains: `exports/step_000100` beside the checkpoints.

    Args:
      settings: of the run.
      family: of its model.
      workdir: the run.
      shapes: parameters of the transformer.
      console: the terminal.
    """

    def __init__(
        self, settings: Settings, family: Family, workdir: Workdir, shapes: Any, console: Console
    ):
        self._settings, self._family = settings, family
        self._workdir, self._shapes, self._console = workdir, shapes, console
        self.folder = workdir.path / "exports"
        self._uploads: Uploads | None = None
        if settings.export.push_to_hub and distributed.is_first():
            hub = settings.export.push_to_hub, settings.export.private
            self._uploads = Uploads(*hub, console.say)

    def __call__(self, state: TrainState) -> None:
        """Exports a state on the first process; a disk without room is said and does not stop the training."""
        policy = self._settings.export.policy
        # All processes have to ask for arrays that span them, before the first one writes.
        adapter = distributed.to_host(getattr(state, policy))
        if not distributed.is_first():
            return
        try:
            folder = self.write(state, adapter)
            self._console.say(f"export: {folder}")
            if self._uploads is not None:
                self._uploads.push(folder, f"{policy} after step {int(state.step)}")
        except InputError as error:
            self._console.say(
                f"export after step {int(state.step)} failed, training goes on: {error}"
            )

    def write(self, state: TrainState, adapter: Adapter) -> epath.Path:
        """Writes the export of a state, and drops those beyond `export.keep`.

        Args:
          state: after a step.
          adapter: the exported policy, on the host.

        Raises:
          InputError: no best policy yet, or a place that cannot be written.
        """
        settings, family = self._settings, self._family
        step, policy = int(state.step), settings.export.policy
        trained = trained_steps(state, policy, "export.policy", str(self._workdir.path))
        spec = lora.lora_spec(settings.lora, family)
        pairs = exported_pairs(family, adapter, self._shapes, spec)
        facts = facts_of(settings, family, self._workdir, pairs, policy, trained)
        target = self.folder / f"step_{step:06d}"
        # A resumed run comes by a step again.
        with new_folder(target, overwrite=True) as folder:
            write_lora(folder, pairs, facts, family)
            write_card(folder, facts)
        for surplus in self.steps()[: -settings.export.keep]:
            (self.folder / f"step_{surplus:06d}").rmtree()
        return target

    def close(self, hurried: bool = False) -> None:
        """Waits for the last upload; not for long where the run is being stopped."""
        if self._uploads is not None:
            self._uploads.close(hurried)

    def steps(self) -> list[int]:
        """Steps of the exports that are there."""
        if not self.folder.exists():
            return []
        steps = []
        for path in self.folder.iterdir():
            # Folders that are being filled, or were left behind by a kill, have other names.
            match = _STEP.fullmatch(path.name)
            if match is not None:
                steps.append(int(match[1]))
        return sorted(steps)
