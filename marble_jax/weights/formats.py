"""What a family of models is called in files: its components, its key maps and the names other libraries use.

`FileFormats` is what the conversion of checkpoints knows about a family. Each family builds one; the conversion itself
(`marble_jax.convert`) reads and writes formats and holds no name of a layer or component.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from marble_jax.weights.key_map import Entry
from marble_jax.weights.single_file import OriginalFolder, SingleFile


@dataclasses.dataclass(frozen=True)
class Layout:
    """One component's tensors.

    Attributes:
      entries: published tensors and the leaves they fill.
      shapes: abstract parameters.
      ignore: patterns of published tensors that the network does not use.
    """

    entries: tuple[Entry, ...]
    shapes: Mapping[str, Any]
    ignore: tuple[str, ...] = ()


@runtime_checkable
class DenseLayer(Protocol):
    """A dense layer under its published name: `path` of its module, `index` on the axis of a stacked run."""

    # Properties, as the families' own classes are frozen and a Protocol's plain attributes can be set.
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> tuple[str, ...]: ...
    @property
    def index(self) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class LayerPart:
    """The part of another library's layer that is one of our layers.

    Attributes:
      name: our layer's published name.
      part: the first of the `parts` equal parts of the output that it is made of.
      parts: 3 for q, k and v in one layer, 1 where the layer is not fused.
      span: how many parts it is made of.
      swapped: whether the two halves of the output are ours in the other order.
    """

    name: str
    part: int = 0
    parts: int = 1
    span: int = 1
    swapped: bool = False


@dataclasses.dataclass(frozen=True)
class LoraNames:
    """How LoRA files name the layers of a family's transformer.

    Attributes:
      prefixes: what libraries write in front of a layer's name.
      layers_at: (path of a module, shape of its kernel) -> the layers that it holds, in stacking order.
      layer_parts: (parameters or abstract parameters) -> layers by every name they go by, published or original, with
        dots and without prefix.
      diffusers_prefix: the one of `prefixes` that diffusers writes.
      base_model: `auto_mapping` of PEFT's configuration: class and module of the transformer in diffusers.
      other_models: patterns of keys that give away a LoRA for another model, by that model's name.
    """

    prefixes: tuple[str, ...]
    layers_at: Callable[[tuple[str, ...], tuple[int, ...]], Sequence[DenseLayer]]
    layer_parts: Callable[[Mapping[str, Any]], Mapping[str, tuple[LayerPart, ...]]]
    diffusers_prefix: str
    base_model: Mapping[str, str]
    other_models: Mapping[str, re.Pattern[str]]


@dataclasses.dataclass(frozen=True)
class FileFormats:
    """Names and layouts of a family's files.

    Attributes:
      name: of the family in messages.
      article: of `name`, "a" or "an".
      pipeline: `_class_name` of its model_index.json.
      diffusers_version: oldest version of diffusers that has the pipeline.
      components: folders that hold weights, in the order they are converted in.
      carried: folders without weights, whose files are copied.
      stems: beginning of the name of the safetensors of each component.
      classes: library and class of each component and carried folder, as model_index.json names them.
      adapted: the component that LoRAs adapt.
      layout: (component, contents of its config.json, names of its published tensors) -> its layout. The names are
        empty where there are no published files, and tell which of two names a tied tensor goes by.
      lora: names of layers in LoRA files.
      single_file: the original single-file layout; None if the family has none.
      original_folder: the original layout of a whole model; None if the family has none of several files.
      check_index: (model_index.json, its contents) -> None; raises InputError for models of the same pipeline class
        that are more than `components`. None where there are none such.
    """

    name: str
    article: str
    pipeline: str
    diffusers_version: str
    components: tuple[str, ...]
    carried: tuple[str, ...]
    stems: Mapping[str, str]
    classes: Mapping[str, tuple[str, str]]
    adapted: str
    layout: Callable[[str, Mapping[str, Any], Collection[str]], Layout]
    lora: LoraNames
    single_file: SingleFile | None = None
    original_folder: OriginalFolder | None = None
    check_index: Callable[[pathlib.Path, Mapping[str, Any]], None] | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders of a model, those with weights first."""
        return (*self.components, *self.carried)

    def index_entry(self, folder: str) -> list[str]:
        """Library and class of a folder, as model_index.json holds them."""
        return list(self.classes[folder])
