"""CLIP pairs of a run, each loaded once however many rewards look through it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marble_jax.rewards.models import published
from marble_jax.rewards.models.encoder import ClipEncoder
from marble_jax.rewards.models.tokenizer import has_tokenizer

_Key = tuple[Path, str, tuple[str, ...]]


class SharedEncoders:
    """Loads CLIP pairs by folder and keeps them for the next reward that names the same one."""

    def __init__(self, directory: Path | None):
        """Starts without any pair; folders are looked for in `directory`, where there is one."""
        self._directory = directory
        # By folder, dtype and preferred files: with other files the same folder is another pair.
        self._loaded: dict[_Key, ClipEncoder] = {}

    def get(
        self,
        name: str,
        model: str,
        tokenizer: str,
        dtype: str,
        files: str = "clip",
        weights: Sequence[str] = (),
    ) -> ClipEncoder:
        """Returns the pair a reward names.

        Args:
          name: key of the reward.
          model: folder or Hub name.
          tokenizer: folder or Hub name of the tokenizer where `model` has none; empty for none.
          dtype: of weights and computation.
          files: key of `published.FILES`, what is fetched from the Hub.
          weights: names of OpenCLIP-layout files that win over any others.

        Raises:
          InputError: the folder, or a file in it, is missing or malformed.
        """
        folder = published.find_folder(name, self._directory, model, files)
        key = (folder, dtype, tuple(weights))
        if key not in self._loaded:
            beside = find_tokenizer(name, self._directory, folder, tokenizer)
            self._loaded[key] = ClipEncoder.load(folder, dtype, beside, weights)
        return self._loaded[key]


def find_tokenizer(name: str, directory: Path | None, folder: Path, tokenizer: str) -> Path | None:
    """Returns the folder of a tokenizer that is not in the model's own; None if it is, or none is named.

    Args:
      name: key of the reward.
      directory: the rewards directory, if there is one.
      folder: of the model.
      tokenizer: folder or Hub name; empty for none.

    Raises:
      InputError: it is nowhere.
    """
    if not tokenizer or has_tokenizer(folder):
        return None
    return published.find_folder(name, directory, tokenizer, "tokenizer")
