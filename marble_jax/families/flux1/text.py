"""FLUX.1's text encoders as one object: prompts to conditioning, without the transformer or the autoencoder.

CLIP-L gives the pooled vector, its last hidden state at the end-of-text token without a projection; T5 gives the
tokens. They are loaded and go by themselves; `families.embedding_cache.EmbeddingCache` keeps what they computed.

Source: diffusers 0.42 `FluxPipeline.encode_prompt`.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.families.base import Conditioning, TextEncoders
from marble_jax.families.flux1.config import FluxConfig
from marble_jax.families.model_index import component_class
from marble_jax.families.prompt_encoding import check_prompts, encode_each_once, token_ids
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.networks.clip import CLIPTextEncoder, load_text_encoder
from marble_jax.networks.clip_config import CLIPTextConfig
from marble_jax.networks.t5 import T5Encoder, load_t5
from marble_jax.networks.tokenizers import check_tokenizer, load_tokenizer, max_length
from marble_jax.storage.files import read_json
from marble_jax.types import Params

COMPONENTS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
CLASSES = ("CLIPTextModel", "T5EncoderModel")
"""Classes of the text encoders in transformers."""
MAX_SEQUENCE_LENGTH = 512
"""Most T5 tokens of a prompt, and as many as diffusers' pipeline takes unless it is told otherwise."""


class FluxTextEncoders(TextEncoders):
    """CLIP-L and T5 with their tokenizers.

    Attributes:
      directory: of the model.
      modules: CLIP and T5.
      params: their parameters.
      tokenizers: transformers tokenizers of the two.
      prompt_batch: different prompts per call of the encoders.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        clip: tuple[CLIPTextEncoder, Params],
        t5: tuple[T5Encoder, Params],
        tokenizers: tuple[Any, Any],
        config: FluxConfig,
        prompt_batch: int = 8,
    ):
        """Puts loaded encoders together (`load_text_encoders` is the usual way).

        Args:
          directory: of the model.
          clip: CLIP and its parameters.
          t5: T5 and its parameters.
          tokenizers: of the two.
          config: of the transformer.
          prompt_batch: different prompts per call of the encoders.

        Raises:
          InputError: encoders whose widths are not those that the transformer takes.
        """
        self.directory = directory
        self.modules = (clip[0], t5[0])
        self.params = (clip[1], t5[1])
        self.tokenizers = tokenizers
        self.prompt_batch = prompt_batch
        self._check(config)
        self._embed = jax.jit(functools.partial(_embed, self.modules))

    def _check(self, config: FluxConfig) -> None:
        """Raises InputError for encoders that do not fit the transformer or their tokenizers."""
        clip, t5 = self.modules
        widths = (
            (COMPONENTS[0], "pooled_projection_dim", clip.config.hidden_size),
            (COMPONENTS[1], "joint_attention_dim", t5.config.d_model),
        )
        for component, field, received in widths:
            expected = getattr(config, field)
            if received != expected:
                raise InputError(
                    f"{self.directory}: {component} width: expected the transformer's {field} "
                    f"{expected}; received {received}"
                )
        positions = clip.config.max_position_embeddings
        if self.clip_length > positions:
            raise InputError(
                f"{self.directory / TOKENIZERS[0]}: model_max_length: expected at most the text "
                f"encoder's {positions} positions; received {self.clip_length}"
            )

    @property
    def clip_length(self) -> int:
        """Tokens of a CLIP prompt."""
        file = self.directory / TOKENIZERS[0] / "tokenizer_config.json"
        return max_length(read_json(file), self.modules[0].config.max_position_embeddings, file)

    def tokenize(
        self, prompts: Sequence[str], max_sequence_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 for both encoders, cut and padded: [N, clip_length] and [N, max_sequence_length]."""
        clip, t5 = self.tokenizers
        return token_ids(clip, prompts, self.clip_length), token_ids(
            t5, prompts, max_sequence_length
        )

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Conditioning of the prompts; each different prompt is encoded once.

        Args:
          prompts: N texts; "" is the unconditional one.
          max_sequence_length: T5 tokens per prompt, up to 512; pad tokens are attended, so that another length is
            another conditioning.

        Returns:
          `embeds` [N, max_sequence_length, D] and `pooled` [N, P], in the text encoders' dtype.

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
            lambda ids: self._embed(self.params, ids),
        )


def _embed(
    modules: tuple[CLIPTextEncoder, T5Encoder], params: Sequence[Params], ids: Sequence[Any]
) -> Conditioning:
    """Conditioning of token ids, in one compiled program."""
    clip, t5 = modules
    # Any: flax types the result of `apply` by all of a module's methods.
    text: Any = clip.apply({"params": params[0]}, ids[0])
    embeds: Any = t5.apply({"params": params[1]}, ids[1])
    return {"embeds": embeds, "pooled": text.pooled}


def check_encoders(root: pathlib.Path) -> None:
    """Raises InputError unless a model names the text encoders that FLUX.1 reads.

    CLIP's other class in transformers has a projection and gives no pooled hidden state.

    Args:
      root: directory with model_index.json.
    """
    file = root / "model_index.json"
    index = read_json(file)
    for component, expected in zip(COMPONENTS, CLASSES, strict=True):
        received = component_class(index, component)
        if received != expected:
            # Of CLIP's two classes only one has what is asked for.
            purpose = ", for its pooled output" if component == COMPONENTS[0] else ""
            raise InputError(
                f"{file}: {component}: expected a {expected}{purpose}; received {received or 'none'}"
            )


def load_text_encoders(
    root: pathlib.Path,
    dtype: Any = jnp.float32,
    place: Callable[[str], Callable[..., Any] | None] = lambda component: None,
    prompt_batch: int = 8,
) -> FluxTextEncoders:
    """Loads the text encoders of a FLUX.1 directory, and nothing else of it.

    Args:
      root: directory with model_index.json.
      dtype: of weights and computation.
      place: by component, what puts a finished leaf on devices.
      prompt_batch: different prompts per call of the encoders.

    Raises:
      InputError: a missing or malformed component, or encoders that do not fit.
    """
    check_encoders(root)
    config = FluxConfig.from_dict(read_json(root / "transformer" / "config.json"))
    index = read_json(root / "model_index.json")
    # The cheap parts first: what is missing shows before gigabytes are read.
    clip_tokens, t5_tokens = (
        load_tokenizer(root / name, component_class(index, name)) for name in TOKENIZERS
    )
    clip_l, t5_xxl = COMPONENTS
    clip = load_text_encoder(root / clip_l, dtype, place(clip_l), projected=False)
    t5 = load_t5(root / t5_xxl, dtype, place(t5_xxl))
    shape = clip[0].config
    check_tokenizer(clip_tokens, root / TOKENIZERS[0], shape.vocab_size, shape.eos_token_id)
    check_tokenizer(t5_tokens, root / TOKENIZERS[1], t5[0].config.vocab_size)
    return FluxTextEncoders(root, clip, t5, (clip_tokens, t5_tokens), config, prompt_batch)


def prompt_limits(root: pathlib.Path, max_sequence_length: int) -> tuple[PromptLimit, ...]:
    """See `Family.prompt_limits`."""
    shape = CLIPTextConfig.from_dict(read_json(root / COMPONENTS[0] / "config.json"))
    file = root / TOKENIZERS[0] / "tokenizer_config.json"
    lengths = max_length(read_json(file), shape.max_position_embeddings, file), max_sequence_length
    limits = []
    for words, length, name in zip(("CLIP", "T5"), lengths, TOKENIZERS, strict=True):
        limits.append(PromptLimit(words, length, functools.partial(_opened, root, name)))
    return tuple(limits)


def _opened(root: pathlib.Path, name: str) -> list[Any]:
    """The tokenizer of a model by its component name, alone in a list."""
    index = read_json(root / "model_index.json")
    return [load_tokenizer(root / name, component_class(index, name))]
