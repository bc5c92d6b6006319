"""Where a model lies: a directory of this machine, or one downloaded from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marble_jax.errors import InputError
from marble_jax.families.registry import family_of
from marble_jax.weights.hub import HUB_NAME, download

_SECOND_COPIES = ("*.fp16*",)
"""Files of weights that are there in full precision too."""


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
    path = Path(name)
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(str(name)):
        raise InputError(
            f"model: expected a directory or a Hub name owner/model; received {str(name)!r}"
        )
    # The index says of which family the model is, and the family which folders matter: the root of such a
    # repository often holds all weights a second time in single files.
    index = download(str(name), ["model_index.json"], [], revision)
    folders = family_of(index).components(omit_text_encoders)
    wanted = ["model_index.json"]
    for folder in folders:
        wanted.append(f"{folder}/*")
    return download(str(name), wanted, list(_SECOND_COPIES), revision)
