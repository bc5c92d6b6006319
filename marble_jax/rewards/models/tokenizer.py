"""Tokenizers of reward models: a published folder's, as a function from prompts to ids of one length."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.networks.tokenizers import check_tokenizer, load_tokenizer
from marble_jax.storage.files import read_json
from marble_jax.validation import short, validated

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")

IMAGE_KEYS = {
    "size",
    "crop_size",
    "resample",
    "image_mean",
    "image_std",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "rescale_factor",
}
"""Settings of an image processor that decide what the tower sees."""
Tokenize = Callable[[Sequence[str]], np.ndarray]
"""N prompts -> int32 [N, T], padded and truncated to one length T."""


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a published folder; empty where there is no such file.

    Raises:
      InputError: the file holds something else.
    """
    if not path.exists():
        return {}
    return read_json(path)


def image_settings(directory: Path) -> dict[str, Any]:
    """Returns how a published folder says that images are prepared; empty where it says nothing.

    Old versions of transformers write preprocessor_config.json, new ones an object in processor_config.json (and read
    that one first).

    Raises:
      InputError: a damaged file, or two that say different things.
    """
    path = directory / "processor_config.json"
    settings = read_config(path).get("image_processor")
    if settings is not None:
        settings = validated(dict[str, Any], settings, f"{path}: image_processor")
    older = read_config(directory / "preprocessor_config.json")
    if not settings:
        return older
    for key in sorted(set(settings) & set(older) & IMAGE_KEYS):
        if settings[key] != older[key]:
            raise InputError(
                f"{directory}: expected one answer to {key}; received {short(settings[key])} in "
                f"processor_config.json and {short(older[key])} in preprocessor_config.json"
            )
    return {**older, **settings}


def load_tokenize(
    directory: Path,
    length: int,
    kind: str = "CLIPTokenizer",
    clean: Callable[[str], str] | None = None,
    special: Sequence[str] = (),
    vocab_size: int | None = None,
    end_id: int | None = None,
) -> Tokenize:
    """Returns the tokenizer of a Hugging Face directory as a function, padding and truncating to `length` tokens.

    Args:
      directory: holds tokenizer.json, vocab.json or vocab.txt.
      length: tokens of every prompt.
      kind: class of the tokenizer where tokenizer_config.json does not name it.
      clean: applied to each prompt first.
      special: words added to the vocabulary, in this order.
      vocab_size: words of the encoder that reads the ids; not checked when None.
      end_id: id that ends a text for the encoder, see `check_tokenizer`.

    Raises:
      InputError: missing or unreadable tokenizer, or one of another encoder.
    """
    config = read_config(directory / "tokenizer_config.json")
    tokenizer = load_tokenizer(directory, config.get("tokenizer_class", kind))
    if special:
        tokenizer.add_tokens(list(special), special_tokens=True)
    if vocab_size is not None:
        check_tokenizer(tokenizer, directory, vocab_size, end_id)

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        texts = list(prompts)
        if clean is not None:
            texts = list(map(clean, prompts))
        # One length for all batches, so that the tower is compiled once.
        encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
        return np.asarray(encoded.input_ids)

    return tokenize


@functools.lru_cache(maxsize=4096)
def openclip_text(prompt: str) -> str:
    """Returns a prompt as OpenCLIP's tokenizer reads it: broken characters mended, HTML entities and spaces resolved.

    Plain ASCII needs no mending; for the rest the package ftfy does it.

    Raises:
      InputError: a prompt beyond ASCII without ftfy.

    Source: `basic_clean` and `whitespace_clean` of `open_clip/tokenizer.py`.
    """
    if not (prompt.isascii() and prompt.isprintable()):
        try:
            # Optional: plain ASCII does without.
            import ftfy
        except ImportError as error:
            raise InputError(
                f"OpenCLIP tokenizer: expected the package ftfy for prompts beyond ASCII such as "
                f"{prompt[:40]!r}; received none (pip install 'marble-jax[rewards]')"
            ) from error
        prompt = ftfy.fix_text(prompt)
    # Twice, as OpenCLIP: texts from the web are often escaped twice.
    unescaped = html.unescape(html.unescape(prompt))
    return " ".join(unescaped.split())
