"""A policy ready to draw images: the model found, its weights read, its sampler compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from marble_jax.batches import batch_indices
from marble_jax.config import ModelSettings, Settings
from marble_jax.console import Console
from marble_jax.convert.lora import add_loras
from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError, one_of
from marble_jax.families.base import Networks
from marble_jax.families.decoding import Decoder, as_samples
from marble_jax.families.descriptions import Size
from marble_jax.families.embedding_cache import EmbeddingCache
from marble_jax.families.location import find_model
from marble_jax.families.registry import family_of
from marble_jax.flow.levels import truncated
from marble_jax.flow.policy_sampler import image_noise
from marble_jax.flow.sampler import guided, sample
from marble_jax.flow.solvers import SOLVERS, solver_table
from marble_jax.programs.locations import embedding_folder, model_location
from marble_jax.programs.open_model import check_omitted, decode_size, default_size, size_of
from marble_jax.programs.pipeline_cache import PipelineCache
from marble_jax.programs.policy_source import PolicySource, SamplingSettings
from marble_jax.programs.prompt_remarks import cut_lines
from marble_jax.programs.run_state import restore_policy, run_settings
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable import lora
from marble_jax.types import Adapter, Conditioning, Params
from marble_jax.version import VERSION
from marble_jax.weights.content_hash import content_hash

DECODE_BATCH = 8
"""Frames that the autoencoder works on at once; its activations are large."""
SIZE_OPTIONS = ("--size: height", "--size: width", "--size: frames")


class ImageSampler:
    """A source ready to draw.

    Attributes:
      origin: what draws, in words.
      run: settings of the run whose policy draws; None for a plain model.
      root: directory of the model.
      family: of the model.
      size: of the images; known after `open`.
    """

    def __init__(
        self,
        source: PolicySource,
        settings: SamplingSettings,
        pipelines: PipelineCache | None = None,
    ):
        """Finds the model and reads the run's settings; weights are read by `open`.

        Raises:
          InputError: no such model or run, or settings that do not fit it.
        """
        one_of("--solver", settings.solver, SOLVERS)
        self._source = source
        self._pipelines = pipelines or PipelineCache()
        self._workdir: Workdir | None = None
        self.run: Settings | None = None
        self.origin = source.model
        model = plain_model(source.model)
        if source.workdir:
            self._workdir = Workdir(source.workdir)
            self.run = run_settings(self._workdir)
            self.origin = f"{source.workdir} {source.policy}"
            model = self.run.model
        self._settings = settings.guided_as(self.run.rollout if self.run else None)
        self._dtype, self._attention = settings.dtype or model.dtype, model.attention
        self._stream_dtype = settings.stream_dtype or model.stream_dtype
        # A name that both leave out counts once.
        omit = (*settings.omit_text_encoders, *model.omit_text_encoders)
        self._omit = tuple(dict.fromkeys(omit))
        self.root = find_model(model_location(model.path), self._omit)
        self.family = family_of(self.root)
        check_omitted(self.family, self._omit, "--omit_text_encoders")
        self._length = self._sequence_length()
        self._embedded_guidance = self._guidance_input()
        self._mesh = device_mesh.make_mesh()
        # Every device draws: a batch is a multiple of their number.
        devices = self._mesh.size
        self._batch = -(-settings.batch // devices) * devices
        self._networks: Networks | None = None
        self._decoder: Decoder | None = None
        self._adapter: Adapter | None = None
        self._texts: EmbeddingCache | None = None

    def _sequence_length(self) -> int:
        """Tokens a prompt: as many as are asked for, as the run has, or as the model has."""
        if self._settings.max_sequence_length is not None:
            return self._settings.max_sequence_length
        if self.run is not None:
            return self.run.model.max_sequence_length
        return self.family.default_sequence_length(self.root)

    @property
    def _negative(self) -> str:
        """What guidance leads away from; empty without guidance."""
        return self._settings.negative or ""

    @property
    def _guidance_scale(self) -> float:
        """Classifier-free guidance scale, 1 for none."""
        return max(self._settings.guidance or 1.0, 1.0)

    def _guidance_input(self) -> float | None:
        """Guidance scale as an input of the model: the one asked for, the run's, or none."""
        if self._settings.embedded_guidance is not None:
            return self._settings.embedded_guidance
        if self.run is not None:
            return self.run.model.embedded_guidance or None
        return None

    def prepare(self, texts: Sequence[str], console: Console) -> None:
        """Before `open`: says which texts are cut; with an embedding cache, encodes all and drops the text encoders."""
        settings = self._settings
        self._texts = self._pipelines.texts(
            self.family,
            self.root,
            self._length,
            self._dtype,
            self._omit,
            embedding_folder(settings.embedding_cache, ""),
        )
        wanted = list(texts)
        if settings.guided:
            wanted.append(self._negative)
        self._pipelines.say_once(cut_lines(self._texts, wanted), console)
        if not settings.embedding_cache or not texts:
            return
        missing = len(self._texts.missing(wanted))
        with console.bar(missing, "text embeddings", "prompt") as bar:
            self._texts.fill(wanted, bar.update)

    def open(self, draws: bool = True) -> None:
        """Reads the weights; those of text encoders only if something is to be drawn that no cache has ready.

        Raises:
          InputError: damaged files, no checkpoint of the run, a LoRA that does not fit, or a size that the model
            cannot draw.
        """
        if self._networks is not None:
            return
        networks, self._decoder = self._pipelines.networks(
            self.family,
            self.root,
            self._dtype,
            self._attention,
            self._mesh,
            self._stream_dtype,
        )
        networks.check_guidance(self._embedded_guidance, "--embedded_guidance")
        networks.check_sequence_length(self._length, "--max_sequence_length")
        networks = networks.with_guidance(self._embedded_guidance)
        networks, adapter = self._restored(networks)
        adapter = add_loras(
            self._source.loras,
            networks.params,
            self.family.formats,
            networks.options.lora_scale,
            adapter,
        )
        if self._source.loras:
            self.origin += f" with {self._source.loras}"
        if adapter is not None:
            # Small enough to lie whole on every device.
            adapter = device_mesh.replicate(self._mesh, adapter)
        self._adapter = adapter
        self.size = self._size(networks)
        self._frames_at_once = networks.frames_decoded_at_once(self.size.num_frames)
        self._latent_shape = networks.latent_shape(self.size)
        self._latents = self._compiled(networks)
        if draws and not self._settings.embedding_cache and self._texts is not None:
            self._texts.load()
        # Last: a call that failed half way starts again.
        self._networks = networks

    def _restored(self, networks: Networks) -> tuple[Networks, Adapter | None]:
        """The run's policy, and the networks at its adapter's scale."""
        if self.run is None or self._workdir is None or self._source.policy == "base":
            return networks, None
        adapter, step = restore_policy(
            self.run, self._workdir, self.family, networks.params, self._source.policy
        )
        spec = lora.lora_spec(self.run.lora, self.family)
        self.origin = f"{self._source.workdir} {self._source.policy} after step {step}"
        return networks.with_lora_scale(spec.scale), adapter

    def _size(self, networks: Networks) -> Size:
        """The size asked for, the run's, or the model's own."""
        size = default_size(self._source.model, networks)
        if self.run is not None:
            size = size_of(self.run.model)
        if self._settings.size is not None:
            height, width = self._settings.size
            size = Size(height, width, size.num_frames)
        if self._settings.num_frames is not None:
            size = Size(size.height, size.width, self._settings.num_frames)
        check_size_option(networks, size, self.run is None and is_unasked(self._settings))
        return size

    def _compiled(self, networks: Networks) -> Any:
        """A compiled function (params, adapter, cond, negative cond or None, noise) -> latents."""
        settings = self._settings
        sigmas = networks.levels(settings.num_steps, self._latent_shape)
        network_sigmas = networks.network_levels(settings.num_steps, self._latent_shape)
        # Levels that a pipeline truncates itself are whole already.
        if settings.integer_timesteps and network_sigmas is None:
            network_sigmas = truncated(sigmas[:-1])
        table = solver_table(settings.solver, sigmas)

        @jax.jit
        def latents(
            params: Params,
            adapter: Adapter | None,
            cond: Conditioning,
            negative: Conditioning | None,
            noise: jax.Array,
        ) -> jax.Array:
            def velocity(x: jax.Array, sigma: jax.Array, c: Conditioning) -> jax.Array:
                return networks.velocity(params, adapter, x, sigma, c)

            guided_velocity = guided(velocity, cond, negative, self._guidance_scale)
            return sample(guided_velocity, noise, sigmas, table, network_sigmas)

        return latents

    def close(self) -> None:
        """Lets go of the weights, for good."""
        self._networks = self._decoder = self._adapter = self._texts = None
        self._latents = None
        self._pipelines = PipelineCache()

    def record(
        self, known: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns all that decides what an image looks like, and file hashes that make the next call quick.

        The weights count by their contents, not by their place.
        """
        weights, files = content_hash(self.root, self.family.network_components, known)
        components = self.family.text_components(self.root, self._omit)
        text, text_files = content_hash(self.root, components, known)
        record: dict[str, Any] = {
            "weights": weights[:16],
            "text_encoders": text[:16],
            "adapter": self._digest(),
            "size": [self.size.height, self.size.width],
        }
        if self.size.num_frames > 1:
            record["num_frames"] = self.size.num_frames
        return record | self.plan(), files | text_files

    def plan(self) -> dict[str, Any]:
        """Returns the part of `record` that is known before any weights are read."""
        settings = self._settings
        plan: dict[str, Any] = {}
        # Without one the model decides, once it is open.
        if settings.size is not None:
            plan["size"] = list(settings.size)
        # Folders of images say nothing of frames.
        if settings.num_frames is not None and settings.num_frames > 1:
            plan["num_frames"] = settings.num_frames
        plan |= {
            "seed": settings.seed,
            "steps": settings.num_steps,
            "solver": settings.solver,
            # Every scale that switches guidance off draws the same image.
            "guidance": self._guidance_scale,
            "negative": self._negative,
            "max_sequence_length": self._length,
            "omit_text_encoders": list(self._omit),
            "dtype": self._dtype,
        }
        # Only where it counts: folders of other models say nothing of it.
        if self._embedded_guidance is not None:
            plan["embedded_guidance"] = self._embedded_guidance
        if settings.integer_timesteps:
            plan["integer_timesteps"] = True
        if self._stream_dtype not in ("compute", self._dtype):
            plan["stream_dtype"] = self._stream_dtype
        return plan

    def _digest(self) -> str:
        """Hash of the adapter's values; empty without one."""
        if self._adapter is None:
            return ""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self._adapter):
            # With its path: the same values under other layers are another adapter.
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    def draw(self, texts: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
        """Images of n texts, each from the noise that belongs to its number; after `prepare` and `open`.

        Returns:
          Images float32 [n, H, W, 3] or clips [n, F, H, W, 3], in [0, 1].
        """
        count = len(numbers)
        images = []
        for part in batch_indices(count, self._batch):
            images.append(self._draw_batch([texts[i] for i in part], [numbers[i] for i in part]))
        # The last batch repeats an image until it is full.
        return np.concatenate(images)[:count]

    def _draw_batch(self, texts: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
        """Images of one batch of the compiled size."""
        assert self._networks is not None and self._decoder is not None and self._texts is not None
        cond = self._texts(texts)
        negative = None
        if self._settings.guided:
            negative = self._texts([self._negative] * len(texts))
        key = jax.random.key(self._settings.seed)
        noise = image_noise(key, numbers, self._latent_shape)
        cond, negative, noise = device_mesh.shard_batch(self._mesh, (cond, negative, noise))
        latents = self._latents(self._networks.params, self._adapter, cond, negative, noise)
        at_once = decode_size(len(texts), self._mesh, self._frames_at_once, DECODE_BATCH)
        return np.asarray(as_samples(self._decoder(latents, at_once)))

    def texts(self, number: int, prompt: str) -> dict[str, str]:
        """Returns what is written into the file of image `number`."""
        settings = self._settings
        written = {
            "prompt": prompt,
            "seed": f"{settings.seed}:{number}",
            "model": self.origin,
            "steps": str(settings.num_steps),
            "solver": settings.solver,
            "guidance": f"{self._guidance_scale:g}",
            "size": f"{self.size.height}x{self.size.width}",
            "software": f"marble_jax {VERSION}",
        }
        if self.size.num_frames > 1:
            written["frames"] = str(self.size.num_frames)
            written["frames per second"] = str(self.family.frames_per_second)
        if settings.guided:
            written["negative prompt"] = self._negative
        if settings.integer_timesteps:
            written["timesteps"] = "whole"
        if self._embedded_guidance is not None:
            written["embedded guidance"] = f"{self._embedded_guidance:g}"
        return written


def is_unasked(settings: SamplingSettings) -> bool:
    """Whether settings leave the size to the model."""
    return settings.size is None and settings.num_frames is None


def check_size_option(networks: Networks, size: Size, unasked: bool) -> None:
    """Checks the size of what is to be drawn.

    Args:
      networks: of the model.
      size: wanted.
      unasked: neither an option nor a run says it: it is the model's `default_size`.

    Raises:
      InputError: a size that the model cannot draw.
    """
    try:
        networks.check_size(size, SIZE_OPTIONS)
    except InputError as error:
        # Files of some families are silent on it, and what is published for their kin need not fit.
        if unasked:
            raise InputError(
                f"--size: expected a size for this model, whose files do not say its own; received none, and the "
                f"usual {size} does not fit ({error})"
            ) from error
        raise


def plain_model(path: str) -> ModelSettings:
    """How a model is computed that no run has settings for."""
    dtype = "bfloat16"
    if jax.default_backend() == "cpu":
        # As published models run elsewhere, and a CPU gains nothing from half precision.
        dtype = "float32"
    return ModelSettings(path=path, dtype=dtype, attention="auto")
