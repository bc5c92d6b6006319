"""What families and their networks say of themselves, as plain values: sizes, options, names of layers, FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from marble_jax.networks.fused_attention import FusedAttention
from marble_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of an image or clip in pixels and frames; an image has one frame."""

    height: int
    width: int
    num_frames: int = 1

    def __str__(self) -> str:
        """`512 x 512`, or `33 x 240 x 416` with frames in front."""
        sides = f"{self.height} x {self.width}"
        return sides if self.num_frames == 1 else f"{self.num_frames} x {sides}"

    @property
    def samples(self) -> str:
        """What samples of this size are called: "images" or "clips"."""
        return "images" if self.num_frames == 1 else "clips"


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """How a transformer is computed; nothing but the last two changes what is computed.

    Attributes:
      dtype: of weights and matrix products.
      stream_dtype: of token streams between layers and of the head; that of matrix products when None.
      remat: what a backward pass recomputes: "none", "full" or "dots".
      unroll: blocks in one iteration of the loop over equal ones.
      attention: implementation by name, or a fused kernel made for a mesh.
      gather: puts a layer's weights together from the devices they are split over; None where they lie whole.
      lora_scale: alpha / rank of the adapter.
      embedded_guidance: guidance scale that a guidance-distilled model takes as an input; None for other models.
    """

    dtype: Any = jnp.float32
    stream_dtype: Any = None
    remat: str = "none"
    unroll: int = 1
    attention: str | FusedAttention = "xla"
    gather: Callable[[tuple[str, ...], Params], Params] | None = None
    lora_scale: float = 1.0
    embedded_guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer under its published name, and its place in the parameter tree.

    Attributes:
      name: name in diffusers, such as "transformer_blocks.3.attn.to_q".
      path: path of the flax module.
      index: position on the stacked axis of a scanned run; None outside the runs.
    """

    name: str
    path: tuple[str, ...]
    index: int | None


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """Sizes of a transformer at one sample, from which its memory is reckoned.

    Attributes:
      tokens: image or video tokens.
      text_tokens: text tokens in the same attention.
      width: numbers of a token.
      num_heads: attention heads.
      num_layers: blocks.
      num_second_attentions: blocks with another attention over the image tokens alone.
      conditioning_size: numbers of a sample's conditioning.
      parallel_widths: width, in token widths, of what a block computes beside its attention and holds meanwhile: the
        hidden layer of a feed-forward in parallel; 0 where the feed-forward comes after.
    """

    tokens: int
    text_tokens: int
    width: int
    num_heads: int
    num_layers: int
    num_second_attentions: int
    conditioning_size: int
    parallel_widths: int = 0


@dataclasses.dataclass(frozen=True)
class SampleFlops:
    """FLOPs of the transformer at one sample.

    Attributes:
      base: forward pass of the base model.
      forward: forward pass with the adapter.
      backward: gradient of one cotangent in the adapter, the base frozen, after a forward pass.
      recomputed: what "full" rematerialisation computes again in a backward pass.
      attention: the share of `base` in products of queries, keys and values.
    """

    base: float
    forward: float
    backward: float
    recomputed: float
    attention: float


@dataclasses.dataclass(frozen=True)
class Licence:
    """Licence of a family's published models, which holds for what is derived from them.

    Attributes:
      owner: user or organisation of the Hugging Face Hub whose models have it.
      name: what a model card calls it in `license_name`.
      file: of a model's repository, its text.
      sentence: what it means for an adapter; `{base}` stands for the base model.
    """

    owner: str
    name: str
    file: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class DiffusersNames:
    """What a family's models are called in diffusers, for instructions and for opening exports there.

    Attributes:
      pipeline: class of the pipeline.
      transformer: class of the transformer.
      tag: of its models on the Hugging Face Hub.
      without_text: components that may be left out where embeddings are given.
      pack_latents: our latents [N, *latent] as the pipeline takes them.
      conditioning: name of each conditioning array -> argument of the pipeline.
      num_frames: argument of the pipeline for the frames of a clip; None for pipelines of images.
      licence: of the published models, where a model card needs no word of the user's; None where it does.
    """

    pipeline: str
    transformer: str
    tag: str
    without_text: tuple[str, ...]
    pack_latents: Callable[[np.ndarray], np.ndarray]
    conditioning: Mapping[str, str]
    num_frames: str | None = None
    licence: Licence | None = None

    @property
    def task(self) -> str:
        """What the Hugging Face Hub calls what the pipeline does."""
        return "text-to-image" if self.num_frames is None else "text-to-video"
