"""What a `model_index.json` says of a component, and what a Hub name says of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def component_class(index: Mapping[str, Any], component: str) -> str | None:
    """Returns the class that a model_index.json names for a component; None for one that the model comes without."""
    # [library, class]; both are null in a model that was saved without the component.
    entry = index.get(component) or [None]
    return entry[-1]


def name_without_owner(name: str) -> str:
    """Returns the last part of a Hub name: copies under another owner are the same model."""
    _, _, last = name.rstrip("/").rpartition("/")
    return last
