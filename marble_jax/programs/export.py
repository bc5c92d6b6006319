"""A run's adapter as one folder that other programs open, each at the right strength.

    pytorch_lora_weights.safetensors            diffusers' load_lora_weights, ComfyUI
    adapter_config.json, adapter_model.*        PEFT, upstream's evaluation.py --lora_hf_path
    lora/                                       the same two, where upstream's evaluation.py --checkpoint_path looks
    transformer/                                merged weights for from_pretrained, when asked for
    README.md, images/, export.json             model card with metrics and images; the same for programs

A folder is filled beside its place and takes it when it is complete (and, if asked for, verified).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from marble_jax import distributed, platform
from marble_jax.console import Console, quantity
from marble_jax.convert.lora import PEFT_CONFIG, PEFT_FILE
from marble_jax.convert.lora_files import Pairs, lora_files, merge_transformer
from marble_jax.convert.writing import KEEP
from marble_jax.errors import InputError
from marble_jax.families.sd3 import transformer
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.pipeline import find_model
from marble_jax.programs import build
from marble_jax.programs.model_card import Facts, model_card
from marble_jax.programs.sample import run_adapter, run_config
from marble_jax.programs.verify import Drawing, check_packages, verify
from marble_jax.report.records import read_records
from marble_jax.storage.files import location
from marble_jax.storage.workdir import Workdir, jsonable
from marble_jax.trainable import lora
from marble_jax.training.state import TrainState
from marble_jax.types import Adapter
from marble_jax.version import VERSION
from marble_jax.weights.component import open_component
from marble_jax.weights.hub import HUB_NAME

POLICIES = {"ema": "ema", "current": "current", "rollout": "rollout", "best": "best"}
"""Names of the policies outside, and the fields of the training state that hold them."""
RECORD = "export.json"
PROMPT = "a photo of a red apple on a wooden table"
"""What a verification draws when the run has no images of its own."""
_STEP = re.compile(r"step_(\d+)")


@contextmanager
def new_folder(target: epath.Path, overwrite: bool = False) -> Iterator[epath.Path]:
    """A folder beside `target` to fill; it takes the place of `target` at the end, and vanishes on an error.

    Args:
      target: where it goes.
      overwrite: replace an earlier export that is there.

    Raises:
      InputError: there is something already that is not to be replaced, or the place cannot be written.
    """
    partial, old = (target.parent / f".{target.name}.{ending}" for ending in ("partial", "old"))
    if old.exists() and not target.exists():  # a kill came between the two renames below
        old.rename(target)
    if target.exists():
        empty = target.is_dir() and not any(target.iterdir())
        if not empty and not overwrite:
            raise InputError(
                f"{target}: expected a new folder; received one that exists (--overwrite replaces it)"
            )
        if not empty and not (target / RECORD).exists():
            raise InputError(
                f"{target}: expected an earlier export to overwrite (with {RECORD}); received something "
                "else, which is left alone"
            )
    try:
        for place in (partial, old):
            if place.exists():
                place.rmtree()
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
        if old.exists():
            old.rmtree()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{target}: expected a writable place with room; received {reason}"
        ) from error
    finally:
        if partial.exists():
            partial.rmtree()


def facts_of(
    config: ml_collections.ConfigDict, workdir: Workdir, pairs: Pairs, which: str, step: int
) -> Facts:
    """What is said about an export in its card and its record."""
    path = str(config.model.path)
    on_hub = HUB_NAME.fullmatch(path) is not None and not epath.Path(path).is_dir()
    return Facts(
        name=config.name,
        base=path if on_hub else epath.Path(path).name,
        on_hub=on_hub,
        embedded=path == build.EMBEDDED,
        which=which,
        step=step,
        spec=build.lora_spec(config),
        num_layers=len(pairs),
        num_values=sum(a.size + b.size for a, b in pairs.values()),
        height=config.model.height,
        width=config.model.width,
        tokens=config.model.max_sequence_length,
        records=read_records(workdir.path),
    )


def exported_pairs(
    adapter: Adapter, shapes: Any, spec: lora.LoraSpec
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The adapted layers' leaves by name, without the inert ones that only fill up a stacked run."""
    pairs = lora.unstack(adapter)
    return {m.name: pairs[m.name] for m in lora.target_modules(shapes, spec.targets)}


def write_lora(folder: epath.Path, pairs: Pairs, facts: Facts) -> None:
    """The files of the adapter, in an existing folder."""
    for name, content in lora_files(
        pairs, facts.spec, facts.base if facts.on_hub else None
    ).items():
        (folder / name).write_bytes(content)
    (folder / "lora").mkdir()
    for name in (PEFT_CONFIG, PEFT_FILE):
        try:  # one file under two names, where the file system can
            os.link(folder / name, folder / "lora" / name)
        except (OSError, TypeError):
            (folder / name).copy(folder / "lora" / name)


def write_card(folder: epath.Path, facts: Facts, checks: Mapping[str, Any] | None = None) -> None:
    """README.md with its images, and export.json."""
    text, images = model_card(facts, checks, merged=(folder / "transformer").exists())
    for name, file in images.items():
        (folder / name).parent.mkdir(exist_ok=True)
        file.copy(folder / name)
    (folder / "README.md").write_text(text)
    record = {
        "marble_jax": VERSION,
        "run": facts.name,
        "base": facts.base,
        "policy": facts.which,
        "step": facts.step,
        "lora": dataclasses.asdict(facts.spec),
        "num_layers": facts.num_layers,
        "verified": checks,
    }
    (folder / RECORD).write_text(json.dumps(jsonable(record), indent=1) + "\n")


def export_run(
    path: str,
    out: str,
    which: str = "ema",
    step: int | None = None,
    *,
    merge: bool = False,
    dtype: str | None = None,
    verified: bool = False,
    overwrite: bool = False,
    prompt: str = "",
) -> None:
    """Exports a policy of a training run.

    Args:
      path: workdir of the run.
      out: the new folder.
      which: a key of `POLICIES`.
      step: of the checkpoint; the newest if None.
      merge: also write the merged transformer.
      dtype: of the merged weights, "float32" and so on; the base model's own if None.
      verified: open the result with other libraries and compare, before it takes its place.
      overwrite: replace an earlier export at `out`.
      prompt: what to draw for that; one of the run's if empty.

    Raises:
      InputError: no such run, checkpoint or policy; a place that is taken; a verification that failed. `out` is then
        as it was.
    """
    if verified:
        check_packages()
    if merge and "://" in out:
        raise InputError(f"--merge: expected an --out on this machine; received {out!r}")
    platform.keep_compilations()
    console, workdir = Console(), Workdir(path)
    config = run_config(workdir)
    spec = build.lora_spec(config)
    with new_folder(location("--out", out), overwrite) as folder:
        root = find_model(build.place_of(config.model.path, "pipeline"))
        base = open_component(root / "transformer")
        shapes = transformer.abstract_params(transformer.MMDiT(MMDiTConfig.from_dict(base.config)))
        adapter, done = run_adapter(config, workdir, shapes, POLICIES[which], step)
        pairs = exported_pairs(adapter, shapes, spec)
        facts = facts_of(config, workdir, pairs, which, done)
        console.say(
            f"export: {workdir.path}, {which} after step {done}: rank {spec.rank}, alpha {spec.alpha:g}, "
            f"{len(pairs)} layers, {quantity(facts.num_values)} values"
        )
        write_lora(folder, pairs, facts)
        if merge:
            merge_transformer(
                root, Path(folder / "transformer"), pairs, spec.scale, console, dtype or KEEP
            )
        checks = None
        if verified:
            shown = [strip.prompt for strip in facts.records.strips]
            text = prompt or (shown[0] if shown else PROMPT)
            drawing = Drawing(root, text, facts.height, facts.width, facts.tokens, spec.scale)
            checks = verify(folder, drawing, adapter, console)
        write_card(folder, facts, checks)
    console.table(
        [
            (
                "diffusers",
                f'pipe.load_lora_weights("{out}", weight_name="pytorch_lora_weights.safetensors")',
            ),
            ("PEFT", f'PeftModel.from_pretrained(pipe.transformer, "{out}")'),
            *(
                [
                    (
                        "merged",
                        f'SD3Transformer2DModel.from_pretrained("{out}", subfolder="transformer")',
                    )
                ]
                if merge
                else []
            ),
            ("ComfyUI", f"{out}/pytorch_lora_weights.safetensors, strength 1"),
            ("model card", f"{out}/README.md"),
        ]
    )


class PeriodicExports:
    """Exports of a run while it trains: `exports/step_000100` beside the checkpoints.

    Args:
      config: configuration of the run.
      workdir: the run.
      shapes: parameters of the transformer.
      console: the terminal.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: Workdir, shapes: Any, console: Console
    ):
        self._config, self._workdir, self._shapes, self._console = config, workdir, shapes, console
        self.folder = workdir.path / "exports"

    def __call__(self, state: TrainState) -> None:
        """Exports a state on the first process; a disk without room is said and does not stop the training."""
        which = POLICIES[self._config.export.policy]
        state = state.replace(**{which: distributed.to_host(getattr(state, which))})
        if distributed.is_first():
            try:
                self._console.say(f"export: {self.write(state)}")
            except InputError as error:
                self._console.say(
                    f"export after step {int(state.step)} failed, training goes on: {error}"
                )

    def write(self, state: TrainState) -> epath.Path:
        """Writes the export of a state, and drops those beyond `export.keep`.

        Raises:
          InputError: no best policy yet, or a place that cannot be written.
        """
        config, step, which = self._config, int(state.step), self._config.export.policy
        if which == "best" and not np.isfinite(state.best_score):
            raise InputError(
                "export.policy: expected one that the run has; received 'best' before any evaluation"
            )
        spec = build.lora_spec(config)
        pairs = exported_pairs(getattr(state, POLICIES[which]), self._shapes, spec)
        facts = facts_of(
            config, self._workdir, pairs, which, int(state.best_step) if which == "best" else step
        )
        target = self.folder / f"step_{step:06d}"
        with new_folder(target, overwrite=True) as folder:
            write_lora(folder, pairs, facts)
            write_card(folder, facts)
        for old in self.steps()[: -config.export.keep]:
            (self.folder / f"step_{old:06d}").rmtree()
        return target

    def steps(self) -> list[int]:
        """Steps of the exports that are there."""
        found = (
            (_STEP.fullmatch(p.name) for p in self.folder.iterdir()) if self.folder.exists() else ()
        )
        return sorted(int(match[1]) for match in found if match)
