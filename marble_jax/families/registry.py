"""Model families by the class that a model's `model_index.json` names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from marble_jax.errors import InputError, nearest
from marble_jax.families.base import Family
from marble_jax.families.model_index import name_without_owner
from marble_jax.storage.files import read_json
from marble_jax.weights.hub import cache_hint

BUILT_IN = {
    "StableDiffusion3Pipeline": "marble_jax.families.sd3.family",
    "FluxPipeline": "marble_jax.families.flux1.family",
    "WanPipeline": "marble_jax.families.wan.family",
}
"""Pipeline class -> module whose `FAMILY` opens its models; imported when a model asks for it."""

_registered: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Makes a family known under its pipeline class; a later one of that class takes its place."""
    _registered[family.pipeline_class] = family


def pipeline_classes() -> tuple[str, ...]:
    """Returns the pipeline classes of all known families."""
    return tuple(dict.fromkeys((*BUILT_IN, *_registered)))


def families() -> tuple[Family, ...]:
    """Returns all known families."""
    return tuple(family_of_class(name) for name in pipeline_classes())


def family_of_class(name: str, where: str = "model") -> Family:
    """Returns the family of a pipeline class.

    Args:
      name: class in diffusers.
      where: what names the class, for the message.

    Raises:
      InputError: no family has this class.
    """
    if name not in _registered:
        if name not in BUILT_IN:
            known = pipeline_classes()
            raise InputError(
                f"{where}: expected a model of one of the families {', '.join(known)}; received "
                f"{name!r}{nearest(name, known)}"
            )
        # Imported now and not at the top: a family's networks are heavy, and a run has one.
        register_family(importlib.import_module(BUILT_IN[name]).FAMILY)
    return _registered[name]


def family_of(root: Path) -> Family:
    """Returns the family of a model on disk.

    Args:
      root: directory with model_index.json.

    Raises:
      InputError: no such file, no class in it, or one of no family.
    """
    file = root / "model_index.json"
    if not file.is_file():
        raise InputError(
            f"{root}: expected a model's directory, with a model_index.json; received none"
            f"{cache_hint(root)}"
        )
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        expected = ", ".join(pipeline_classes())
        received = "none" if name is None else repr(name)
        raise InputError(
            f"{file}: expected _class_name to be one of {expected}; received {received}"
        )
    return family_of_class(name, f"{file}: _class_name")


def family_of_published(name: str, known: Sequence[Family] = ()) -> Family:
    """Returns the family that publishes a model of this name.

    Args:
      name: hub id, or the last part of one.
      known: families to ask; all of them when empty.

    Raises:
      InputError: none does; the message lists the published models.
    """
    last = name_without_owner(name)
    published: list[str] = []
    for family in tuple(known) or families():
        if last in family.published_models:
            return family
        published += family.published_models
    raise InputError(
        f"model.path: expected a local directory, 'embedded' or one of the published "
        f"{', '.join(published)}; received {name!r}{nearest(last, published)}"
    )
