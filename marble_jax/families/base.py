"""What every model family provides: one interface between a kind of diffusion model and the rest of the package.

A *family* is a kind of model (Stable Diffusion 3, say): how its files are laid out, what its layers are called, how it
is opened. Its *networks* are one opened model: a transformer whose velocity is a pure function, an autoencoder, the
noise levels it samples at. Everything outside `families` works with these two interfaces and with arrays whose shapes
the networks tell; nothing outside knows how many axes a latent has or which text encoders there are.

A new family is one folder with a `FAMILY` and one line in `families.registry`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from marble_jax.distributed.sharding import ShardingRules
from marble_jax.errors import InputError
from marble_jax.families.descriptions import (
    DiffusersNames,
    Layer,
    NetworkOptions,
    SampleFlops,
    Size,
    TransformerShape,
)
from marble_jax.families.prompt_limits import PromptLimit
from marble_jax.types import Adapter, Conditioning, Params
from marble_jax.weights.formats import FileFormats

Place = Callable[[str, tuple[str, ...], Any], Any]
"""Called with (component, leaf path, leaf); returns the array where it shall live. A leaf has `shape` and `dtype`, and
indexing it reads no more than the part asked for (`weights.key_map.Leaf`)."""


class TextEncoders(abc.ABC):
    """The text encoders of a model.

    Attributes:
      prompt_batch: different prompts a call encodes at once.
    """

    prompt_batch: int

    @abc.abstractmethod
    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Conditioning of N prompts, named arrays [N, ...]; "" is the unconditional one.

        Raises:
          InputError: no prompts, or a length that the encoders do not have.
        """


class Networks(abc.ABC):
    """The frozen networks of one model: weights, or their shapes where a run is only planned.

    Attributes:
      directory: where the model lies; None for shapes of a published model.
      options: how the transformer is computed.
      params: weights of the transformer, or `jax.ShapeDtypeStruct`s.
      decoder_params: weights of the autoencoder's decoder, likewise.
      sharding_rules: how the transformer's parameters are split over a mesh.
      largest_activation: numbers in the decoder's largest activation, of one pixel of one frame.
      longest_prompt: tokens a prompt at most; None for any number.
      pipeline_solver: what the model's pipeline in diffusers samples with, as `flow.solvers` calls it.
    """

    directory: Path | None
    options: NetworkOptions
    params: Params
    decoder_params: Params
    sharding_rules: ShardingRules
    largest_activation: int
    longest_prompt: int | None = None
    pipeline_solver: str = "euler"

    @abc.abstractmethod
    def velocity(
        self,
        params: Params,
        adapter: Adapter | None,
        xt: Float[Array, " n *latent"],
        sigma: Float[ArrayLike, " n"] | Float[ArrayLike, ""],
        cond: Conditioning,
    ) -> Float[Array, " n *latent"]:
        """Flow velocity `noise - x0` as a pure function.

        Args:
          params: weights of the transformer.
          adapter: LoRA leaves; None is the base model.
          xt: [N, *latent] noisy latents.
          sigma: [N] or scalar noise level in [0, 1].
          cond: of the N samples.

        Returns:
          float32 [N, *latent].
        """

    @abc.abstractmethod
    def decode_latents(
        self, decoder_params: Params, latents: Float[Array, " n *latent"]
    ) -> Float[Array, "n frames height width 3"]:
        """Returns clips float32 in [0, 1] of clean latents, as a pure function of weights and latents."""

    def frames_decoded_at_once(self, num_frames: int) -> int:
        """Frames of a clip of `num_frames` whose activations the decoder holds together: all, unless it streams."""
        return num_frames

    @property
    def decoder_only_params(self) -> Params:
        """The part of `decoder_params` that decoding reads."""
        return self.decoder_params

    @abc.abstractmethod
    def check_size(self, size: Size, names: tuple[str, str, str]) -> None:
        """Raises InputError for a size that the model cannot draw.

        Args:
          size: wanted.
          names: of the settings for height, width and frames, for the message.
        """

    def check_guidance(self, embedded_guidance: float | None, name: str) -> None:
        """Raises InputError for a guidance scale that the model does not take as an input, or for none where it does.

        Most models take none; families of guidance-distilled ones say otherwise.

        Args:
          embedded_guidance: guidance scale; None for none.
          name: of the setting, for the message.
        """
        if embedded_guidance is not None:
            raise InputError(
                f"{name}: expected none, as this model does not take a guidance scale as an input; "
                f"received {embedded_guidance:g}"
            )

    def check_sequence_length(self, max_sequence_length: int, name: str) -> None:
        """Raises InputError for more tokens a prompt than the model takes.

        Args:
          max_sequence_length: tokens a prompt.
          name: of the setting, for the message.
        """
        longest = self.longest_prompt
        if longest is not None and max_sequence_length > longest:
            raise InputError(
                f"{name}: expected at most {longest} tokens; received {max_sequence_length}"
            )

    @abc.abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one sample's latents. Raises InputError for a size off the grid."""

    @property
    @abc.abstractmethod
    def default_size(self) -> Size:
        """The size that the model was made for."""

    @abc.abstractmethod
    def levels(self, num_steps: int, latent_shape: tuple[int, ...]) -> Float[np.ndarray, " levels"]:
        """Noise levels float32 [num_steps + 1] that the model samples at, from near 1 down to 0."""

    def network_levels(
        self, num_steps: int, latent_shape: tuple[int, ...]
    ) -> Float[np.ndarray, " steps"] | None:
        """Levels float32 [num_steps] that the model's pipeline tells the network; None where they are `levels`."""
        return None

    @abc.abstractmethod
    def conditioning_shapes(self, count: int, max_sequence_length: int) -> dict[str, Any]:
        """Shapes and dtypes (`jax.ShapeDtypeStruct`) of the conditioning of `count` samples."""

    @abc.abstractmethod
    def transformer_shape(self, size: Size, max_sequence_length: int) -> TransformerShape:
        """Sizes of the transformer at one sample."""

    @abc.abstractmethod
    def sample_flops(self, adapter: Adapter, size: Size, max_sequence_length: int) -> SampleFlops:
        """FLOPs of the transformer at one sample, with an adapter or its shapes."""

    @abc.abstractmethod
    def decoder_flops(self, size: Size) -> float:
        """FLOPs of decoding one sample."""

    @abc.abstractmethod
    def with_options(self, options: NetworkOptions) -> Networks:
        """Returns the same networks, computed otherwise; weights are shared."""

    def with_lora_scale(self, scale: float) -> Networks:
        """Returns the same networks for an adapter of another scale."""
        return self.with_options(dataclasses.replace(self.options, lora_scale=scale))

    def with_guidance(self, embedded_guidance: float | None) -> Networks:
        """Returns the same networks for another guidance scale as an input; see `check_guidance`."""
        options = dataclasses.replace(self.options, embedded_guidance=embedded_guidance)
        return self.with_options(options)


class Family(abc.ABC):
    """A kind of diffusion model.

    Attributes:
      name: short, for messages: "sd3".
      pipeline_class: class in a model's `model_index.json` that means this family.
      network_components: folders of a model that images depend on, its text encoders apart.
      optional_text_encoders: component names of the text encoders that a model can do without.
      default_targets: suffixes of the layers that an adapter adapts unless it is told otherwise.
      published_models: names of models on the Hub whose shapes are known without their files.
      tensor_parallel_modules: pattern of the flax modules whose partial products devices sum along `tensor`.
      gathered_tables: pattern of the flax modules that hold tables split over `fsdp`.
      formats: how its files are laid out and what other libraries call its layers.
      diffusers: what its models are called in diffusers.
      frames_per_second: of its clips; None for a family that draws images alone.
    """

    name: str
    pipeline_class: str
    network_components: tuple[str, ...]
    optional_text_encoders: tuple[str, ...]
    default_targets: tuple[str, ...]
    published_models: tuple[str, ...]
    tensor_parallel_modules: str
    gathered_tables: str
    formats: FileFormats
    diffusers: DiffusersNames
    frames_per_second: int | None = None

    @abc.abstractmethod
    def components(self, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """Folders of a model that are read, without omitted text encoders (and their tokenizers)."""

    @abc.abstractmethod
    def open(
        self,
        root: Path,
        options: NetworkOptions,
        place: Place | None = None,
        decoder_dtype: Any = jnp.float32,
    ) -> Networks:
        """Opens the transformer and the autoencoder of a model.

        Args:
          root: directory with model_index.json.
          options: how the transformer is computed.
          place: puts a finished leaf on devices; the default device without one.
          decoder_dtype: of the autoencoder's weights and computation.

        Raises:
          InputError: a missing or malformed component, or components that do not fit each other.
        """

    @abc.abstractmethod
    def outline(self, model: Path | str, options: NetworkOptions) -> Networks:
        """The networks as shapes, without weights.

        Args:
          model: a directory with config files, or the name of a published model.
          options: how the transformer is computed.

        Raises:
          InputError: neither; the message names the published models.
        """

    @abc.abstractmethod
    def num_encoder_parameters(self, model: Path | str, omit: Sequence[str] = ()) -> int:
        """Numbers in the text encoders of a model; arguments and errors as in `outline`."""

    @abc.abstractmethod
    def default_sequence_length(self, root: Path) -> int:
        """Tokens of a prompt of a model where nobody says otherwise."""

    @abc.abstractmethod
    def component_rules(self, component: str, head_width: int) -> ShardingRules:
        """How the parameters of a component are split over a mesh.

        Args:
          component: folder of a model.
          head_width: of the transformer's attention.
        """

    @abc.abstractmethod
    def open_text_encoders(
        self,
        root: Path,
        dtype: Any,
        omit: Sequence[str] = (),
        place: Callable[[str], Any] = lambda component: None,
    ) -> TextEncoders:
        """Opens the text encoders of a model, and nothing else of it.

        Args:
          root: directory with model_index.json.
          dtype: of weights and computation.
          omit: component names of encoders to leave out.
          place: by component, what puts a finished leaf on devices.
        """

    @abc.abstractmethod
    def text_components(self, root: Path, omit: Sequence[str] = ()) -> tuple[str, ...]:
        """Folders of a model that its conditioning depends on: text encoders and tokenizers that are there and used."""

    @abc.abstractmethod
    def prompt_limits(
        self, root: Path, max_sequence_length: int, omit: Sequence[str] = ()
    ) -> tuple[PromptLimit, ...]:
        """How much of a prompt each text encoder of a model reads, without loading one.

        Args:
          root: directory with model_index.json.
          max_sequence_length: tokens a prompt, of the encoders that it is for.
          omit: component names of encoders to leave out.
        """

    @abc.abstractmethod
    def layers_at(self, path: tuple[str, ...], shape: tuple[int, ...]) -> list[Layer]:
        """The published layers that a leaf of `shape` of the module at `path` holds, in stacking order."""
