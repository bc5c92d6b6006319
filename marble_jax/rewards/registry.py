"""Rewards by name: a directory's `rewards.json` says what each is made of, and this module makes it.

    {"alignment": {"kind": "clip", "formula": "clipscore", "model": "alignment"},
     "aesthetic": {"kind": "aesthetic", "model": "alignment", "head": "aesthetic/model.safetensors"},
     "ocr": {"kind": "ocr", "detect": false, "scale": 3},
     "geneval": {"kind": "geneval", "detector": "shapes"}}

`model` is a folder beside the file or a Hub name, `head` a file. Rewards that name the same model share it. The
published models (`published.ENTRIES`) need no entry and no file; for the kinds `remote`, `openai` and `function` see
`external`; a name `module:function` needs no entry either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marble_jax.errors import InputError, nearest, one_of
from marble_jax.rewards import external
from marble_jax.rewards.base import Reward
from marble_jax.rewards.function import FunctionReward, is_function, load_function
from marble_jax.rewards.geneval import GenEvalReward, own_colours
from marble_jax.rewards.image_statistics import FormulaReward, JpegReward, brightness, colourfulness
from marble_jax.rewards.models import published
from marble_jax.rewards.models.aesthetic import AestheticReward, load_head
from marble_jax.rewards.models.clip_colours import ClipColours
from marble_jax.rewards.models.clip_reward import CLIPReward
from marble_jax.rewards.models.encoder import HPS_FILES, ClipEncoder, has_tokenizer
from marble_jax.rewards.models.imagereward import ImageReward
from marble_jax.rewards.models.mask2former import Mask2FormerDetector
from marble_jax.rewards.ocr import OCRReward, PaddleReader, RapidReader
from marble_jax.rewards.toy_world.shape_detector import ShapeDetector

FILE = "rewards.json"
OPTIONS = {
    "clip": {"formula", "model", "tokenizer", "dtype"},
    "aesthetic": {"model", "tokenizer", "head", "dtype"},
    "imagereward": {"model", "tokenizer", "dtype"},
    "ocr": {"engine", "detect", "scale", "processes", "timeout"},
    "geneval": {"detector", "model", "clip", "tokenizer", "dtype", "device", "batch_size"},
    "jpeg_compressibility": set(),
    "jpeg_incompressibility": set(),
    "brightness": set(),
    "colourfulness": set(),
    **external.OPTIONS,
}
DTYPES = ("float32", "bfloat16", "float16")
FORMULAS = {"brightness": brightness, "colourfulness": colourfulness}


def entries_of(directory: Path | str) -> dict[str, dict[str, Any]]:
    """The entries of a directory's `rewards.json`; of the published models without such a file, or for "hub".

    Raises:
      InputError: missing directory, or a file that does not hold objects by name.
    """
    directory = Path(directory)
    if str(directory) == published.HUB and not directory.is_dir():
        return dict(published.ENTRIES)
    if not directory.is_dir():
        raise InputError(
            f"rewards.path: expected a directory with {FILE}; received {str(directory)!r}"
        )
    try:
        entries = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return dict(published.ENTRIES)
    except ValueError as error:
        raise InputError(
            f"{directory / FILE}: expected JSON; received an error at {error}"
        ) from None
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) for entry in entries.values()
    ):
        raise InputError(
            f"{directory / FILE}: expected an object of objects, by reward; received something else"
        )
    return entries


def load_rewards(
    directory: Path | str | None,
    names: Sequence[str],
    num_workers: int = 2,
    dtype: Any = "float32",
    upstream: bool = False,
) -> list[Reward]:
    """The rewards `names` of a directory.

    Args:
      directory: holds the folders of models and perhaps `rewards.json`; "hub" where there is none and all models come
        from the Hub; None will do when all names are functions.
      names: rewards wanted, in the order of the reward axis.
      num_workers: images a host reward works on at the same time.
      dtype: of the networks on the device, unless an entry says otherwise.
      upstream: score OCR and GenEval as upstream does where our rules differ.

    Raises:
      InputError: missing directory, file or folder; an unknown reward, kind or option; a reward named twice.
    """
    own = entries_of(directory or "") if not all(is_function(name) for name in names) else {}
    entries = {
        **own,
        **{name: entry for name, entry in published.ENTRIES.items() if name not in own},
    }
    builder = Builder(directory, entries, num_workers, dtype, upstream)
    for name in names:
        if name not in entries and not is_function(name):
            raise InputError(
                f"reward: expected one of {', '.join(entries)} of {builder.where}; received "
                f"{name!r}{nearest(name, entries)}"
            )
        if list(names).count(name) > 1:
            raise InputError(
                f"reward: expected every name once; received {name!r} {list(names).count(name)} times"
            )
    return [builder.build(name) for name in names]


class Builder:
    """Makes rewards from their entries; networks that several name are loaded once.

    Attributes:
      where: what error messages call the entries' source.
    """

    def __init__(
        self,
        directory: Path | str | None,
        entries: dict[str, dict[str, Any]],
        num_workers: int,
        dtype: Any,
        upstream: bool,
    ):
        """Arguments as `load_rewards`."""
        self.directory = Path(directory) if directory and Path(directory).is_dir() else None
        self.where = self.directory / FILE if self.directory else "the published rewards"
        self.entries, self.num_workers, self.dtype, self.upstream = (
            entries,
            num_workers,
            str(dtype),
            upstream,
        )
        self._towers: dict[tuple[Path, str, bool], ClipEncoder] = {}

    def build(self, name: str) -> Reward:
        """The reward of a name, which is an entry or a function."""
        if name not in self.entries:
            return FunctionReward(name, load_function(name, self.directory))
        entry = dict(self.entries[name])
        kind = str(entry.pop("kind", None))
        one_of(f"{self.where}: kind of {name}", kind, OPTIONS)
        for option in entry:
            one_of(f"{self.where}: option of {name}", option, OPTIONS[kind])
        if kind in external.OPTIONS:
            return external.build(name, kind, entry, self.directory)
        one_of(f"{self.where}: dtype of {name}", entry.setdefault("dtype", self.dtype), DTYPES)
        try:
            return self._own(name, kind, entry)
        except KeyError as error:
            raise InputError(f"{self.where}: expected {error} for {name}; received none") from None

    def _own(self, name: str, kind: str, entry: dict[str, Any]) -> Reward:
        if kind == "clip":
            return CLIPReward(
                name, self._tower(name, entry, "model"), entry.get("formula", "clipscore")
            )
        if kind == "aesthetic":
            head = load_head(published.find_file(name, self.directory, entry["head"]))
            return AestheticReward(name, self._tower(name, entry, "model"), head)
        if kind == "imagereward":
            folder = published.find_folder(name, self.directory, entry["model"], "imagereward")
            return ImageReward.load(
                name, folder, self._tokenizer(name, entry, folder), entry["dtype"]
            )
        if kind == "ocr":
            return OCRReward(name, self._reader(name, entry), self.upstream)
        if kind == "geneval":
            return self._geneval(name, entry)
        if kind in FORMULAS:
            return FormulaReward(name, FORMULAS[kind])
        return JpegReward(name, kind == "jpeg_compressibility", self.num_workers)

    def _tower(self, name: str, entry: dict[str, Any], model: str) -> ClipEncoder:
        is_hps = entry.get("formula") == "hpsv2"
        folder = published.find_folder(
            name, self.directory, entry[model], "hpsv2" if is_hps else "clip"
        )
        key = folder, entry["dtype"], is_hps
        if key not in self._towers:
            self._towers[key] = ClipEncoder.load(
                folder,
                entry["dtype"],
                self._tokenizer(name, entry, folder),
                HPS_FILES if is_hps else (),
            )
        return self._towers[key]

    def _tokenizer(self, name: str, entry: dict[str, Any], folder: Path) -> Path | None:
        """The folder of the tokenizer where the model's own has none."""
        if "tokenizer" not in entry or has_tokenizer(folder):
            return None
        return published.find_folder(name, self.directory, entry["tokenizer"], "tokenizer")

    def _reader(self, name: str, entry: dict[str, Any]) -> RapidReader | PaddleReader:
        engine, scale, timeout = (
            entry.get("engine", "rapidocr"),
            entry.get("scale", 1),
            entry.get("timeout", 60.0),
        )
        one_of(f"{self.where}: engine of {name}", engine, ("rapidocr", "paddleocr"))
        if engine == "paddleocr":
            return PaddleReader(scale, self.num_workers, timeout)
        return RapidReader(
            entry.get("detect", True),
            scale,
            self.num_workers,
            entry.get("processes", False),
            timeout,
        )

    def _geneval(self, name: str, entry: dict[str, Any]) -> GenEvalReward:
        kind = entry.get("detector", "shapes")
        one_of(f"{self.where}: detector of {name}", kind, ("shapes", "mask2former"))
        if kind == "shapes":
            return GenEvalReward(name, ShapeDetector(), own_colours, self.upstream)
        folder = published.find_folder(name, self.directory, entry["model"], "mask2former")
        colours = ClipColours(self._tower(name, entry, "clip"))
        detector = Mask2FormerDetector.load(
            folder, entry.get("device"), batch_size=entry.get("batch_size", 8)
        )
        return GenEvalReward(name, detector, colours, self.upstream)
