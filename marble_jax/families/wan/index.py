"""What a `model_index.json` says of a Wan model that is more than one text-to-video transformer."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.families.model_index import component_class


def check_index(file: pathlib.Path, index: Mapping[str, Any]) -> None:
    """Raises InputError for the index of a Wan 2.2 model.

    An index may name a `boundary_ratio` without the second transformer that it would be for: some converted models of
    Wan 2.1 do.

    Args:
      file: for the message.
      index: its contents.
    """
    if component_class(index, "transformer_2") is not None:
        raise InputError(
            f"{file}: expected a Wan 2.1 model with one transformer; received a second one, transformer_2, as "
            "Wan 2.2 A14B has, which is not supported"
        )
    if index.get("expand_timesteps"):
        raise InputError(
            f"{file}: expected a Wan 2.1 model; received expand_timesteps, as Wan 2.2 5B has, which is not "
            "supported"
        )
