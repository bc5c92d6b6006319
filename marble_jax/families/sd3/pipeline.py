"""A diffusers directory of Stable Diffusion 3 as one object: prompts to conditioning, latents to images.

The object holds frozen networks and their parameters; everything it computes is a pure function of those, jitted once
and called on batches of one size, so that no number of prompts or images retraces. Velocity is not wrapped here:
`marble_jax.families.sd3.transformer.velocity(pipeline.model, pipeline.params, adapter, xt, sigma, cond)` is the function.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.families.sd3.layer_names import load_mmdit
from marble_jax.families.sd3.text import TextEncoders, full_batches, load_text_encoders
from marble_jax.families.sd3.transformer import MMDiT
from marble_jax.networks import autoencoder_kl as vae_functions
from marble_jax.networks.autoencoder_kl import AutoencoderKL, load_vae
from marble_jax.storage.files import read_json
from marble_jax.types import Conditioning, Params
from marble_jax.weights.hub import HUB_NAME, download

_REQUIRED = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
_OPTIONAL = ("text_encoder_3", "tokenizer_3")

Place = Callable[[str, tuple[str, ...], Any], Any]
"""Called with (component, leaf path, leaf); returns the array where it shall live. A leaf has `shape` and `dtype`, and
indexing it reads no more than the part asked for (`key_map.LazyLeaf`)."""


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What a flow-matching scheduler config says about the model.

    Attributes:
      shift: of the sigma grid, s(u) = shift u / (1 + (shift - 1) u).
      num_train_timesteps: steps of the training grid; the grid's smallest u is its inverse.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000


class Pipeline:
    """The networks of one SD3 model.

    Attributes:
      directory: where it was loaded from.
      model: the transformer.
      params: the transformer's parameters.
      vae: the autoencoder.
      vae_params: its parameters.
      text: the text encoders; None when loaded without.
      scheduler: the shipped sigma-grid settings.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        transformer: tuple[MMDiT, Params],
        vae: tuple[AutoencoderKL, Params],
        text: TextEncoders | None,
        scheduler: SchedulerConfig,
    ):
        """Puts loaded networks together (`load_pipeline` is the usual way).

        Raises:
          InputError: an autoencoder that does not fit the transformer.
        """
        self.directory = directory
        self.model, self.params = transformer
        self.vae, self.vae_params = vae
        self.text = text
        self.scheduler = scheduler
        expected, received = self.model.config.in_channels, self.vae.config.latent_channels
        if expected != received:
            raise InputError(
                f"{directory}: VAE latent channels: expected the transformer's {expected}; received {received}"
            )
        self._decode = jax.jit(functools.partial(vae_functions.decode, self.vae))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of an image of `height` x `width` pixels.

        Raises:
          InputError: a side that does not divide into patches.
        """
        cell = self.vae.config.downsampling
        unit = cell * self.model.config.patch_size
        if height <= 0 or width <= 0 or height % unit or width % unit:
            raise InputError(
                f"image size: expected positive multiples of {unit} pixels; received {height} x {width}"
            )
        return height // cell, width // cell, self.vae.config.latent_channels

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Conditioning of the prompts, as `TextEncoders.encode`.

        Raises:
          InputError: as there, or the pipeline was loaded without text encoders.
        """
        if self.text is None:
            raise InputError(
                f"{self.directory}: expected text encoders; received a pipeline loaded without"
            )
        return self.text.encode(prompts, max_sequence_length)

    def decode(
        self,
        latents: jax.Array,
        batch: int,
        place: Callable[[jax.Array], jax.Array] = lambda part: part,
    ) -> jax.Array:
        """Images of latents.

        Args:
          latents: [N, h, w, C] in the transformer's scale.
          batch: images per call of the decoder; the last call is filled up.
          place: puts a call's latents on devices.

        Returns:
          float32 [N, H, W, 3] in [0, 1].
        """
        parts = [
            self._decode(self.vae_params, place(part))
            for part in full_batches(latents, len(latents), batch)
        ]
        return jnp.concatenate(parts)[: len(latents)]


def load_pipeline(
    directory: pathlib.Path | str,
    dtype: Any = jnp.float32,
    text_encoder_3: bool = True,
    text_encoders: bool = True,
    vae_dtype: Any = jnp.float32,
    prompt_batch: int = 8,
    revision: str | None = None,
    place: Place | None = None,
    **transformer_options: Any,
) -> Pipeline:
    """Loads a diffusers-layout SD3 directory.

    Args:
      directory: a directory with model_index.json, or a Hub name `owner/model` that no directory has.
      dtype: of weights and computation of transformer and text encoders.
      text_encoder_3: False leaves T5 out; its tokens are then zeros, as in diffusers.
      text_encoders: False leaves out all three, for conditioning that is already at hand.
      vae_dtype: of weights and computation of the autoencoder. Upstream keeps it in float32.
      prompt_batch: unique prompts per call of the text encoders.
      revision: branch, tag or commit of a Hub model.
      place: puts a finished leaf on devices; the default device without one.
      **transformer_options: further fields of `MMDiT`, such as `remat`, `attention`, `lora_scale` and `table_side`.

    Raises:
      InputError: missing, gated or unreachable model; missing or malformed component; components that do not fit.
    """
    root = find_model(directory, revision, text_encoder_3)
    index = read_json(root / "model_index.json")
    if index.get("_class_name", "StableDiffusion3Pipeline") != "StableDiffusion3Pipeline":
        raise InputError(
            f"{root / 'model_index.json'}: expected a StableDiffusion3Pipeline; received {index['_class_name']}"
        )
    present = {
        name for name in (*_REQUIRED, *_OPTIONAL) if (index.get(name) or [None])[-1] is not None
    }
    for name in _REQUIRED:
        if name not in present:
            raise InputError(
                f"{root / 'model_index.json'}: expected a component {name!r}; received none"
            )

    def put(component: str) -> Callable[[tuple[str, ...], np.ndarray], Any] | None:
        return None if place is None else functools.partial(place, component)

    # The cheap parts first: what is missing shows before gigabytes are read.
    scheduler = _scheduler(root / "scheduler")
    text = (
        load_text_encoders(root, dtype, text_encoder_3, prompt_batch, put)
        if text_encoders
        else None
    )
    return Pipeline(
        directory=root,
        transformer=load_mmdit(
            root / "transformer", dtype, put("transformer"), dtype=dtype, **transformer_options
        ),
        vae=load_vae(root / "vae", vae_dtype, put("vae")),
        text=text,
        scheduler=scheduler,
    )


def find_model(
    name: pathlib.Path | str, revision: str | None = None, text_encoder_3: bool = True
) -> pathlib.Path:
    """The local directory of a model: `name` itself if it exists, else the Hub model of that name, downloaded.

    Raises:
      InputError: no such directory, and not a Hub model that can be had (unknown, gated, or no network).
    """
    path = pathlib.Path(name)
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(str(name)):
        raise InputError(
            f"model: expected a directory or a Hub name owner/model; received {str(name)!r}"
        )
    skipped = ["*.fp16*", *([] if text_encoder_3 else ["text_encoder_3/*", "tokenizer_3/*"])]
    # Components only: the root of such a repository holds all weights a second time in single files.
    folders = [f"{component}/*" for component in (*_REQUIRED, *_OPTIONAL)]
    return download(str(name), ["model_index.json", *folders], skipped, revision)


def _scheduler(directory: pathlib.Path) -> SchedulerConfig:
    path = directory / "scheduler_config.json"
    config = read_json(path)
    if config.get("use_dynamic_shifting"):
        raise InputError(
            f"{path}: use_dynamic_shifting: expected false (a static shift); received true"
        )
    names = {field.name for field in dataclasses.fields(SchedulerConfig)}
    return SchedulerConfig(**{key: value for key, value in config.items() if key in names})
