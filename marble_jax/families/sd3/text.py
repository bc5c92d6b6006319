"""SD3's text encoders as one object: prompts to conditioning, without the transformer or the autoencoder.

They are the larger part of the model (T5-XXL alone holds 4.8 billion parameters) and needed once a prompt, so they load
and go by themselves; `families.embedding_cache.EmbeddingCache` keeps what they computed.

Source: diffusers 0.42 `StableDiffusion3Pipeline.encode_prompt` for how the three text encoders are put together.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from marble_jax.errors import InputError
from marble_jax.families.base import Conditioning, TextEncoders
from marble_jax.families.model_index import component_class
from marble_jax.families.prompt_encoding import check_prompts, encode_each_once, token_ids
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.networks.clip import CLIPTextEncoder, TextOutput, load_text_encoder
from marble_jax.networks.t5 import T5Encoder, load_t5
from marble_jax.networks.tokenizers import check_tokenizer, load_tokenizer, max_length
from marble_jax.storage.files import read_json
from marble_jax.types import Params

COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
T5 = COMPONENTS[2]
CLIP_LENGTH = 77
"""Tokens of a published CLIP text encoder."""

Clip = tuple[CLIPTextEncoder, Params]
LoadedT5 = tuple[T5Encoder, Params]


class SD3TextEncoders(TextEncoders):
    """CLIP-L, OpenCLIP bigG and T5 with their tokenizers.

    Attributes:
      directory: of the model.
      modules: CLIP, CLIP and T5 (None: its tokens are zeros).
      params: their parameters.
      tokenizers: transformers tokenizers of the three.
      width: of the token embeddings, the transformer's `joint_attention_dim`.
      clip_length: tokens of each CLIP prompt.
      prompt_batch: unique prompts per call of the encoders.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        clips: tuple[Clip, Clip],
        t5: LoadedT5 | None,
        tokenizers: Sequence[Any],
        width: int,
        pooled_width: int,
        prompt_batch: int = 8,
    ):
        """Puts loaded encoders together (`load_text_encoders` is the usual way).

        Raises:
          InputError: encoders whose widths do not fit each other or the transformer.
        """
        self.directory = directory
        (first, first_params), (second, second_params) = clips
        third, third_params = t5 or (None, None)
        self.modules = (first, second, third)
        self.params = (first_params, second_params, third_params)
        self.tokenizers = tuple(tokenizers)
        self.width = width
        self.prompt_batch = prompt_batch
        self.clip_length = clip_length(directory)
        self._check(pooled_width)
        embed = functools.partial(_embed, self.modules, width)
        self._embed = jax.jit(embed, static_argnames="length")

    def _check(self, pooled_width: int) -> None:
        """Raises InputError for encoders that do not fit each other or the transformer."""
        first, second = self.modules[0].config, self.modules[1].config
        t5 = self.modules[2]
        if t5 is not None and t5.config.d_model != self.width:
            raise InputError(
                f"{self.directory}: text_encoder_3 width: expected the transformer's {self.width}; "
                f"received {t5.config.d_model}"
            )
        pooled = first.projection_dim + second.projection_dim
        if pooled != pooled_width:
            raise InputError(
                f"{self.directory}: pooled CLIP width: expected the transformer's {pooled_width}; "
                f"received {pooled}"
            )
        joint = first.hidden_size + second.hidden_size
        if joint > self.width:
            raise InputError(
                f"{self.directory}: joint CLIP width: expected at most {self.width}; received {joint}"
            )
        positions = min(first.max_position_embeddings, second.max_position_embeddings)
        if self.clip_length > positions:
            raise InputError(
                f"{self.directory / 'tokenizer'}: model_max_length: expected at most the text "
                f"encoders' {positions} positions; received {self.clip_length}"
            )

    def tokenize(
        self, prompts: Sequence[str], max_sequence_length: int
    ) -> tuple[np.ndarray | None, ...]:
        """Token ids int32 for the three encoders, cut and padded.

        Returns:
          [N, clip_length] twice and [N, max_sequence_length]; None in place of the last without T5.
        """
        lengths = (self.clip_length, self.clip_length, max_sequence_length)
        ids: list[np.ndarray | None] = []
        for tokenizer, length in zip(self.tokenizers, lengths, strict=True):
            if tokenizer is None:
                # T5 is left out.
                ids.append(None)
                continue
            ids.append(token_ids(tokenizer, prompts, length))
        return tuple(ids)

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Conditioning of the prompts; each different prompt is encoded once.

        Args:
          prompts: N texts; "" is the unconditional one.
          max_sequence_length: T5 tokens per prompt. MARBLE trains with 128, diffusers samples with 256 by default; the
            two embeddings differ, as pad tokens are attended.

        Returns:
          `embeds` [N, clip_length + max_sequence_length, D] and `pooled` [N, P], in the text encoders' dtype.

        Raises:
          InputError: no prompts, or a length below 1.
        """
        check_prompts(prompts, max_sequence_length)
        return encode_each_once(
            prompts,
            self.prompt_batch,
            functools.partial(self.tokenize, max_sequence_length=max_sequence_length),
            lambda ids: self._embed(self.params, ids, length=max_sequence_length),
        )


def assemble(first: TextOutput, second: TextOutput, third: Float[Array, "n s d"]) -> Conditioning:
    """SD3's conditioning from its three text encoders' outputs.

    Args:
      first: CLIP-L, penultimate [N, T, D1] and pooled [N, P1].
      second: OpenCLIP bigG, [N, T, D2] and [N, P2].
      third: T5 [N, S, D], D1 + D2 <= D.

    Returns:
      `embeds` [N, T + S, D]: both CLIPs side by side and zeros up to D, then T5's tokens; `pooled` [N, P1 + P2].
    """
    both = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
    # T5 is wider than both CLIPs together; the transformer was trained with zeros in between.
    num_zeros = third.shape[-1] - both.shape[-1]
    both = jnp.pad(both, ((0, 0), (0, 0), (0, num_zeros)))
    embeds = jnp.concatenate([both, third.astype(both.dtype)], axis=1)
    pooled = jnp.concatenate([first.pooled, second.pooled], axis=-1)
    return {"embeds": embeds, "pooled": pooled}


def _embed(
    modules: Sequence[Any], width: int, params: Sequence[Params], ids: Sequence[Any], length: int
) -> Conditioning:
    """Conditioning of token ids, in one compiled program."""
    first = modules[0].apply({"params": params[0]}, ids[0])
    second = modules[1].apply({"params": params[1]}, ids[1])
    if modules[2] is None:
        # Zeros in place of T5's tokens, as in diffusers: attended like all others.
        count, dtype = len(first.penultimate), first.penultimate.dtype
        third = jnp.zeros((count, length, width), dtype)
    else:
        third = modules[2].apply({"params": params[2]}, ids[2])
    return assemble(first, second, third)


def load_text_encoders(
    root: pathlib.Path,
    dtype: Any = jnp.float32,
    omit: Sequence[str] = (),
    place: Callable[[str], Callable[..., Any] | None] = lambda component: None,
    prompt_batch: int = 8,
) -> SD3TextEncoders:
    """Loads the text encoders of a diffusers-layout SD3 directory, and nothing else of it.

    Args:
      root: the directory.
      dtype: of weights and computation.
      omit: "text_encoder_3" leaves T5 out, as does a model that comes without; its tokens are then zeros, as in
        diffusers.
      place: by component, what puts a finished leaf on devices.
      prompt_batch: unique prompts per call of the text encoders.

    Raises:
      InputError: a missing or malformed component, or encoders that do not fit.
    """
    config = MMDiTConfig.from_dict(read_json(root / "transformer" / "config.json"))
    index = read_json(root / "model_index.json")
    names = encoders_present(root, omit)
    # The cheap parts first: what is missing shows before gigabytes are read.
    tokenizers: list[Any] = []
    for name in TOKENIZERS[: len(names)]:
        tokenizers.append(load_tokenizer(root / name, component_class(index, name)))
    clip_l, clip_g = COMPONENTS[:2]
    clips = (
        load_text_encoder(root / clip_l, dtype, place(clip_l)),
        load_text_encoder(root / clip_g, dtype, place(clip_g)),
    )
    for (encoder, _), tokenizer, name in zip(clips, tokenizers, TOKENIZERS):
        shape = encoder.config
        check_tokenizer(tokenizer, root / name, shape.vocab_size, shape.eos_token_id)
    t5 = None
    if T5 in names:
        t5 = load_t5(root / T5, dtype, place(T5))
        check_tokenizer(tokenizers[2], root / TOKENIZERS[2], t5[0].config.vocab_size)
    else:
        tokenizers.append(None)
    return SD3TextEncoders(
        root,
        clips,
        t5,
        tokenizers,
        config.joint_attention_dim,
        config.pooled_projection_dim,
        prompt_batch,
    )


def encoders_present(root: pathlib.Path, omit: Sequence[str] = ()) -> tuple[str, ...]:
    """Component names of the text encoders that a model comes with and that are not left out."""
    if T5 in omit or not has_t5(root):
        return COMPONENTS[:2]
    return COMPONENTS


def has_t5(root: pathlib.Path) -> bool:
    """Whether a model comes with its third text encoder."""
    return component_class(read_json(root / "model_index.json"), T5) is not None


def clip_length(root: pathlib.Path) -> int:
    """CLIP tokens of a prompt of a model, without loading its tokenizer."""
    file = root / TOKENIZERS[0] / "tokenizer_config.json"
    return max_length(read_json(file), CLIP_LENGTH, file)


def prompt_limits(
    root: pathlib.Path, max_sequence_length: int, omit: Sequence[str] = ()
) -> tuple[PromptLimit, ...]:
    """See `Family.prompt_limits`."""
    clips = PromptLimit("CLIP", clip_length(root), functools.partial(_opened, root, TOKENIZERS[:2]))
    if T5 not in encoders_present(root, omit):
        return (clips,)
    opened = functools.partial(_opened, root, TOKENIZERS[2:])
    return clips, PromptLimit("T5", max_sequence_length, opened)


def _opened(root: pathlib.Path, names: Sequence[str]) -> list[Any]:
    """The tokenizers of a model by their component names."""
    index = read_json(root / "model_index.json")
    return [load_tokenizer(root / name, component_class(index, name)) for name in names]
