"""A diffusers directory of Stable Diffusion 3 as one object: prompts to conditioning, latents to pictures.

The object holds frozen networks and their parameters; everything it computes is a pure function of those, jitted once
and called on batches of one size, so that no number of prompts or pictures retraces. Velocity is not wrapped here:
`marble_jax.models.mmdit.velocity(pipeline.model, pipeline.params, adapter, xt, sigma, cond)` is the function.

Source: diffusers 0.42 `StableDiffusion3Pipeline.encode_prompt` for how the three text encoders are put together.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.models import vae as vae_functions
from marble_jax.models.clip import CLIPTextEncoder, TextOutput, load_text_encoder
from marble_jax.models.mmdit import MMDiT
from marble_jax.models.mmdit_weights import load_mmdit
from marble_jax.models.t5 import T5Encoder, load_t5
from marble_jax.models.vae import AutoencoderKL, load_vae
from marble_jax.types import Conditioning, Params

_REQUIRED = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_OPTIONAL = ("text_encoder_3", "tokenizer_3")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

Place = Callable[[str, tuple[str, ...], np.ndarray], Any]
"""Called with (component, leaf path, host array); returns the array where it shall live."""


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
      text_encoders: CLIP, CLIP and T5 (None: its tokens are zeros).
      text_params: their parameters.
      tokenizers: transformers tokenizers of the three.
      scheduler: the shipped sigma-grid settings.
      clip_length: tokens of each CLIP prompt.
      prompt_batch: unique prompts per call of the text encoders.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        transformer: tuple[MMDiT, Params],
        vae: tuple[AutoencoderKL, Params],
        text_encoders: Sequence[tuple[CLIPTextEncoder | T5Encoder, Params] | None],
        tokenizers: Sequence[Any],
        scheduler: SchedulerConfig,
        prompt_batch: int = 8,
    ):
        """Puts loaded networks together (`load_pipeline` is the usual way).

        Raises:
          InputError: networks whose widths do not fit each other.
        """
        self.directory = directory
        self.model, self.params = transformer
        self.vae, self.vae_params = vae
        self.text_encoders = tuple(None if pair is None else pair[0] for pair in text_encoders)
        self.text_params = tuple(None if pair is None else pair[1] for pair in text_encoders)
        self.tokenizers = tuple(tokenizers)
        self.scheduler = scheduler
        self.prompt_batch = prompt_batch
        self.clip_length = int(self.tokenizers[0].model_max_length)
        self._check()
        width = self.model.config.joint_attention_dim
        self._embed = jax.jit(functools.partial(_embed, self.text_encoders, width), static_argnames="length")
        self._decode = jax.jit(functools.partial(vae_functions.decode, self.vae))

    def _check(self) -> None:
        first, second, third = (None if m is None else m.config for m in self.text_encoders)
        config = self.model.config
        positions = min(first.max_position_embeddings, second.max_position_embeddings)
        third_width = config.joint_attention_dim if third is None else third.d_model
        for what, expected, received in (
            ("text_encoder_3 width", config.joint_attention_dim, third_width),
            ("pooled CLIP width", config.pooled_projection_dim, first.projection_dim + second.projection_dim),
            ("VAE latent channels", config.in_channels, self.vae.config.latent_channels),
        ):
            if expected != received:
                raise InputError(
                    f"{self.directory}: {what}: expected the transformer's {expected}; received {received}")
        if first.hidden_size + second.hidden_size > config.joint_attention_dim:
            raise InputError(
                f"{self.directory}: joint CLIP width: expected at most {config.joint_attention_dim}; "
                f"received {first.hidden_size + second.hidden_size}")
        if self.clip_length > positions:
            raise InputError(
                f"{self.directory / 'tokenizer'}: model_max_length: expected at most the text encoders' {positions} "
                f"positions; received {self.clip_length}")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of a picture of `height` x `width` pixels.

        Raises:
          InputError: a side that does not divide into patches.
        """
        cell = self.vae.config.downsampling
        unit = cell * self.model.config.patch_size
        if height <= 0 or width <= 0 or height % unit or width % unit:
            raise InputError(f"picture size: expected positive multiples of {unit} pixels; received {height} x {width}")
        return height // cell, width // cell, self.vae.config.latent_channels

    def tokenize(
        self, prompts: Sequence[str], max_sequence_length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Token ids int32 for the three encoders, cut and padded: [N, clip_length] twice, [N, max_sequence_length]."""
        lengths = (self.clip_length, self.clip_length, max_sequence_length)
        return tuple(
            None if tokenizer is None else np.asarray(
                tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids, np.int32)
            for tokenizer, length in zip(self.tokenizers, lengths, strict=True))

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
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
            raise InputError(f"max_sequence_length: expected 1 or more; received {max_sequence_length}")
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenize(list(rows), max_sequence_length)
        parts = [
            self._embed(self.text_params, batch, length=max_sequence_length)
            for batch in _batches(ids, len(rows), self.prompt_batch)]
        index = np.asarray([rows[prompt] for prompt in prompts])
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[index], *parts)

    def decode(self, latents: jax.Array, batch: int) -> jax.Array:
        """Pictures of latents.

        Args:
          latents: [N, h, w, C] in the transformer's scale.
          batch: pictures per call of the decoder; the last call is filled up.

        Returns:
          float32 [N, H, W, 3] in [0, 1].
        """
        parts = [self._decode(self.vae_params, part) for part in _batches(latents, len(latents), batch)]
        return jnp.concatenate(parts)[: len(latents)]


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
    first, second = (m.apply({"params": p}, i) for m, p, i in zip(modules[:2], params[:2], ids[:2], strict=True))
    if modules[2] is None:
        third = jnp.zeros((first.penultimate.shape[0], length, width), first.penultimate.dtype)
    else:
        third = modules[2].apply({"params": params[2]}, ids[2])
    return assemble(first, second, third)


def _batches(tree: Any, count: int, size: int) -> Iterator[Any]:
    """Slices of `size` rows of every leaf; the last repeats the last row until it is full."""
    if size < 1:
        raise InputError(f"batch: expected 1 or more; received {size}")
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], tree)


def load_pipeline(
    directory: pathlib.Path | str,
    dtype: Any = jnp.float32,
    text_encoder_3: bool = True,
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
      vae_dtype: of weights and computation of the autoencoder. Upstream keeps it in float32.
      prompt_batch: unique prompts per call of the text encoders.
      revision: branch, tag or commit of a Hub model.
      place: puts a finished leaf on devices; the default device without one.
      **transformer_options: further fields of `MMDiT`, such as `remat`, `attention`, `lora_scale` and `table_side`.

    Raises:
      InputError: missing, gated or unreachable model; missing or malformed component; components that do not fit.
    """
    root = find_model(directory, revision, text_encoder_3)
    index = _read_json(root / "model_index.json")
    if index.get("_class_name", "StableDiffusion3Pipeline") != "StableDiffusion3Pipeline":
        raise InputError(
            f"{root / 'model_index.json'}: expected a StableDiffusion3Pipeline; received {index['_class_name']}")
    present = {name for name in (*_REQUIRED, *_OPTIONAL) if (index.get(name) or [None])[-1] is not None}
    for name in _REQUIRED:
        if name not in present:
            raise InputError(f"{root / 'model_index.json'}: expected a component {name!r}; received none")
    third = text_encoder_3 and "text_encoder_3" in present

    def put(component: str) -> Callable[[tuple[str, ...], np.ndarray], Any] | None:
        return None if place is None else functools.partial(place, component)

    def clip(component: str) -> tuple[CLIPTextEncoder, Params]:
        return load_text_encoder(root / component, dtype, put(component))

    # The cheap parts first: what is missing shows before gigabytes are read.
    scheduler = _scheduler(root / "scheduler")
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")[: 3 if third else 2]
    tokenizers = [load_tokenizer(root / name, (index.get(name) or [None])[-1]) for name in names]
    return Pipeline(
        directory=root,
        transformer=load_mmdit(root / "transformer", dtype, put("transformer"), dtype=dtype, **transformer_options),
        vae=load_vae(root / "vae", vae_dtype, put("vae")),
        text_encoders=[clip("text_encoder"), clip("text_encoder_2"),
                       load_t5(root / "text_encoder_3", dtype, put("text_encoder_3")) if third else None],
        tokenizers=tokenizers if third else [*tokenizers, None],
        scheduler=scheduler,
        prompt_batch=prompt_batch)


def find_model(name: pathlib.Path | str, revision: str | None = None, text_encoder_3: bool = True) -> pathlib.Path:
    """The local directory of a model: `name` itself if it exists, else the Hub model of that name, downloaded.

    Raises:
      InputError: no such directory, and not a Hub model that can be had (unknown, gated, or no network).
    """
    path = pathlib.Path(name)
    if path.is_dir():
        return path
    if not _HUB_NAME.fullmatch(str(name)):
        raise InputError(f"model: expected a directory or a Hub name owner/model; received {str(name)!r}")
    from huggingface_hub import errors, snapshot_download  # needed for downloads only

    skipped = ["*.fp16*", *([] if text_encoder_3 else ["text_encoder_3/*", "tokenizer_3/*"])]
    folders = [f"{component}/*" for component in (*_REQUIRED, *_OPTIONAL)]
    try:
        # Components only: the root of such a repository holds all weights a second time in single files.
        local = snapshot_download(
            str(name), revision=revision, allow_patterns=["model_index.json", *folders], ignore_patterns=skipped)
    except errors.GatedRepoError as error:
        raise InputError(
            f"model {str(name)!r}: expected access to a gated Hub model; received a refusal (accept its licence on "
            "huggingface.co and log in with `hf auth login`)") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(f"model {str(name)!r}: expected a directory or a Hub model{at}; received neither") from error
    except Exception as error:  # the transport's own errors change between releases; the cause stays attached
        raise InputError(
            f"model {str(name)!r}: expected a directory, a cached Hub model or a reachable Hub; received no such "
            f"directory and {type(error).__name__}") from error
    return pathlib.Path(local)


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
        kind = "PreTrainedTokenizerFast" if (directory / "tokenizer.json").is_file() else "AutoTokenizer"
    try:
        return getattr(transformers, kind).from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the library raise; the cause stays attached
        raise InputError(f"{directory}: expected the files of a {kind}; received {type(error).__name__}") from error


def _scheduler(directory: pathlib.Path) -> SchedulerConfig:
    path = directory / "scheduler_config.json"
    config = _read_json(path)
    if config.get("use_dynamic_shifting"):
        raise InputError(f"{path}: use_dynamic_shifting: expected false (a static shift); received true")
    names = {field.name for field in dataclasses.fields(SchedulerConfig)}
    return SchedulerConfig(**{key: value for key, value in config.items() if key in names})


def _read_json(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a readable file; received {type(error).__name__}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected valid JSON; received an error at {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object; received a {type(content).__name__}")
    return content
