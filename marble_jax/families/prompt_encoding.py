"""Prompts to conditioning, whatever the text encoders: each different prompt once, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from marble_jax.batches import batches_of
from marble_jax.errors import InputError
from marble_jax.types import Conditioning


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Int[np.ndarray, "n length"]:
    """Token ids int32 [N, length] of prompts, cut and padded."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded.input_ids, np.int32)


def check_prompts(prompts: Sequence[str], max_sequence_length: int) -> None:
    """Raises InputError for anything but one or more texts, or for a length below 1."""
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts: expected a list of one or more texts; received {prompts!r}")
    if max_sequence_length < 1:
        raise InputError(f"max_sequence_length: expected 1 or more; received {max_sequence_length}")


def encode_each_once(
    prompts: Sequence[str],
    batch: int,
    tokenize: Callable[[Sequence[str]], Any],
    embed: Callable[[Any], Conditioning],
) -> Conditioning:
    """Conditioning of N prompts, in which a prompt may come many times.

    Args:
      prompts: N texts.
      batch: different prompts in a call of `embed`; the last call is filled up.
      tokenize: n texts to a pytree of ids [n, ...].
      embed: ids of `batch` texts to their conditioning.

    Returns:
      Named arrays [N, ...].
    """
    # A rollout has every prompt many times, and the encoders are large.
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    ids = tokenize(list(rows))
    parts = []
    for part in batches_of(ids, len(rows), batch):
        parts.append(embed(part))
    index = np.asarray([rows[prompt] for prompt in prompts])

    def put_together(*leaves: jax.Array) -> jax.Array:
        # The index also drops what fills up the last batch.
        return jnp.concatenate(leaves)[index]

    return jax.tree.map(put_together, *parts)
