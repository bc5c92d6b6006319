"""Which prompts are longer than a text encoder reads: what lies beyond its tokens is cut off without a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

_SPECIAL = 4
"""Tokens that no letter stands for, at most: beginning, end and the blank that some put in front."""


@dataclasses.dataclass(frozen=True)
class PromptLimit:
    """How much of a prompt a text encoder of a model reads.

    Attributes:
      encoder: in words, for messages: "CLIP".
      tokens: of a prompt at most, the special ones counted in.
      tokenizers: opens its tokenizers, as transformers has them; a prompt is cut where one of them makes more tokens.
      clean: what is made of a prompt before it is tokenized.
    """

    encoder: str
    tokens: int
    tokenizers: Callable[[], Sequence[Any]]
    clean: Callable[[str], str] = str

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Returns those of the prompts that are cut, in their order; opens no tokenizer where none can be.

        Raises:
          InputError: damaged tokenizers, or a prompt that cannot be cleaned.
        """
        cleaned = {prompt: self.clean(prompt) for prompt in prompts if not self._is_short(prompt)}
        if not cleaned:
            return []
        longer: set[str] = set()
        for tokenizer in self.tokenizers():
            # One token more than is read says enough, and a tokenizer does not warn of it.
            encoded = tokenizer(list(cleaned.values()), truncation=True, max_length=self.tokens + 1)
            for prompt, ids in zip(cleaned, encoded.input_ids, strict=True):
                if len(ids) > self.tokens:
                    longer.add(prompt)
        return [prompt for prompt in prompts if prompt in longer]

    def _is_short(self, prompt: str) -> bool:
        """Whether a prompt fits whatever its words: a token has a letter at least, where letters are of one byte."""
        return prompt.isascii() and len(prompt) + _SPECIAL <= self.tokens
