"""Images of prompts from a model, or from a policy of a training run, as files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from marble_jax import platform
from marble_jax.config import KEYS, default_config
from marble_jax.console import Console
from marble_jax.convert.lora import add_loras
from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError, one_of
from marble_jax.families.embedding_cache import Embeddings
from marble_jax.families.sd3 import transformer
from marble_jax.families.sd3.pipeline import Pipeline, find_model, load_pipeline
from marble_jax.families.sd3.text import has_t5, identity
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import image_noise
from marble_jax.flow.sampler import guided, sample
from marble_jax.flow.solvers import SOLVERS, solver_table
from marble_jax.harmonize.registry import balancer_of
from marble_jax.networks.attention import over
from marble_jax.programs import build
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.images import ImageFolder, writable
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable import lora
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.state import initial_state
from marble_jax.types import Adapter, Conditioning
from marble_jax.version import VERSION
from marble_jax.weights.content_hash import content_hash

EMBEDDED_TOKENS, DEFAULT_TOKENS = 12, 256
DECODE_BATCH = 8  # images the autoencoder works on at once


def run_config(workdir: Workdir) -> ml_collections.ConfigDict:
    """The configuration a run was started with.

    Raises:
      InputError: there is no run, or its record is damaged.
    """
    if not (workdir.path / "config.json").exists():
        raise InputError(
            f"--workdir: expected a training run (with config.json); received {workdir.path}"
        )
    config = default_config()
    for name, value in workdir.config().items():
        if name in KEYS:
            *rooms, leaf = name.split(".")
            node = config
            for room in rooms:
                node = node[room]
            node[leaf] = tuple(value) if isinstance(value, list) else value
    return config


def run_adapter(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    shapes: Any,
    policy: str,
    step: int | None = None,
) -> tuple[Adapter, int]:
    """A policy's adapter from a checkpoint, and the step it is of.

    Args:
      config: configuration of the run.
      workdir: the run.
      shapes: parameters or abstract parameters of its transformer.
      policy: field of the state: "current", "rollout", "ema" or "best".
      step: of the checkpoint; the newest if None.

    Raises:
      InputError: no such checkpoint, or one of another configuration.
    """
    spec, count = build.lora_spec(config), len(config.rewards.train)
    adapter = lora.init_adapter(jax.random.key(0), shapes, spec)
    blank = initial_state(
        adapter,
        make_optimizer(config.training),
        count,
        balancer_of(config.harmonize, config.rewards.train).init(count),
        0,
    )
    if not workdir.checkpoints.exists():
        raise InputError(
            f"--workdir: expected a run with a checkpoint; received {workdir.path}, which has none yet"
        )
    checkpoints = Checkpoints(workdir.checkpoints, say=Console().say)
    try:
        step, state = checkpoints.restore(blank, step)
    finally:
        checkpoints.close()
    if policy == "best" and not np.isfinite(state.best_score):
        raise InputError(
            f"policy: expected one that the run has; received 'best' of {workdir.path}, where no "
            "evaluation since the start is on record"
        )
    return getattr(state, policy), int(state.best_step) if policy == "best" else step


@dataclasses.dataclass(frozen=True)
class Source:
    """What draws: a model, or a policy of a training run, perhaps with LoRAs on top.

    Attributes:
      model: diffusers-layout directory, hub id or "embedded"; or empty with `workdir`.
      workdir: a training run.
      policy: which of the run's policies; "base" is its model without adapter.
      loras: LoRAs to add, `PATH[:weight],PATH[:weight]`.
    """

    model: str = ""
    workdir: str = ""
    policy: str = "ema"
    loras: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are drawn.

    Attributes:
      seed: image i starts from noise of (seed, i).
      num_steps: solver steps.
      solver: name of the solver.
      guidance: classifier-free guidance scale; 1 or less is off.
      negative: the negative prompt, used with guidance.
      size: (height, width) in pixels; the run's, or the model's own when None.
      tokens: T5 tokens a prompt; the run's, 12 for the embedded model, 256 for others when None.
      t5: False leaves T5 out; True uses it if the model (and the run) does.
      batch: images at once.
      embedding_cache: folder of text embeddings; with one, no text encoder is in memory while images are drawn.
    """

    seed: int = 0
    num_steps: int = 40
    solver: str = "euler"
    guidance: float = 1.0
    negative: str = ""
    size: tuple[int, int] | None = None
    tokens: int | None = None
    t5: bool = True
    batch: int = 8
    embedding_cache: str = ""


class Models:
    """Loads models; keeps the last one, so that policies and LoRAs of one base share it."""

    def __init__(self) -> None:
        self._key: Any = None
        self._pipeline: Pipeline | None = None
        self._texts: dict[Any, Embeddings] = {}

    def pipeline(self, root: pathlib.Path, dtype: str, attention: str, mesh: Mesh) -> Pipeline:
        """The networks in `root` without text encoders, on all devices."""
        key = (root, dtype, attention)
        if key != self._key:
            self._pipeline = None  # before the next one is read
            everywhere = NamedSharding(mesh, device_mesh.REPLICATED)
            self._pipeline = load_pipeline(
                root,
                dtype=build.DTYPES[dtype],
                text_encoders=False,
                attention=over(attention, build.DTYPES[dtype], mesh),
                place=lambda component, path, leaf: device_mesh.read_sharded(everywhere, leaf),
            )
            self._key = key
        return self._pipeline

    def texts(
        self, root: pathlib.Path, tokens: int, dtype: str, t5: bool, cache: str
    ) -> Embeddings:
        """Conditioning by the text encoders in `root`."""
        key = (root, tokens, dtype, t5, cache)
        for other, held in self._texts.items():
            if other != key:
                held.release()
        if key not in self._texts:
            self._texts[key] = Embeddings(root, tokens, build.DTYPES[dtype], t5=t5, cache=cache)
        return self._texts[key]


class Painter:
    """A source ready to draw.

    Attributes:
      origin: what draws, in words.
      config: the run's configuration; None for a plain model.
    """

    def __init__(self, source: Source, settings: Settings, models: Models | None = None):
        """Finds the model and reads the run's configuration; weights are read by `open`.

        Raises:
          InputError: no such model or run, or settings that do not fit it.
        """
        one_of("--solver", settings.solver, SOLVERS)
        self._source, self._settings, self._models = source, settings, models or Models()
        self._place, self.config = None, None
        where, tokens, t5 = source.model, settings.tokens, settings.t5
        self._dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self._attention = "auto"
        self.origin = source.model
        if source.workdir:
            self._place = Workdir(source.workdir)
            self.config = config = run_config(self._place)
            where, self._dtype, self._attention = (
                config.model.path,
                config.model.dtype,
                config.model.attention,
            )
            tokens, t5 = (
                tokens or config.model.max_sequence_length,
                t5 and "text_encoder_3" not in config.model.omit_text_encoders,
            )
            self.origin = f"{source.workdir} {source.policy}"
        self.root = find_model(build.place_of(where, "pipeline"), text_encoder_3=t5)
        self._tokens = tokens or (EMBEDDED_TOKENS if where == build.EMBEDDED else DEFAULT_TOKENS)
        self._t5 = t5 and has_t5(self.root)
        self._mesh = device_mesh.make_mesh()
        self._batch = -(-settings.batch // self._mesh.size) * self._mesh.size
        self._pipeline: Pipeline | None = None

    def prepare(self, texts: Sequence[str], console: Console) -> None:
        """Before `open`: with an embedding cache, encodes all texts and lets go of the text encoders."""
        self._cond = self._models.texts(
            self.root, self._tokens, self._dtype, self._t5, self._settings.embedding_cache
        )
        if not self._settings.embedding_cache or not texts:
            return
        texts = [*texts, *([self._settings.negative] if self._settings.guidance > 1 else [])]
        with console.bar(len(self._cond.missing(texts)), "text embeddings", "prompt") as bar:
            self._cond.fill(texts, bar.update)

    def open(self, draws: bool = True) -> None:
        """Reads the weights; those of text encoders only if something is to be drawn that no cache has ready.

        Raises:
          InputError: damaged files, no checkpoint of the run, a LoRA that does not fit, or a size that the model
            cannot draw.
        """
        if self._pipeline is not None:
            return
        pipeline = self._models.pipeline(self.root, self._dtype, self._attention, self._mesh)
        network, adapter = pipeline.model, None
        if self._place is not None and self._source.policy != "base":
            adapter, step = run_adapter(
                self.config, self._place, pipeline.params, self._source.policy
            )
            network = network.clone(lora_scale=build.lora_spec(self.config).scale)
            self.origin = f"{self._source.workdir} {self._source.policy} after step {step}"
        adapter = add_loras(self._source.loras, pipeline.params, network.lora_scale, adapter)
        self.origin += f" with {self._source.loras}" if self._source.loras else ""
        self._adapter = None if adapter is None else device_mesh.replicate(self._mesh, adapter)
        side = pipeline.model.config.sample_size * pipeline.vae.config.downsampling
        own = (side, side)
        if self.config is not None:
            own = self.config.model.height, self.config.model.width
        self._shape = pipeline.latent_shape(*(self._settings.size or own))
        cell, largest = (
            pipeline.vae.config.downsampling,
            pipeline.model.side * pipeline.model.config.patch_size,
        )
        if max(self._shape[:2]) > largest:
            raise InputError(
                f"--size: expected at most the model's {largest * cell} pixels; received "
                f"{self._shape[0] * cell} x {self._shape[1] * cell}"
            )
        self.size = self._shape[0] * cell, self._shape[1] * cell
        settings = self._settings
        sigmas = sigma_grid(
            settings.num_steps, pipeline.scheduler.shift, pipeline.scheduler.num_train_timesteps
        )
        table = solver_table(settings.solver, sigmas)

        @jax.jit
        def latents(
            params: Any,
            adapter: Adapter | None,
            cond: Conditioning,
            away: Conditioning | None,
            noise: jax.Array,
        ) -> jax.Array:
            def velocity(x: jax.Array, sigma: jax.Array, c: Conditioning) -> jax.Array:
                return transformer.velocity(network, params, adapter, x, sigma, c)

            return sample(guided(velocity, cond, away, settings.guidance), noise, sigmas, table)

        if draws and not settings.embedding_cache:
            self._cond.load()
        self._latents, self._pipeline = latents, pipeline

    def close(self) -> None:
        """Lets go of the weights, for good."""
        self._pipeline = self._latents = self._adapter = self._cond = self._models = None

    def record(
        self, known: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that decides what an image looks like, and file hashes that make the next call quick.

        The weights count by their contents, not by their place.
        """
        weights, files = content_hash(self.root, ("transformer", "vae", "scheduler"), known)
        text, more = identity(self.root, self._t5, known)
        found = {"weights": weights[:16], "text_encoders": text[:16], "adapter": self._digest()}
        return found | {"size": list(self.size)} | self.plan(), files | more

    def plan(self) -> dict[str, Any]:
        """The part of `record` that is known before any weights are read."""
        settings = self._settings
        return {
            "seed": settings.seed,
            "steps": settings.num_steps,
            "solver": settings.solver,
            "guidance": max(settings.guidance, 1.0),
            "negative": settings.negative if settings.guidance > 1 else "",
            "tokens": self._tokens,
            "t5": self._t5,
            "dtype": self._dtype,
        }

    def _digest(self) -> str:
        """Hash of the adapter's values; empty without one."""
        if self._adapter is None:
            return ""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self._adapter):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    def draw(self, texts: Sequence[str], index: Sequence[int]) -> np.ndarray:
        """Images float32 [n, H, W, 3] in [0, 1] of n texts, from the noise that belongs to their numbers."""
        n = len(index)
        rows = np.minimum(np.arange(-(-n // self._batch) * self._batch), n - 1)
        found = []
        for part in np.split(rows, len(rows) // self._batch):
            cond = self._cond([texts[i] for i in part])
            away = (
                self._cond([self._settings.negative] * len(part))
                if self._settings.guidance > 1
                else None
            )
            noise = image_noise(
                jax.random.key(self._settings.seed), [index[i] for i in part], self._shape
            )
            cond, away, noise = device_mesh.shard_batch(self._mesh, (cond, away, noise))
            drawn = self._latents(self._pipeline.params, self._adapter, cond, away, noise)
            found.append(
                np.asarray(
                    self._pipeline.decode(drawn, min(len(part), max(self._mesh.size, DECODE_BATCH)))
                )
            )
        return np.concatenate(found)[:n]

    def texts(self, index: int, prompt: str) -> dict[str, str]:
        """What is written into image `index`."""
        settings = self._settings
        written = {
            "prompt": prompt,
            "seed": f"{settings.seed}:{index}",
            "model": self.origin,
            "steps": str(settings.num_steps),
            "solver": settings.solver,
            "guidance": f"{settings.guidance:g}",
            "size": "x".join(map(str, self.size)),
            "software": f"marble_jax {VERSION}",
        }
        return written | ({"negative prompt": settings.negative} if settings.guidance > 1 else {})


def fill_album(
    album: ImageFolder,
    painter: Painter,
    prompts: Sequence[str],
    batch: int,
    console: Console,
    what: str,
) -> int:
    """Draws the images that an album lacks; a kill loses at most one batch.

    Returns:
      How many were drawn.

    Raises:
      InputError: the folder holds images of another making, or cannot be written to.
    """
    album.check(painter.plan(), prompts, partial=True)
    todo = album.missing(len(prompts))
    painter.prepare([prompts[i] for i in todo], console)
    painter.open(bool(todo))
    hashes = album.path / "hashes.json"
    known = _read_hashes(hashes)
    settings, files = painter.record(known)
    album.claim(settings, prompts)
    if files != known:
        with writable(album.path):
            Workdir(album.path).write_json(hashes.name, files)
    height, width = painter.size
    console.say(
        f"{what}: {len(prompts)} images of {height} x {width} px, {len(prompts) - len(todo)} already in "
        f"{album.path}; {painter.origin}"
    )
    with console.bar(len(todo), what, "img") as bar:
        for start in range(0, len(todo), batch):
            chosen = todo[start : start + batch]
            for i, image in zip(chosen, painter.draw([prompts[i] for i in chosen], chosen)):
                album.save(i, image, painter.texts(i, prompts[i]))
            bar.update(len(chosen))
    return len(todo)


def _read_hashes(file: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def draw_images(
    prompts: Sequence[str], out: str, source: Source, settings: Settings, with_grid: bool
) -> None:
    """Writes `out/00000.png` and so on; an image that is there is not drawn again.

    Args:
      prompts: N texts.
      out: directory.
      source: what draws.
      settings: how.
      with_grid: also write `grid.png`.

    Raises:
      InputError: see `Painter` and `ImageFolder.check`.
    """
    if not prompts:
        raise InputError("prompts: expected at least one; received none")
    platform.keep_compilations()
    console, album, painter = Console(), ImageFolder(out), Painter(source, settings)
    fill_album(album, painter, prompts, settings.batch, console, "sample")
    if with_grid:
        album.save_grids(len(prompts))
    console.say(f"images: {album.path}")
