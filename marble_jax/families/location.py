"""Where a model lies: a directory of this machine, or one downloaded from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marble_jax.families.registry import family_of
from marble_jax.weights import hub


def find_model(
    name: Path | str, omit_text_encoders: Sequence[str] = (), revision: str | None = None
) -> Path:
    """Finds the local directory of a model.

    Args:
      name: a directory with model_index.json, or a hub id `owner/model` that no directory has.
      omit_text_encoders: component names of text encoders that are not downloaded.
      revision: branch, tag or commit of a hub model.

    Returns:
      `name` itself if it is a directory, else the downloaded snapshot.

    Raises:
      InputError: no such directory, and not a hub model that can be had (unknown, gated, of no family, no network).
    """
    # The index says of which family the model is, and the family which folders matter: the root of such a
    # repository often holds all weights a second time in single files.
    index = hub.find_model(name, (), revision=revision)
    if index == Path(name):
        return index
    folders = family_of(index).components(omit_text_encoders)
    return hub.find_model(name, folders, revision=revision)
