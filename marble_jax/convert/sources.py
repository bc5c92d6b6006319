"""Where a conversion reads from: a diffusers directory, a directory in our layout, or an original single file.

Each becomes a `Model`: components that give their tensors under the published names, and the files that go along.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from marble_jax.convert.layouts import CARRIED, CLASSES, COMPONENTS, Layout, layout
from marble_jax.convert.original import SCHEDULER, OriginalComponent, open_original
from marble_jax.errors import InputError, one_of
from marble_jax.families.sd3.pipeline import find_model
from marble_jax.storage.files import read_json
from marble_jax.storage.manifest import MANIFEST, check_sizes
from marble_jax.weights.component import PARAMS, StoredDir, open_component
from marble_jax.weights.hub import HUB_NAME, download
from marble_jax.weights.key_map import matched, published, published_shape
from marble_jax.weights.safetensors_files import SafetensorsDir

_INDEX = "model_index.json"


class StoredTensors:
    """A component in our layout under its published names, read group by group."""

    def __init__(self, source: StoredDir):
        """Checks the leaves against the config. Raises InputError when they differ."""
        self.path, self.config, self._source = source.path, source.config, source
        plan = layout(source.path.name, source.config)
        source.check(plan.shapes)
        by_path: dict[tuple[str, ...], list[Any]] = {}
        for entry in plan.entries:
            by_path.setdefault(entry.path, []).append(entry)
        self._groups = source.groups()
        self._group_of = {
            path: number for number, group in enumerate(self._groups) for path in group
        }
        self._entries = {entry.key: entry for path in self._group_of for entry in by_path[path]}
        self._arrays: dict[tuple[str, ...], np.ndarray] = {}

    def keys(self) -> list[str]:
        """Published names, leaf after leaf."""
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Published shape."""
        entry = self._entries[key]
        return published_shape(entry, self._source.leaves[entry.path].shape)

    def dtype(self, key: str) -> np.dtype:
        """Dtype of the tensor's leaf."""
        return np.dtype(self._source.leaves[self._entries[key].path].dtype)

    def file(self, key: str) -> pathlib.Path:
        """The checkpoint."""
        return self.path / PARAMS

    def read(self, key: str) -> np.ndarray:
        """The tensor, as a view of its leaf."""
        entry = self._entries[key]
        if entry.path not in self._arrays:
            self._arrays.clear()  # before the next group is read: only one is to be in memory
            self._arrays = self._source.read(self._groups[self._group_of[entry.path]])
        return published(entry, self._arrays[entry.path])

    def release(self, key: str) -> None:
        """Nothing to let go of before the group is."""


Component = SafetensorsDir | StoredTensors | OriginalComponent


@dataclasses.dataclass
class Model:
    """A model to convert.

    Attributes:
      name: as the user gave it.
      kind: "diffusers", "orbax" or "original".
      path: directory or file.
      components: by directory name.
      layouts: their tensors, checked against the files.
      carried: files to copy, by their path in the result.
      written: small JSON files to write, by their path in the result.
      skipped: what is in the directory and not in the result.
    """

    name: str
    kind: str
    path: pathlib.Path
    components: dict[str, Component]
    layouts: dict[str, Layout] = dataclasses.field(default_factory=dict)
    carried: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    written: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def files(self) -> list[pathlib.Path]:
        """Every file the result depends on."""
        files = set(self.carried.values())
        for component in self.components.values():
            for key in component.keys():
                files.add(component.file(key))
        return sorted(
            f for top in files for f in ([top] if top.is_file() else top.rglob("*")) if f.is_file()
        )


def open_model(
    name: str,
    revision: str | None = None,
    companion: str = "",
    components: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Model:
    """Opens whatever `name` names, and checks every tensor's name and shape.

    Args:
      name: a diffusers directory, a directory of ours, an original `.safetensors`, or their Hub names (`owner/model`,
        `owner/model/file.safetensors`).
      revision: branch, tag or commit of a Hub model.
      companion: a directory or Hub model to take the parts from that `name` does not have.
      components: of `COMPONENTS`, the ones wanted; all there are without it.
      ignore: patterns of tensors to pass over.

    Raises:
      InputError: nothing there, or something that is not an SD3 model.
    """
    for component in components:
        one_of("--components", component, COMPONENTS)
    model = (
        _original(name, revision, ignore)
        if name.endswith(".safetensors")
        else _directory(name, revision, components)
    )
    if companion:
        _complete(model, _directory(companion, None, components))
    wanted = list(components or COMPONENTS)
    for component in components:
        if component not in model.components:
            raise InputError(
                f"--components: expected components that {model.path} has; received {component!r}"
            )
    model.components = {c: model.components[c] for c in wanted if c in model.components}
    for component, source in model.components.items():
        plan = layout(component, source.config, source.keys())
        matched(source, plan.entries, plan.shapes, (*plan.ignore, *ignore))
        model.layouts[component] = plan
    parts = {*model.components, *(name.split("/")[0] for name in (*model.carried, *model.written))}
    index = model.written.get(_INDEX, {})
    model.written |= (
        {
            _INDEX: {
                part: value if part in parts or not isinstance(value, list) else [None, None]
                for part, value in index.items()
            }
        }
        if index
        else {}
    )
    return model


def _directory(name: str, revision: str | None, wanted: Sequence[str]) -> Model:
    root = find_model(name, revision, not wanted or "text_encoder_3" in wanted)
    index = read_json(root / _INDEX) if (root / _INDEX).is_file() else None
    if index is not None and index.get("_class_name") != "StableDiffusion3Pipeline":
        raise InputError(
            f"{root / _INDEX}: expected a StableDiffusion3Pipeline; received {index.get('_class_name')}"
        )
    # A directory without index may hold some of the components: a transformer that was trained, say.
    present = (
        {part for part in (*COMPONENTS, *CARRIED) if (root / part).is_dir()}
        if index is None
        else {
            part for part in (*COMPONENTS, *CARRIED) if (index.get(part) or [None])[-1] is not None
        }
    )
    found: dict[str, Component] = {}
    for component in COMPONENTS:
        if component in present and (not wanted or component in wanted):
            source = open_component(root / component)
            found[component] = StoredTensors(source) if isinstance(source, StoredDir) else source
    if not present & set(COMPONENTS):
        raise InputError(
            f"{root}: expected a model directory with {_INDEX} or one of {', '.join(COMPONENTS)}; "
            f"received {', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'an empty directory'}"
        )
    kinds = {"orbax" if isinstance(c, StoredTensors) else "diffusers" for c in found.values()}
    if len(kinds) > 1:
        raise InputError(f"{root}: expected components of one layout; received both")
    if (root / MANIFEST).is_file():
        check_sizes(root)
    model = Model(name, kinds.pop() if kinds else "diffusers", root, found)
    for part in sorted(present & set(CARRIED)):
        if not (root / part).is_dir():
            raise InputError(
                f"{root / part}: expected the directory that {_INDEX} names; received none"
            )
        model.carried |= {
            f"{part}/{f.name}": f for f in sorted((root / part).iterdir()) if f.is_file()
        }
    model.carried |= {f.name: f for f in root.glob("LICENSE*") if f.is_file()}
    if index is not None:
        model.written[_INDEX] = index
    known = {*COMPONENTS, *CARRIED, _INDEX, MANIFEST, *model.carried}
    model.skipped = sorted(
        p.name for p in root.iterdir() if p.name not in known and not p.name.startswith(".")
    )
    return model


def _original(name: str, revision: str | None, ignore: Sequence[str]) -> Model:
    path = pathlib.Path(name)
    if not path.is_file():
        repository, _, file = name.rpartition("/")
        if not HUB_NAME.fullmatch(repository):
            raise InputError(
                f"model: expected a file or a Hub name owner/model/file.safetensors; received {name!r}"
            )
        path = download(repository, [file], revision=revision) / file
    model = Model(name, "original", path, dict(open_original(path, ignore)))
    model.written["scheduler/scheduler_config.json"] = SCHEDULER
    parts = {part: [None, None] for part in (*COMPONENTS, *CARRIED)}
    parts |= {part: list(CLASSES[part]) for part in (*model.components, "scheduler")}
    model.written[_INDEX] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.30.0",
        **parts,
    }
    return model


def _complete(model: Model, other: Model) -> None:
    """Adds the parts of `other` that `model` lacks."""
    index = model.written.setdefault(_INDEX, {"_class_name": "StableDiffusion3Pipeline"})
    theirs = other.written.get(_INDEX, {})
    for part in model.components:
        index.setdefault(part, list(CLASSES[part]))
    for part in COMPONENTS:
        if part in other.components and part not in model.components:
            model.components[part] = other.components[part]
            index[part] = theirs.get(part, list(CLASSES[part]))
    for part in CARRIED:
        files = {name: file for name, file in other.carried.items() if name.startswith(f"{part}/")}
        if files and not any(n.startswith(f"{part}/") for n in (*model.carried, *model.written)):
            model.carried |= files
            index[part] = theirs.get(part, list(CLASSES[part]))
