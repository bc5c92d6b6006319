"""The folder of an export: filled beside its place, which it takes when it is complete."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

from marble_jax.config import Settings
from marble_jax.convert.lora_files import Pairs, lora_files
from marble_jax.convert.lora_strength import PEFT_CONFIG, PEFT_FILE
from marble_jax.errors import InputError
from marble_jax.families.base import Family
from marble_jax.families.descriptions import Size
from marble_jax.programs.locations import SHIPPED
from marble_jax.programs.model_card import Facts, model_card
from marble_jax.report import read_records
from marble_jax.storage.workdir import Workdir, jsonable
from marble_jax.trainable import lora
from marble_jax.types import Adapter
from marble_jax.version import VERSION
from marble_jax.weights.hub import HUB_NAME, without_revision

RECORD = "export.json"


@contextmanager
def new_folder(target: epath.Path, overwrite: bool = False) -> Iterator[epath.Path]:
    """A folder beside `target` to fill; it takes the place of `target` at the end, and vanishes on an error.

    Args:
      target: where it goes.
      overwrite: replace an earlier export that is there.

    Raises:
      InputError: there is something already that is not to be replaced, or the place cannot be written.
    """
    partial = target.parent / f".{target.name}.partial"
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        # A kill came between the two renames of `_put_in_place`.
        old.rename(target)
    _check_place(target, overwrite)
    try:
        # What an earlier kill left behind.
        _remove(partial)
        _remove(old)
        partial.mkdir(parents=True)
        yield partial
        _put_in_place(partial, target, old)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{target}: expected a writable place with room; received {reason}"
        ) from error
    finally:
        _remove(partial)


def _check_place(target: epath.Path, overwrite: bool) -> None:
    """Raises InputError where something stands that is not to be replaced."""
    if not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{target}: expected a new folder; received one that exists (--overwrite replaces it)"
        )
    if not (target / RECORD).exists():
        raise InputError(
            f"{target}: expected an earlier export to overwrite (with {RECORD}); received something "
            "else, which is left alone"
        )


def _put_in_place(partial: epath.Path, target: epath.Path, old: epath.Path) -> None:
    """Puts a filled folder where an earlier one may stand, which is out of the way for as short as can be."""
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _remove(old)


def _remove(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()


def facts_of(
    settings: Settings, family: Family, workdir: Workdir, pairs: Pairs, policy: str, step: int
) -> Facts:
    """What is said about an export in its card and its record."""
    model = settings.model
    folder = epath.Path(model.path)
    # A relative path may look like a hub id.
    on_hub = HUB_NAME.fullmatch(model.path) is not None and not folder.is_dir()
    # Of a path only the last part is told: the rest is about the machine that the run was on.
    base = without_revision(model.path) if on_hub else folder.name
    num_values = 0
    for a, b in pairs.values():
        num_values += a.size + b.size
    return Facts(
        name=settings.name,
        base=base,
        on_hub=on_hub,
        embedded=model.path in SHIPPED,
        diffusers=family.diffusers,
        policy=policy,
        step=step,
        spec=lora.lora_spec(settings.lora, family),
        num_layers=len(pairs),
        num_values=num_values,
        size=Size(model.height, model.width, model.num_frames),
        max_sequence_length=model.max_sequence_length,
        embedded_guidance=model.embedded_guidance or None,
        guidance=max(settings.rollout.guidance_scale, 1.0),
        solver=settings.evaluation.solver,
        num_steps=settings.evaluation.num_steps,
        seed=settings.evaluation.seed,
        records=read_records(workdir.path),
    )


def exported_pairs(
    family: Family, adapter: Adapter, shapes: Any, spec: lora.LoraSpec
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The adapted layers' leaves by name, without the inert ones that only fill up a stacked run."""
    pairs = lora.unstack(family.layers_at, adapter)
    layers = lora.target_layers(family.layers_at, shapes, spec.targets)
    return {layer.name: pairs[layer.name] for layer in layers}


def write_lora(folder: epath.Path, pairs: Pairs, facts: Facts, family: Family) -> None:
    """Writes the files of the adapter into an existing folder."""
    # PEFT reads the name of a base model as a hub id.
    base = facts.base if facts.on_hub else None
    for name, content in lora_files(pairs, facts.spec, family.formats, base).items():
        (folder / name).write_bytes(content)
    (folder / "lora").mkdir()
    for name in (PEFT_CONFIG, PEFT_FILE):
        _link(folder / name, folder / "lora" / name)


def _link(file: epath.Path, copy: epath.Path) -> None:
    """Makes one file stand under two names, twice where the file system cannot."""
    try:
        os.link(file, copy)
    except (OSError, TypeError):
        # A bucket's path is no path for the operating system.
        file.copy(copy)


def write_card(folder: epath.Path, facts: Facts, checks: Mapping[str, Any] | None = None) -> None:
    """Writes README.md with its images, and export.json."""
    text, images = model_card(facts, checks, merged=(folder / "transformer").exists())
    for name, file in images.items():
        (folder / name).parent.mkdir(exist_ok=True)
        file.copy(folder / name)
    (folder / "README.md").write_text(text)
    record = {
        "marble_jax": VERSION,
        "run": facts.name,
        "base": facts.base,
        "policy": facts.policy,
        "step": facts.step,
        "lora": dataclasses.asdict(facts.spec),
        "num_layers": facts.num_layers,
        "verified": checks,
    }
    (folder / RECORD).write_text(json.dumps(jsonable(record), indent=1) + "\n")
