"""Rewards by name: a directory's `rewards.json` says what each is made of, and this module makes it.

    {"alignment": {"kind": "clip", "formula": "clipscore", "model": "alignment"},
     "aesthetic": {"kind": "aesthetic", "model": "alignment", "head": "aesthetic/model.safetensors"},
     "ocr": {"kind": "ocr", "detect": false, "scale": 3},
     "geneval": {"kind": "geneval", "detector": "shapes"}}

`model` is a folder beside the file, `head` a file. Rewards that name the same model share it. For the kinds `remote`,
`openai` and `function` see `external`; a name `module:function` needs no entry.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marble_jax.errors import InputError, nearest, one_of
from marble_jax.rewards import external
from marble_jax.rewards.aesthetic import AestheticReward, load_head
from marble_jax.rewards.base import Reward
from marble_jax.rewards.clip import CLIPReward
from marble_jax.rewards.detect import ShapeDetector
from marble_jax.rewards.encoder import ClipEncoder
from marble_jax.rewards.function import FunctionReward, is_function, load_function
from marble_jax.rewards.geneval import GenEvalReward
from marble_jax.rewards.ocr import OCRReward, RapidReader

FILE = "rewards.json"
OPTIONS = {"clip": {"formula", "model"}, "aesthetic": {"model", "head"}, "ocr": {"detect", "scale"},
           "geneval": {"detector"}, **external.OPTIONS}


def entries_of(directory: Path | str) -> dict[str, dict[str, Any]]:
    """The entries of a directory's `rewards.json`.

    Raises:
      InputError: missing directory or file, or a file that does not hold objects by name.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"rewards.path: expected a directory with {FILE}; received {str(directory)!r}")
    try:
        entries = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"rewards.path: expected {FILE} in {directory}; received a directory without it") from None
    except ValueError as error:
        raise InputError(f"{directory / FILE}: expected JSON; received an error at {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{directory / FILE}: expected an object of objects, by reward; received something else")
    return entries


def load_rewards(directory: Path | str | None, names: Sequence[str], num_workers: int = 2, dtype: Any = "float32",
                 faithful: bool = False) -> list[Reward]:
    """The rewards `names` of a directory.

    Args:
      directory: holds `rewards.json` and the folders it names; None will do when all names are functions.
      names: rewards wanted, in the order of the reward axis.
      num_workers: pictures a host reward works on at the same time.
      dtype: of the CLIP towers.
      faithful: score OCR and GenEval as upstream does where our rules differ.

    Raises:
      InputError: missing directory, file or folder; an unknown reward, kind or option; a reward named twice.
    """
    entries = entries_of(directory or "") if not all(is_function(name) for name in names) else {}
    directory = Path(directory) if directory else None
    for name in names:
        if name not in entries and not is_function(name):
            raise InputError(f"reward: expected one of {', '.join(entries)} of {directory / FILE}; received "
                             f"{name!r}{nearest(name, entries)}")
        if list(names).count(name) > 1:
            raise InputError(f"reward: expected every name once; received {name!r} {list(names).count(name)} times")
    towers: dict[str, ClipEncoder] = {}

    def tower(name: str) -> ClipEncoder:
        if name not in towers:
            towers[name] = ClipEncoder.load(directory / name, dtype)
        return towers[name]

    def build(name: str) -> Reward:
        if name not in entries:
            return FunctionReward(name, load_function(name, directory))
        entry = dict(entries[name])
        kind = entry.pop("kind", None)
        one_of(f"{directory / FILE}: kind of {name}", str(kind), OPTIONS)
        for option in entry:
            one_of(f"{directory / FILE}: option of {name}", option, OPTIONS[kind])
        if kind in external.OPTIONS:
            return external.build(name, kind, entry, directory)
        try:
            if kind == "clip":
                return CLIPReward(name, tower(entry["model"]), entry.get("formula", "clipscore"))
            if kind == "aesthetic":
                return AestheticReward(name, tower(entry["model"]), load_head(directory / entry["head"]))
        except KeyError as error:
            raise InputError(f"{directory / FILE}: expected {error} for {name}; received none") from None
        if kind == "ocr":
            return OCRReward(name, RapidReader(entry.get("detect", True), entry.get("scale", 1), num_workers), faithful)
        one_of(f"{directory / FILE}: detector of {name}", entry.get("detector", "shapes"), ("shapes",))
        return GenEvalReward(name, ShapeDetector(), faithful=faithful)

    return [build(name) for name in names]
