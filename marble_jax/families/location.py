"""Where a model lies: a directory of this machine, one in a bucket, or one of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marble_jax.families.registry import family_of
from marble_jax.storage.files import is_remote
from marble_jax.weights import bucket, hub


def find_model(
    name: Path | str, omit_text_encoders: Sequence[str] = (), revision: str | None = None
) -> Path:
    """Finds the local directory of a model.

    Args:
      name: a directory with model_index.json, of this machine or `gs://` or `s3://`, or a hub id `owner/model` that no
        directory has.
      omit_text_encoders: component names of text encoders that are not downloaded.
      revision: branch, tag or commit of a hub model.

    Returns:
      `name` itself if it is a directory, else the copy from the bucket or the downloaded snapshot.

    Raises:
      InputError: no such directory, and not a hub model that can be had (unknown, gated, of no family, no network).
    """
    if is_remote(str(name)):
        copied = bucket.local_copy(str(name), ())
        return bucket.local_copy(str(name), family_of(copied).components(omit_text_encoders))
    # The index says of which family the model is, and the family which folders matter: the root of such a
    # repository often holds all weights a second time in single files.
    index = hub.find_model(name, (), revision=revision)
    if index == Path(name):
        return index
    folders = family_of(index).components(omit_text_encoders)
    return hub.find_model(name, folders, revision=revision)
