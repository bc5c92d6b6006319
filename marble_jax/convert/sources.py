"""Where a conversion reads from: a diffusers directory, one in our layout, an original folder or an original file.

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
from marble_jax.convert.original_folder import carried_files, family_of_folder, open_folder
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
            files += _files_below(top)
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
      name: a diffusers directory, a directory of ours, an original folder on this machine, an original `.safetensors`,
        or their Hub names (`owner/model`, `owner/model/file.safetensors`).
      formats: of the families that the model may be of.
      revision: branch, tag or commit of a Hub model.
      companion: a directory or Hub model to take the parts from that `name` does not have.
      components: folders of the components wanted; all that the model has without it.
      ignore: patterns of tensors to pass over.

    Raises:
      InputError: no such model, one of no family in `formats`, or a revision of what is on this machine.
    """
    for component in components:
        one_of("--components", component, _all_components(formats))
    if revision and pathlib.Path(name).exists():
        raise InputError(
            f"--revision: expected with a Hub name, of which it is a branch, tag or commit; received {revision!r} with "
            f"{name}, which is on this machine"
        )
    if name.endswith(".safetensors"):
        model = _open_file(name, formats, revision, ignore)
    else:
        model = _open_directory(name, formats, revision, components, ignore)
    if companion:
        _complete(model, _open_directory(companion, [model.formats], None, components, ignore))
    if components:
        _select(model, components)
    _check_layouts(model, ignore)
    _drop_absent_parts(model)
    return model


def _all_components(formats: Sequence[FileFormats]) -> list[str]:
    """Component folders of all families, each once."""
    return list(dict.fromkeys(part for family in formats for part in family.components))


def _select(model: Model, wanted: Sequence[str]) -> None:
    """Keeps the components that are wanted, in that order. Raises InputError when the model lacks one."""
    selected = {}
    for component in wanted:
        if component not in model.components:
            raise InputError(
                f"--components: expected components that {model.path} has; received {component!r}"
            )
        selected[component] = model.components[component]
    model.components = selected


def _check_layouts(model: Model, ignore: Sequence[str]) -> None:
    """Adds the layout of each component, checked against its files."""
    for component, source in model.components.items():
        plan = model.formats.layout(component, source.config, source.keys())
        match_entries(source, plan.entries, plan.shapes, (*plan.ignore, *ignore))
        model.layouts[component] = plan


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
    name: str,
    formats: Sequence[FileFormats],
    revision: str | None,
    wanted: Sequence[str],
    ignore: Sequence[str],
) -> Model:
    """A model directory, or the Hub model of that name; reads the components of `wanted` only, if there are some."""
    original = family_of_folder(pathlib.Path(name), formats)
    if original is not None:
        return _open_original_folder(name, original, wanted, ignore)
    # Which family a Hub model is of is known when its index has come down: the folders of all are asked for.
    folders = dict.fromkeys(folder for family in formats for folder in family.folders)
    skipped: set[str] = set()
    if wanted:
        skipped = set(_all_components(formats)) - set(wanted)
    directory = ModelDirectory(find_model(name, folders, sorted(skipped), revision), formats)
    components = directory.components(wanted)
    directory.check_sizes()
    model = Model(name, "diffusers", directory.root, directory.formats, dict(components))
    # One of them says it for all: a directory has one layout.
    if OrbaxTensors in map(type, components.values()):
        model.kind = "orbax"
    model.carried = directory.carried()
    model.skipped = directory.skipped()
    if directory.index is not None:
        model.written[INDEX] = directory.index
    return model


def _open_original_folder(
    name: str, family: FileFormats, wanted: Sequence[str], ignore: Sequence[str]
) -> Model:
    """A whole model in its original layout."""
    root = pathlib.Path(name)
    components = open_folder(root, family, wanted, ignore)
    model = Model(name, "original", root, family, dict(components))
    assert family.original_folder is not None
    configs = {part: component.config for part, component in components.items()}
    model.written |= family.original_folder.layout.written(configs)
    model.carried = carried_files(root, family)
    model.written[INDEX] = _new_index(family)
    return model


def _new_index(family: FileFormats) -> dict[str, Any]:
    """Contents of model_index.json of a whole model; parts that are not there become absent in the end."""
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "_diffusers_version": family.diffusers_version,
    }
    for part in family.folders:
        index[part] = family.index_entry(part)
    return index


def _open_file(
    name: str, formats: Sequence[FileFormats], revision: str | None, ignore: Sequence[str]
) -> Model:
    """An original single file, on this machine or on the Hub."""
    path = _local_file(name, revision)
    original = open_original(path, formats, ignore)
    family = original.formats
    model = Model(name, "original", path, family, dict(original.components))
    configs = {part: component.config for part, component in original.components.items()}
    model.written |= original.layout.written(configs)
    # The parts that the file does not hold become absent ones once a companion had its chance.
    model.written[INDEX] = _new_index(family)
    return model


def _local_file(name: str, revision: str | None) -> pathlib.Path:
    """A file on this machine: `name` itself, or the Hub's file of that name, downloaded."""
    path = pathlib.Path(name)
    if path.is_file():
        return path
    repository, _, file = name.rpartition("/")
    if not HUB_NAME.fullmatch(repository):
        raise InputError(
            f"model: expected a file or a Hub name owner/model/file.safetensors; received {name!r}"
        )
    return download(repository, [file], revision=revision) / file


def _complete(model: Model, companion: Model) -> None:
    """Adds the parts of `companion` that `model` lacks."""
    family = model.formats
    index = model.written.setdefault(INDEX, {"_class_name": family.pipeline})
    stated = companion.written.get(INDEX, {})
    for part in model.components:
        index.setdefault(part, family.index_entry(part))
    lacking = companion.folders() - model.folders()
    for part in family.folders:
        if part in lacking:
            _take(model, companion, part)
            index[part] = stated.get(part, family.index_entry(part))
    # The family's order is the one that components are converted in, wherever they come from.
    order = family.components.index
    model.components = dict(sorted(model.components.items(), key=lambda item: order(item[0])))


def _take(model: Model, companion: Model, part: str) -> None:
    """Adds one part of `companion`: a component, or the files of a carried folder."""
    if part in companion.components:
        model.components[part] = companion.components[part]
        return
    for name, file in companion.carried.items():
        if name.startswith(f"{part}/"):
            model.carried[name] = file


def _files_below(top: pathlib.Path) -> list[pathlib.Path]:
    """A file itself, or all files below a folder: a component in our layout names its checkpoint, which is one."""
    if top.is_file():
        return [top]
    return [path for path in top.rglob("*") if path.is_file()]
