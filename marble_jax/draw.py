"""Pictures of prompts from a model, or from a policy of a training run, as files."""
from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from marble_jax import adapters, compose, platform
from marble_jax.checkpoint import Checkpoints
from marble_jax.config import KEYS, default_config
from marble_jax.console import Console
from marble_jax.convert.lora import add_loras
from marble_jax.errors import InputError, one_of
from marble_jax.flow.sampler import guided, sample
from marble_jax.flow.schedule import sigma_grid
from marble_jax.flow.solvers import SOLVERS, solver_table
from marble_jax.models import mmdit
from marble_jax.models.pipeline import load_pipeline
from marble_jax.pictures import grid, save_png
from marble_jax.sampling import batches, picture_noise
from marble_jax.training.state import initial_state
from marble_jax.types import Adapter, Conditioning
from marble_jax.workdir import Workdir

EMBEDDED_TOKENS, DEFAULT_TOKENS = 12, 256


def run_config(workdir: Workdir) -> ml_collections.ConfigDict:
    """The configuration a run was started with.

    Raises:
      InputError: there is no run.
    """
    file = workdir.path / "config.json"
    if not file.exists():
        raise InputError(f"--workdir: expected a training run (with config.json); received {workdir.path}")
    config = default_config()
    for name, value in json.loads(file.read_text()).items():
        if name in KEYS:
            *rooms, leaf = name.split(".")
            node = config
            for room in rooms:
                node = node[room]
            node[leaf] = tuple(value) if isinstance(value, list) else value
    return config


def run_adapter(
    config: ml_collections.ConfigDict, workdir: Workdir, shapes: Any, policy: str, step: int | None = None
) -> tuple[Adapter, int]:
    """A policy's adapter from a checkpoint, and the step it is of.

    Args:
      config: configuration of the run.
      workdir: the run.
      shapes: parameters or abstract parameters of its transformer.
      policy: field of the state: "current", "old", "ema" or "best".
      step: of the checkpoint; the newest if None.

    Raises:
      InputError: no such checkpoint, or one of another configuration.
    """
    spec, count = compose.lora_spec(config), len(config.rewards.train)
    adapter = adapters.init_adapter(jax.random.key(0), shapes, spec)
    blank = initial_state(adapter, compose.make_optimizer(config), count, compose.balancer_of(config).init(count), 0)
    if not workdir.checkpoints.exists():
        raise InputError(f"--workdir: expected a run with a checkpoint; received {workdir.path}, which has none yet")
    checkpoints = Checkpoints(workdir.checkpoints)
    try:
        step, state = checkpoints.restore(blank, step)
    finally:
        checkpoints.close()
    if policy == "best" and not np.isfinite(state.best_score):
        raise InputError(f"policy: expected one that the run has; received 'best' of {workdir.path}, where no "
                         "evaluation since the start is on record")
    return getattr(state, policy), int(state.best_step) if policy == "best" else step


def draw_pictures(prompts: Sequence[str], out: str, *, model: str, workdir: str, policy: str, seed: int, num_steps: int,
                  solver: str, guidance: float, negative: str, size: tuple[int, int] | None, tokens: int | None,
                  batch: int, with_grid: bool, loras: str = "") -> None:
    """Writes `out/00000.png` and so on; a picture that is there is not drawn again.

    Args:
      prompts: N texts.
      out: directory.
      model: diffusers-layout directory, hub id or "embedded"; or empty with `workdir`.
      workdir: a training run.
      policy: which of the run's policies; "base" is its model without adapter.
      seed: picture i starts from noise of (seed, i).
      num_steps: solver steps.
      solver: name of the solver.
      guidance: classifier-free guidance scale; 1 or less is off.
      negative: the negative prompt, used with guidance.
      size: (height, width) in pixels; the run's, or the model's own when None.
      tokens: T5 tokens a prompt.
      batch: pictures at once.
      with_grid: also write `grid.png`.
      loras: LoRAs to add, `PATH[:weight],PATH[:weight]`.
    """
    one_of("--solver", solver, SOLVERS)
    if not prompts:
        raise InputError("prompts: expected at least one; received none")
    platform.keep_compilations()
    console = Console()
    adapter, where, origin = None, model, model
    if workdir:
        place = Workdir(workdir)
        config = run_config(place)
        spec = compose.lora_spec(config)
        pipeline = compose.load_model(config, spec)
        where, tokens = config.model.path, tokens or config.model.max_sequence_length
        size = size or (config.model.resolution,) * 2
        if policy != "base":
            adapter, step = run_adapter(config, place, pipeline.params, policy)
            origin = f"{workdir} {policy} after step {step}"
    else:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        pipeline = load_pipeline(compose.place_of(model, "pipeline"), dtype=dtype)
    adapter = add_loras(loras, pipeline.params, pipeline.model.lora_scale, adapter)
    origin = f"{origin} with {loras}" if loras else origin
    tokens = tokens or (EMBEDDED_TOKENS if where == compose.EMBEDDED else DEFAULT_TOKENS)
    side = pipeline.model.config.sample_size * pipeline.vae.config.downsampling
    shape = pipeline.latent_shape(*(size or (side, side)))
    sigmas = sigma_grid(num_steps, pipeline.scheduler.shift)
    table = solver_table(solver, sigmas)

    @jax.jit
    def latents(params: Any, adapter: Adapter | None, cond: Conditioning, away: Conditioning | None,
                noise: jax.Array) -> jax.Array:
        def velocity(x: jax.Array, sigma: jax.Array, c: Conditioning) -> jax.Array:
            return mmdit.velocity(pipeline.model, params, adapter, x, sigma, c)

        return sample(guided(velocity, cond, away, guidance), noise, sigmas, table)

    folder = epath.Path(out)
    todo = [i for i in range(len(prompts)) if not (folder / f"{i:05d}.png").exists()]
    console.say(f"{len(prompts)} prompts, {len(prompts) - len(todo)} already in {folder}; {origin}, {num_steps} steps "
                f"of {solver}, guidance {guidance:g}, {shape[0] * pipeline.vae.config.downsampling} px")
    key = jax.random.key(seed)
    with console.bar(len(todo), "sample", "img") as bar:
        for rows in batches(len(todo), min(batch, len(todo)) or 1):
            chosen = [todo[r] for r in rows]
            cond = pipeline.encode_prompts([prompts[i] for i in chosen], tokens)
            away = pipeline.encode_prompts([negative] * len(chosen), tokens) if guidance > 1 else None
            noise = picture_noise(key, chosen, shape)
            pictures = np.asarray(pipeline.decode(latents(pipeline.params, adapter, cond, away, noise), len(chosen)))
            for i, picture in dict(zip(chosen, pictures)).items():
                save_png(folder / f"{i:05d}.png", picture, {
                    "prompt": prompts[i], "seed": f"{seed}:{i}", "model": origin, "steps": str(num_steps),
                    "solver": solver, "guidance": f"{guidance:g}"})
            bar.update(len(set(chosen)))
    if with_grid:
        from PIL import Image

        shown = [np.asarray(Image.open((folder / f"{i:05d}.png").open("rb"))) for i in range(min(len(prompts), 64))]
        save_png(folder / "grid.png", grid(shown, 8))
    console.say(f"pictures: {folder}")
