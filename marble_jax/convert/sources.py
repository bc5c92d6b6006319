"""Where a conversion reads from: a diffusers directory, a directory in our layout, or an original single file.

Each becomes a `Model`: components that give their tensors under the published names, and the files that go along.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from marble_jax.convert.directory import ABSENT, INDEX, ModelDirectory
from marble_jax.convert.orbax_tensors import OrbaxTensors
from marble_jax.convert.original import OriginalComponent, open_original
from marble_jax.errors import InputError, one_of
from marble_jax.weights.formats import FileFormats, Layout
from marble_jax.weights.hub import HUB_NAME, download, find_model
from marble_jax.weights.key_map import match_entries
from marble_jax.weights.safetensors_files import SafetensorsDir

Component = SafetensorsDir | OrbaxTensors | OriginalComponent


@dataclasses.dataclass
class Model:
    """A model to convert.

    Attributes:
      name: as the user gave it.
      kind: "diffusers", "orbax" or "original".
      path: directory or file.
      formats: of its family.
      components: by folder name.
      layouts: their tensors, checked against the files.
      carried: files to copy, by their path in the result.
      written: small JSON files to write, by their path in the result.
      skipped: what is in the directory and not in the result.
    """

    name: str
    kind: str
    path: pathlib.Path
    formats: FileFormats
    components: dict[str, Component]
    layouts: dict[str, Layout] = dataclasses.field(default_factory=dict)
    carried: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    written: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def files(self) -> list[pathlib.Path]:
        """Every file the result depends on."""
        tops = set(self.carried.values())
        for component in self.components.values():
            for key in component.keys():
                tops.add(component.file(key))
        files = []
        for top in tops:
            if top.is_file():
                files.append(top)
            else:
                # A component in our layout names its checkpoint, which is a folder.
                files += [path for path in top.rglob("*") if path.is_file()]
        return sorted(files)

    def folders(self) -> set[str]:
        """Folders that the result has files for."""
        folders = set(self.components)
        for name in (*self.carried, *self.written):
            folders.add(name.split("/")[0])
        return folders


def open_model(
    name: str,
    formats: Sequence[FileFormats],
    revision: str | None = None,
    companion: str = "",
    components: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Model:
    """Opens whatever `name` names, and checks every tensor's name and shape.

    Args:
      name: a diffusers directory, a directory of ours, an original `.safetensors`, or their Hub names (`owner/model`,
        `owner/model/file.safetensors`).
      formats: of the families that the model may be of.
      revision: branch, tag or commit of a Hub model.
      companion: a directory or Hub model to take the parts from that `name` does not have.
      components: folders of the components wanted; all that the model has without it.
      ignore: patterns of tensors to pass over.

    Raises:
      InputError: no such model, or one of no family in `formats`.
    """
    choices = dict.fromkeys(part for family in formats for part in family.components)
    for component in components:
        one_of("--components", component, choices)
    if name.endswith(".safetensors"):
        model = _open_file(name, formats, revision, ignore)
    else:
        model = _open_directory(name, formats, revision, components)
    if companion:
        _complete(model, _open_directory(companion, [model.formats], None, components))
    _select(model, components)
    for component, source in model.components.items():
        plan = model.formats.layout(component, source.config, source.keys())
        match_entries(source, plan.entries, plan.shapes, (*plan.ignore, *ignore))
        model.layouts[component] = plan
    _drop_absent_parts(model)
    return model


def _select(model: Model, wanted: Sequence[str]) -> None:
    """Keeps the components that are wanted, all if none is named, in the family's order or that of `wanted`."""
    for component in wanted:
        if component not in model.components:
            raise InputError(
                f"--components: expected components that {model.path} has; received {component!r}"
            )
    selected = {}
    for component in wanted or model.formats.components:
        if component in model.components:
            selected[component] = model.components[component]
    model.components = selected


def _drop_absent_parts(model: Model) -> None:
    """Marks as absent in model_index.json what the result does not have."""
    index = model.written.get(INDEX)
    if not index:
        return
    folders = model.folders()
    parts = {}
    for part, value in index.items():
        # A list is a part with its class; anything else is an option of the pipeline.
        if isinstance(value, list) and part not in folders:
            value = ABSENT
        parts[part] = value
    model.written[INDEX] = parts


def _open_directory(
    name: str, formats: Sequence[FileFormats], revision: str | None, wanted: Sequence[str]
) -> Model:
    """A model directory, or the Hub model of that name; reads the components of `wanted` only, if there are some."""
    folders = dict.fromkeys(folder for family in formats for folder in family.folders)
    skipped = []
    if wanted:
        weights = dict.fromkeys(part for family in formats for part in family.components)
        skipped = [part for part in weights if part not in wanted]
    directory = ModelDirectory(find_model(name, folders, skipped, revision), formats)
    components = directory.components(wanted)
    directory.check_sizes()
    kind = "diffusers"
    if any(isinstance(component, OrbaxTensors) for component in components.values()):
        kind = "orbax"
    model = Model(name, kind, directory.root, directory.formats, dict(components))
    model.carried = directory.carried()
    model.skipped = directory.skipped()
    if directory.index is not None:
        model.written[INDEX] = directory.index
    return model


def _open_file(
    name: str, formats: Sequence[FileFormats], revision: str | None, ignore: Sequence[str]
) -> Model:
    """An original single file, on this machine or on the Hub."""
    path = pathlib.Path(name)
    if not path.is_file():
        repository, _, file = name.rpartition("/")
        if not HUB_NAME.fullmatch(repository):
            raise InputError(
                f"model: expected a file or a Hub name owner/model/file.safetensors; received {name!r}"
            )
        path = download(repository, [file], revision=revision) / file
    original = open_original(path, formats, ignore)
    family = original.formats
    model = Model(name, "original", path, family, dict(original.components))
    if family.single_file is not None:
        model.written |= family.single_file.written
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "_diffusers_version": family.diffusers_version,
    }
    folders = model.folders()
    for part in family.folders:
        index[part] = list(family.classes[part]) if part in folders else ABSENT
    model.written[INDEX] = index
    return model


def _complete(model: Model, companion: Model) -> None:
    """Adds the parts of `companion` that `model` lacks."""
    family = model.formats
    index = model.written.setdefault(INDEX, {"_class_name": family.pipeline})
    stated = companion.written.get(INDEX, {})
    for part in model.components:
        index.setdefault(part, list(family.classes[part]))
    before = model.folders()
    for part in family.folders:
        if part in before:
            continue
        files = _files_of(companion, part)
        if part in companion.components:
            model.components[part] = companion.components[part]
        elif files:
            model.carried |= files
        else:
            continue
        index[part] = stated.get(part, list(family.classes[part]))


def _files_of(model: Model, part: str) -> dict[str, pathlib.Path]:
    """Files of a carried folder, by their path in the result."""
    files = {}
    for name, file in model.carried.items():
        if name.startswith(f"{part}/"):
            files[name] = file
    return files
