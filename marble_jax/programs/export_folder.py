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
from marble_jax.convert.lora_strength import PEFT_CONFIG, PEFT_FILE
from marble_jax.convert.lora_files import Pairs, lora_files
from marble_jax.errors import InputError
from marble_jax.families.base import Family, Size
from marble_jax.programs.locations import EMBEDDED
from marble_jax.programs.model_card import Facts, model_card
from marble_jax.report import read_records
from marble_jax.storage.workdir import Workdir, jsonable
from marble_jax.trainable import lora
from marble_jax.types import Adapter
from marble_jax.version import VERSION
from marble_jax.weights.hub import HUB_NAME

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
    settings: Settings, family: Family, workdir: Workdir, pairs: Pairs, policy: str, step: int
) -> Facts:
    """What is said about an export in its card and its record."""
    model = settings.model
    on_hub = HUB_NAME.fullmatch(model.path) is not None and not epath.Path(model.path).is_dir()
    return Facts(
        name=settings.name,
        base=model.path if on_hub else epath.Path(model.path).name,
        on_hub=on_hub,
        embedded=model.path == EMBEDDED,
        diffusers=family.diffusers,
        policy=policy,
        step=step,
        spec=lora.lora_spec(settings.lora, family),
        num_layers=len(pairs),
        num_values=sum(a.size + b.size for a, b in pairs.values()),
        size=Size(model.height, model.width, model.num_frames),
        max_sequence_length=model.max_sequence_length,
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
    base = facts.base if facts.on_hub else None
    for name, content in lora_files(pairs, facts.spec, family.formats, base).items():
        (folder / name).write_bytes(content)
    (folder / "lora").mkdir()
    for name in (PEFT_CONFIG, PEFT_FILE):
        try:  # one file under two names, where the file system can
            os.link(folder / name, folder / "lora" / name)
        except (OSError, TypeError):
            (folder / name).copy(folder / "lora" / name)


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
