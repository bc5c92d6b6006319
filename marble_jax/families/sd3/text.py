"""SD3's text encoders as one object: prompts to conditioning, without the transformer or the autoencoder.

They are the larger part of the model (T5-XXL alone holds 4.8 billion parameters) and needed once a prompt, so they load
and go by themselves; `embeddings.Embeddings` keeps what they computed.

Source: diffusers 0.42 `StableDiffusion3Pipeline.encode_prompt` for how the three text encoders are put together.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.batches import batches_of
from marble_jax.errors import InputError
from marble_jax.networks.clip import CLIPTextEncoder, TextOutput, load_text_encoder
from marble_jax.networks.t5 import T5Encoder, load_t5
from marble_jax.storage.files import read_json
from marble_jax.types import Conditioning, Params
from marble_jax.weights.content_hash import content_hash

COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
CLIP_LENGTH = 77  # tokens of a published CLIP text encoder


class TextEncoders:
    """The three text encoders with their tokenizers.

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
        encoders: Sequence[tuple[CLIPTextEncoder | T5Encoder, Params] | None],
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
        self.modules = tuple(None if pair is None else pair[0] for pair in encoders)
        self.params = tuple(None if pair is None else pair[1] for pair in encoders)
        self.tokenizers = tuple(tokenizers)
        self.width = width
        self.prompt_batch = prompt_batch
        self.clip_length = int(self.tokenizers[0].model_max_length)
        self._check(pooled_width)
        self._embed = jax.jit(
            functools.partial(_embed, self.modules, width), static_argnames="length"
        )

    def _check(self, pooled_width: int) -> None:
        first, second, third = (None if m is None else m.config for m in self.modules)
        for what, expected, received in (
            ("text_encoder_3 width", self.width, self.width if third is None else third.d_model),
            ("pooled CLIP width", pooled_width, first.projection_dim + second.projection_dim),
        ):
            if expected != received:
                raise InputError(
                    f"{self.directory}: {what}: expected the transformer's {expected}; received {received}"
                )
        if first.hidden_size + second.hidden_size > self.width:
            raise InputError(
                f"{self.directory}: joint CLIP width: expected at most {self.width}; "
                f"received {first.hidden_size + second.hidden_size}"
            )
        positions = min(first.max_position_embeddings, second.max_position_embeddings)
        if self.clip_length > positions:
            raise InputError(
                f"{self.directory / 'tokenizer'}: model_max_length: expected at most the text encoders' {positions} "
                f"positions; received {self.clip_length}"
            )

    def tokenize(
        self, prompts: Sequence[str], max_sequence_length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Token ids int32 for the three encoders, cut and padded: [N, clip_length] twice, [N, max_sequence_length]."""
        lengths = (self.clip_length, self.clip_length, max_sequence_length)
        return tuple(
            None
            if tokenizer is None
            else np.asarray(
                tokenizer(
                    list(prompts), padding="max_length", max_length=length, truncation=True
                ).input_ids,
                np.int32,
            )
            for tokenizer, length in zip(self.tokenizers, lengths, strict=True)
        )

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Conditioning of the prompts; each different prompt is encoded once.

        Args:
          prompts: N texts; "" is the unconditional one.
          max_sequence_length: T5 tokens per prompt. MARBLE trains with 128, diffusers samples with 256 by default; the
            two embeddings differ, as pad tokens are attended.

        Returns:
          embeds [N, clip_length + max_sequence_length, D] and pooled [N, P], in the text encoders' dtype.

        Raises:
          InputError: no prompts, or a length below 1.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts: expected a list of one or more texts; received {prompts!r}")
        if max_sequence_length < 1:
            raise InputError(
                f"max_sequence_length: expected 1 or more; received {max_sequence_length}"
            )
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenize(list(rows), max_sequence_length)
        parts = [
            self._embed(self.params, batch, length=max_sequence_length)
            for batch in batches_of(ids, len(rows), self.prompt_batch)
        ]
        index = np.asarray([rows[prompt] for prompt in prompts])
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[index], *parts)


def assemble(first: TextOutput, second: TextOutput, third: jax.Array) -> Conditioning:
    """SD3's conditioning from its three text encoders' outputs.

    Args:
      first: CLIP-L, penultimate [N, T, D1] and pooled [N, P1].
      second: OpenCLIP bigG, [N, T, D2] and [N, P2].
      third: T5 [N, S, D], D1 + D2 <= D.

    Returns:
      embeds [N, T + S, D]: both CLIPs side by side and zeros up to D, then T5's tokens; pooled [N, P1 + P2].
    """
    both = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
    both = jnp.pad(both, ((0, 0), (0, 0), (0, third.shape[-1] - both.shape[-1])))
    embeds = jnp.concatenate([both, third.astype(both.dtype)], axis=1)
    return Conditioning(embeds, jnp.concatenate([first.pooled, second.pooled], axis=-1))


def _embed(
    modules: Sequence[Any], width: int, params: Sequence[Params], ids: Sequence[Any], length: int
) -> Conditioning:
    first, second = (
        m.apply({"params": p}, i) for m, p, i in zip(modules[:2], params[:2], ids[:2], strict=True)
    )
    if modules[2] is None:
        third = jnp.zeros((first.penultimate.shape[0], length, width), first.penultimate.dtype)
    else:
        third = modules[2].apply({"params": params[2]}, ids[2])
    return assemble(first, second, third)


def load_text_encoders(
    root: pathlib.Path,
    dtype: Any = jnp.float32,
    t5: bool = True,
    prompt_batch: int = 8,
    place: Callable[[str], Callable[..., Any] | None] = lambda component: None,
) -> TextEncoders:
    """Loads the text encoders of a diffusers-layout SD3 directory, and nothing else of it.

    Args:
      root: the directory.
      dtype: of weights and computation.
      t5: False leaves T5 out, as does a model that comes without; its tokens are then zeros, as in diffusers.
      prompt_batch: unique prompts per call of the encoders.
      place: by component, what puts a finished leaf on devices.

    Raises:
      InputError: a missing or malformed component, or encoders that do not fit.
    """
    config = read_json(root / "transformer" / "config.json")
    count = 3 if t5 and has_t5(root) else 2
    index = read_json(root / "model_index.json")
    # The cheap parts first: what is missing shows before gigabytes are read.
    tokenizers = [
        load_tokenizer(root / name, (index.get(name) or [None])[-1]) for name in TOKENIZERS[:count]
    ]
    encoders = [
        load(root / name, dtype, place(name))
        for name, load in zip(COMPONENTS[:count], (load_text_encoder, load_text_encoder, load_t5))
    ]
    absent = [None] * (3 - count)
    return TextEncoders(
        root,
        [*encoders, *absent],
        [*tokenizers, *absent],
        config["joint_attention_dim"],
        config["pooled_projection_dim"],
        prompt_batch,
    )


def has_t5(root: pathlib.Path) -> bool:
    """Whether a model comes with its third text encoder."""
    return (read_json(root / "model_index.json").get(COMPONENTS[2]) or [None])[-1] is not None


def clip_length(root: pathlib.Path) -> int:
    """CLIP tokens of a prompt of a model, without loading its tokenizer."""
    return int(
        read_json(root / TOKENIZERS[0] / "tokenizer_config.json").get(
            "model_max_length", CLIP_LENGTH
        )
    )


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

    if not hasattr(transformers, kind or ""):
        kind = (
            "PreTrainedTokenizerFast"
            if (directory / "tokenizer.json").is_file()
            else "AutoTokenizer"
        )
    try:
        return getattr(transformers, kind).from_pretrained(str(directory), local_files_only=True)
    except (
        Exception
    ) as error:  # whatever a damaged file makes the library raise; the cause stays attached
        raise InputError(
            f"{directory}: expected the files of a {kind}; received {type(error).__name__}"
        ) from error


def identity(
    root: pathlib.Path, t5: bool = True, known: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Hash of the files that the text encoders and their tokenizers are made of; T5's count with `t5`.

    `known` and the second value are those of `contents.content_hash`.
    """
    count = 3 if t5 and has_t5(root) else 2
    return content_hash(root, (*COMPONENTS[:count], *TOKENIZERS[:count]), known)
