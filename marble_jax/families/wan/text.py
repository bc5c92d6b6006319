"""Wan's text encoder: prompts to conditioning by UMT5, without the transformer or the autoencoder.

It is loaded and goes by itself; `families.embedding_cache.EmbeddingCache` keeps what it computed.

Source: diffusers 0.42 `WanPipeline.encode_prompt`.
"""

from __future__ import annotations

import functools
import html
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.families.base import Conditioning, TextEncoders
from marble_jax.families.model_index import component_class
from marble_jax.families.prompt_encoding import check_prompts, encode_each_once
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.families.wan.config import WanConfig
from marble_jax.networks.tokenizers import check_tokenizer, load_tokenizer
from marble_jax.networks.umt5 import UMT5Encoder, load_umt5
from marble_jax.storage.files import read_json
from marble_jax.types import Params

COMPONENT, TOKENIZER = "text_encoder", "tokenizer"
CLASS = "UMT5EncoderModel"
"""Class of the text encoder in transformers."""
MAX_SEQUENCE_LENGTH = 512
"""Most tokens of a prompt, and as many rows as the model was trained with, those of zeros counted in."""
SHORTEST = 32
"""Tokens that the shortest prompts are padded to for the encoder; each doubling is a program of its own."""


class WanTextEncoders(TextEncoders):
    """UMT5 with its tokenizer.

    Attributes:
      directory: of the model.
      module: the encoder.
      params: its parameters.
      tokenizer: transformers tokenizer.
      prompt_batch: different prompts per call of the encoder.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        encoder: tuple[UMT5Encoder, Params],
        tokenizer: Any,
        config: WanConfig,
        prompt_batch: int = 8,
    ):
        """Puts a loaded encoder together with its tokenizer (`load_text_encoders` is the usual way).

        Args:
          directory: of the model.
          encoder: UMT5 and its parameters.
          tokenizer: of the encoder.
          config: of the transformer.
          prompt_batch: different prompts per call of the encoder.

        Raises:
          InputError: an encoder whose width is not what the transformer takes.
        """
        self.directory = directory
        self.module, self.params = encoder
        self.tokenizer = tokenizer
        self.prompt_batch = prompt_batch
        expected, received = config.text_dim, self.module.config.d_model
        if received != expected:
            raise InputError(
                f"{directory}: {COMPONENT} width: expected the transformer's text_dim {expected}; received "
                f"{received}"
            )
        self._embed = jax.jit(
            lambda params, ids, mask: self.module.apply({"params": params}, ids, mask)
        )

    def tokenize(
        self, prompts: Sequence[str], max_sequence_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 and mask bool [N, max_sequence_length] of cleaned prompts, cut and padded."""
        encoded = self.tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=max_sequence_length,
            truncation=True,
            return_attention_mask=True,
        )
        ids = np.asarray(encoded.input_ids, np.int32)
        return ids, np.asarray(encoded.attention_mask, np.bool_)

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Conditioning of the prompts; each different prompt is encoded once.

        Args:
          prompts: N texts; "" is the unconditional one.
          max_sequence_length: rows per prompt, up to 512; rows beyond a prompt's end are zeros that the transformer
            attends to, so that another length is another conditioning.

        Returns:
          `embeds` [N, max_sequence_length, D], in the text encoder's dtype.

        Raises:
          InputError: no prompts, or a length outside of 1 to 512.
        """
        check_prompts(prompts, max_sequence_length)
        if max_sequence_length > MAX_SEQUENCE_LENGTH:
            raise InputError(
                f"max_sequence_length: expected at most {MAX_SEQUENCE_LENGTH} tokens; received "
                f"{max_sequence_length}"
            )
        return encode_each_once(
            prompts,
            self.prompt_batch,
            functools.partial(self.tokenize, max_sequence_length=max_sequence_length),
            self._encode_batch,
        )

    def _encode_batch(self, batch: tuple[np.ndarray, np.ndarray]) -> Conditioning:
        """Conditioning of token ids and mask [n, length]; the encoder reads no more columns than it must."""
        ids, mask = batch
        length = ids.shape[1]
        # Padding changes no row of a prompt, so most prompts need a fraction of the columns.
        columns = _padded_length(int(np.asarray(mask).sum(axis=1).max()), length)
        embeds = self._embed(self.params, ids[:, :columns], mask[:, :columns])
        return {"embeds": jnp.pad(embeds, ((0, 0), (0, length - columns), (0, 0)))}


def _padded_length(longest: int, limit: int) -> int:
    """The first doubling of the shortest length that holds `longest` tokens, `limit` at most."""
    length = SHORTEST
    while length < longest:
        length *= 2
    return min(length, limit)


def clean(prompt: str) -> str:
    """A prompt without broken Unicode, HTML entities and runs of white space, as the model's prompts were cleaned.

    Raises:
      InputError: a prompt beyond ASCII without the package ftfy.
    """
    fixed = _without_broken_unicode(prompt)
    # Twice, as in the reference: entities are found inside of entities.
    unescaped = html.unescape(html.unescape(fixed)).strip()
    return re.sub(r"\s+", " ", unescaped).strip()


def _without_broken_unicode(prompt: str) -> str:
    """A prompt fixed by ftfy. Raises InputError for one beyond ASCII where that is not installed."""
    if prompt.isascii():
        # Nothing to mend: control characters alone would go, and white space is treated below.
        return prompt
    try:
        import ftfy  # optional
    except ImportError as error:
        raise InputError(
            "text encoder: expected the package ftfy for prompts beyond ASCII such as "
            f"{prompt[:40]!r}; received none (pip install 'marble-jax[rewards]')"
        ) from error
    return ftfy.fix_text(prompt)


def check_encoder(root: pathlib.Path) -> None:
    """Raises InputError unless a model names the text encoder that Wan reads.

    Args:
      root: directory with model_index.json.
    """
    file = root / "model_index.json"
    received = component_class(read_json(file), COMPONENT)
    if received != CLASS:
        raise InputError(f"{file}: {COMPONENT}: expected a {CLASS}; received {received or 'none'}")


def load_text_encoders(
    root: pathlib.Path,
    dtype: Any = jnp.float32,
    place: Callable[[str], Callable[..., Any] | None] = lambda component: None,
    prompt_batch: int = 8,
) -> WanTextEncoders:
    """Loads the text encoder of a Wan directory, and nothing else of it.

    Args:
      root: directory with model_index.json.
      dtype: of weights and computation.
      place: by component, what puts a finished leaf on devices.
      prompt_batch: different prompts per call of the encoder.

    Raises:
      InputError: a missing or malformed component, or an encoder that does not fit.
    """
    check_encoder(root)
    config = WanConfig.from_dict(read_json(root / "transformer" / "config.json"))
    index = read_json(root / "model_index.json")
    # The cheap part first: what is missing shows before gigabytes are read.
    tokenizer = load_tokenizer(root / TOKENIZER, component_class(index, TOKENIZER))
    encoder = load_umt5(root / COMPONENT, dtype, place(COMPONENT))
    check_tokenizer(tokenizer, root / TOKENIZER, encoder[0].config.vocab_size)
    return WanTextEncoders(root, encoder, tokenizer, config, prompt_batch)


def prompt_limit(root: pathlib.Path, max_sequence_length: int) -> PromptLimit:
    """See `Family.prompt_limits`."""

    def opened() -> list[Any]:
        index = read_json(root / "model_index.json")
        return [load_tokenizer(root / TOKENIZER, component_class(index, TOKENIZER))]

    return PromptLimit("UMT5", max_sequence_length, opened, clean)
