"""Tokenizers of text encoders, as transformers reads them from a component directory."""

from __future__ import annotations

import pathlib
from typing import Any

from marble_jax.errors import InputError


def load_tokenizer(directory: pathlib.Path, kind: str | None) -> Any:
    """The transformers tokenizer of a component directory.

    Args:
      directory: holds the tokenizer's files.
      kind: its class in transformers, as model_index.json names it; unknown names are resolved from the files.

    Raises:
      InputError: missing or unreadable directory.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a tokenizer directory; received no such directory")
    import transformers  # slow to import

    if kind is None or not hasattr(transformers, kind):
        kind = "AutoTokenizer"
        if (directory / "tokenizer.json").is_file():
            kind = "PreTrainedTokenizerFast"
    try:
        return getattr(transformers, kind).from_pretrained(str(directory), local_files_only=True)
    except (
        Exception
    ) as error:  # whatever a damaged file makes the library raise; the cause stays attached
        raise InputError(
            f"{directory}: expected the files of a {kind}; received {type(error).__name__}"
        ) from error
