"""What a `model_index.json` says of a component, and what a Hub name says of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marble_jax.storage.files import place_of
from marble_jax.validation import validated


def component_class(index: Mapping[str, Any], component: str) -> str | None:
    """Returns the class that a model_index.json names for a component; None for one that the model comes without.

    Raises:
      InputError: the entry is no pair of a library and a class.
    """
    entry = index.get(component)
    if entry is None:
        return None
    # [library, class]; both are null in a model that was saved without the component.
    what = f"{place_of(index)}{component}"
    _, name = validated(tuple[str | None, str | None], entry, what)
    return name


def name_without_owner(name: str) -> str:
    """Returns the last part of a Hub name: copies under another owner are the same model."""
    _, _, last = name.rstrip("/").rpartition("/")
    # A revision of it may stand behind.
    return last.partition("@")[0]
