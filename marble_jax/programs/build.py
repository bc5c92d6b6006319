"""Builds a run from its configuration: the only module that knows both the ConfigDict and the rooms below."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from marble_jax import distributed
from marble_jax.config import check as check_values
from marble_jax.config import flatten
from marble_jax.console import Console
from marble_jax.convert.lora import read_lora, start_from
from marble_jax.distributed import device_mesh, sharding
from marble_jax.errors import InputError
from marble_jax.evaluation.evaluate import Evaluator
from marble_jax.families.embedding_cache import Embeddings
from marble_jax.families.sd3 import transformer
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.families.sd3.pipeline import Pipeline, find_model, load_pipeline
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import PolicyVelocity, make_sampler
from marble_jax.harmonize.baselines import make_balancer
from marble_jax.networks import attention
from marble_jax.prompts import generated
from marble_jax.prompts.files import Prompt, read_directory
from marble_jax.prompts.groups import shares
from marble_jax.rewards.function import is_function
from marble_jax.rewards.placement import check_groups, place_rewards
from marble_jax.rewards.registry import load_rewards
from marble_jax.rewards.scorer import Scorer
from marble_jax.storage.files import read_json
from marble_jax.streams import Stream, stream_key
from marble_jax.trainable import lora
from marble_jax.trainable.averaging import rollout_decay
from marble_jax.training.iteration import Sampling, Turn
from marble_jax.training.profile import parse_steps
from marble_jax.training.reward_schedule import Presence, make_dropout, parse_stages
from marble_jax.training.rollout import Collector
from marble_jax.training.state import TrainState, initial_state
from marble_jax.training.step_schedule import make_steps
from marble_jax.training.train_step import Recipe

EMBEDDED = "embedded"
DECODED = 32  # images the autoencoder turns from latents to pixels at once
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Batch arithmetic of an optimiser step, derived from prompts x images alone."""

    images: int
    rollout_batches: int
    timesteps: int
    samples: int
    micro_steps: int


@dataclasses.dataclass
class Run:
    """Everything a training run is made of."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    sizes: Sizes
    pipeline: Pipeline
    spec: lora.LoraSpec
    train_prompts: dict[str, list[Prompt]]
    collector: Collector
    evaluator: Evaluator
    optimizer: optax.GradientTransformation
    recipe: Recipe
    steps: Any
    velocity: PolicyVelocity
    state: TrainState

    @property
    def sampling(self) -> Sampling:
        """Which prompts a step draws and how their scores become advantages."""
        rollout, advantages = self.config.rollout, self.config.advantages
        return Sampling(
            self.train_prompts,
            rollout.prompts_per_step,
            rollout.images_per_prompt,
            advantages.scale,
            advantages.scalarize,
            tuple(self.config.advantages.weights),
            presence_of(self.config),
        )

    @property
    def turn(self) -> Turn:
        """What every optimiser step does."""
        merge = (
            jax.jit(partial(lora.merge, scale=self.spec.scale))
            if self.config.rollout.merge_adapter
            else None
        )
        return Turn(
            self.pipeline.params,
            self.collector,
            self.sampling,
            self.steps,
            partial(device_mesh.place_everywhere, self.mesh),
            merge,
        )


def place_of(path: str, kind: str) -> Path:
    """Where a model, prompt or reward directory lies; 'embedded' names the ones shipped with the package."""
    if path == EMBEDDED:
        return Path(str(resources.files("marble_jax") / "embedded" / kind))
    if not path:
        room = "model" if kind == "pipeline" else kind
        raise InputError(f"{room}.path: expected a directory or 'embedded'; received nothing")
    return Path(path)


def reward_place(config: ml_collections.ConfigDict) -> Path | None:
    """The directory of the rewards; None where there is none and all rewards are functions."""
    names = (*config.rewards.train, *config.rewards.heldout)
    if not config.rewards.path and all(is_function(name) for name in names):
        return None
    return place_of(config.rewards.path, "rewards")


def check(config: ml_collections.ConfigDict, backend: str = "") -> None:
    """Everything that is wrong with a configuration and shows without reading a file.

    Args:
      config: the configuration.
      backend: "cpu", "gpu" or "tpu", where it is to run; this machine's by default.

    Raises:
      InputError: a value outside the table of keys, or values that do not fit each other or this machine.
    """
    check_values(flatten(config))
    names, heldout = tuple(config.rewards.train), tuple(config.rewards.heldout)
    if not names:
        raise InputError("rewards.train: expected at least one reward; received none")
    if not config.prompts.sources:
        raise InputError("prompts.sources: expected at least one source; received none")
    for name in heldout:
        if name in names:
            raise InputError(
                f"rewards.heldout: expected rewards that are not trained on; received {name!r}"
            )
    if config.harmonize.alpha_floor > 1 / len(names):
        raise InputError(
            f"harmonize.alpha_floor: expected at most 1/{len(names)}; received "
            f"{config.harmonize.alpha_floor}"
        )
    presence_of(config)
    _check_weights(config)
    parse_steps(config.logging.profile_steps)
    backend = backend or jax.default_backend()
    chosen, dtype = config.model.attention, config.model.dtype
    if attention.FUSED.get(chosen, backend) != backend or chosen == "cudnn" and dtype != "bfloat16":
        needs = "a GPU and bfloat16" if chosen == "cudnn" else "a TPU"
        fitting = attention.choose("auto", DTYPES[dtype], backend)
        raise InputError(
            f"model.attention: expected {fitting!r}, as {chosen} needs {needs}; received {chosen!r} on "
            f"{backend} in {dtype} ('auto' takes what fits)"
        )
    if (
        chosen == "cudnn"
        and jax.default_backend() == backend
        and not attention.has_cudnn(DTYPES[dtype])
    ):
        raise InputError(
            "model.attention: expected a GPU of compute capability 8.0 and a cuDNN that JAX finds for "
            "'cudnn'; received neither or one (pip install nvidia-cudnn-cu12 or -cu13, or 'xla')"
        )
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "logging.wandb: expected the package wandb; received none (pip install wandb)"
        )


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a configuration, over all devices or those given. Raises InputError as `parallel.make_mesh`."""
    return device_mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)


def derive_sizes(config: ml_collections.ConfigDict, num_shards: int) -> Sizes:
    """Checks that prompts, groups, batches and micro-batches fit together; all of them are at least 1.

    Args:
      config: the configuration.
      num_shards: parts that a batch is split into, `parallel.batch_shards`.

    Raises:
      InputError: they do not; the message names the nearest size that does.
    """
    rollout, training = config.rollout, config.training
    images = rollout.prompts_per_step * rollout.images_per_prompt
    for name, size in (
        ("rollout.batch_size", rollout.batch_size),
        ("training.micro_batch_size", training.micro_batch_size),
    ):
        if images % size or size % num_shards:
            fits = [n for n in range(num_shards, images + 1, num_shards) if images % n == 0]
            best = f"; nearest valid {min(fits, key=lambda n: abs(n - size))}" if fits else ""
            raise InputError(
                f"{name}: expected a divisor of the {images} images a step "
                f"({rollout.prompts_per_step} prompts x {rollout.images_per_prompt}) that {num_shards} "
                f"device(s) share evenly; received {size}{best}"
            )
    timesteps = max(1, int(training.timestep_fraction * rollout.num_steps))
    samples = images * timesteps
    return Sizes(
        images,
        images // rollout.batch_size,
        timesteps,
        samples,
        samples // training.micro_batch_size,
    )


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW behind clipping to a global norm."""
    training = config.training
    rate: Any = training.learning_rate
    if training.learning_rate_schedule == "cosine":
        rate = optax.cosine_decay_schedule(
            training.learning_rate, training.num_steps, training.min_learning_rate_ratio
        )
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(
            rate,
            b1=training.beta1,
            b2=training.beta2,
            eps=training.epsilon,
            weight_decay=training.weight_decay,
        ),
    )


def decode_size(count: int, mesh: Mesh) -> int:
    """Images decoded at once, over all devices, of `count` in a batch."""
    shards = device_mesh.image_shards(mesh, count)
    return min(count, shards * max(1, DECODED // shards))


def chunk_size(config: ml_collections.ConfigDict, num_shards: int) -> int:
    """Samples pulled back together, over all devices: as many as `harmonize.chunk_size` allows and divide evenly."""
    share = config.training.micro_batch_size // num_shards
    return num_shards * max(
        c for c in range(1, share + 1) if share % c == 0 and c <= config.harmonize.chunk_size
    )


def make_recipe(
    config: ml_collections.ConfigDict, sizes: Sizes, mesh: Mesh, balancer: Any, shift: float
) -> Recipe:
    """What an optimiser step does, for a model whose noise levels are shifted by `shift`."""
    sigmas = sigma_grid(config.rollout.num_steps, shift)
    return Recipe(
        sigmas=tuple(float(s) for s in sigmas[:-1]),
        num_timesteps=sizes.timesteps,
        micro_batch=config.training.micro_batch_size,
        chunk=chunk_size(config, device_mesh.batch_shards(mesh)),
        anchor_every=config.harmonize.anchor_every,
        num_rewards=len(config.rewards.train),
        scalarized=config.advantages.scalarize != "none",
        nft_beta=config.nft.beta,
        kl_weight=config.nft.kl_weight,
        clip=config.advantages.clip,
        balancer=balancer,
        rho=config.harmonize.rho,
        smooth=config.harmonize.mode == "exact" and config.harmonize.smooth_exact,
        old_schedule=rollout_decay(
            config.rollout_policy.schedule,
            rate=config.rollout_policy.rate,
            cap=config.rollout_policy.cap,
            delay=config.rollout_policy.delay,
        ),
        ema_decay=config.ema.decay,
        shards=device_mesh.Shards(mesh),
    )


def balancer_of(config: ml_collections.ConfigDict) -> Any:
    """The balancer with the settings that belong to it."""
    harmonize = config.harmonize
    settings: dict[str, Any] = {}
    if harmonize.balancer == "marble":
        settings = {
            "normalize": harmonize.normalize,
            "reward_weights": tuple(harmonize.reward_weights),
            "alpha_floor": harmonize.alpha_floor,
            "groups": group_indices(config),
        }
    elif harmonize.balancer == "fixed":
        settings = {"alpha": tuple(harmonize.fixed_alpha), "normalize": harmonize.normalize}
    elif harmonize.balancer == "equal":
        settings = {"normalize": harmonize.normalize}
    if harmonize.groups and harmonize.balancer != "marble":
        raise InputError(
            f"harmonize.groups: expected none with another balancer than marble; received "
            f"{', '.join(harmonize.groups)} with {harmonize.balancer!r}"
        )
    for key, values, what in (
        ("reward_weights", harmonize.reward_weights, "number"),
        ("fixed_alpha", harmonize.fixed_alpha, "number"),
        ("groups", harmonize.groups, "name"),
    ):
        if values and len(values) != len(config.rewards.train):
            raise InputError(
                f"harmonize.{key}: expected one {what} for each of {len(config.rewards.train)} rewards "
                f"(--config.harmonize.{key}= for none); received {len(values)}"
            )
    return make_balancer(harmonize.balancer, **settings)


def _check_weights(config: ml_collections.ConfigDict) -> None:
    """Raises InputError unless weights of a scalarized advantage are one a reward, and go with one."""
    weights, count = config.advantages.weights, len(config.rewards.train)
    if weights and config.advantages.scalarize == "none":
        raise InputError(
            "advantages.weights: expected none without advantages.scalarize (harmonize.reward_weights weighs "
            f"unit gradients); received {tuple(weights)}"
        )
    if weights and len(weights) != count:
        raise InputError(
            f"advantages.weights: expected one number for each of {count} rewards "
            f"(--config.advantages.weights= for none); received {len(weights)}"
        )


def group_indices(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Index of each reward's group, groups counted by first appearance; empty for none."""
    order = {name: index for index, name in enumerate(dict.fromkeys(config.harmonize.groups))}
    return tuple(order[name] for name in config.harmonize.groups)


def presence_of(config: ml_collections.ConfigDict) -> Presence:
    """Which rewards teach when: the stages and the reward dropout of a configuration."""
    scheduled, names = config.reward_schedule, tuple(config.rewards.train)
    stages = parse_stages(
        scheduled.stages, names, tuple(config.prompts.sources), config.training.num_steps
    )
    return Presence(
        stages,
        make_dropout(scheduled.dropout_targets, scheduled.dropout, scheduled.dropout_warmup, names),
    )


def load_model(
    config: ml_collections.ConfigDict,
    spec: lora.LoraSpec,
    mesh: Mesh | None = None,
    text_encoders: bool = True,
) -> Pipeline:
    """The pipeline of `model.path`, its transformer laid out over the mesh, with its text encoders or without."""
    root = find_model(
        place_of(config.model.path, "pipeline"),
        text_encoder_3="text_encoder_3" not in config.model.omit_text_encoders,
    )
    place = gather = None
    if mesh is not None:
        width = MMDiTConfig.from_dict(
            read_json(root / "transformer" / "config.json")
        ).attention_head_dim
        gather = sharding.gather(mesh, width)

        def place(component: str, path: tuple[str, ...], leaf: Any) -> jax.Array:
            return device_mesh.read_into(
                sharding.sharding_of(mesh, component, path, leaf.shape, width), leaf
            )

    return load_pipeline(
        root,
        dtype=DTYPES[config.model.dtype],
        place=place,
        text_encoder_3="text_encoder_3" not in config.model.omit_text_encoders,
        text_encoders=text_encoders,
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention=attention_of(config, mesh),
        lora_scale=spec.scale,
        gather=gather,
    )


def attention_of(
    config: ml_collections.ConfigDict, mesh: Mesh | None
) -> str | attention.FusedAttention:
    """The implementation of `model.attention` for batches that are split over the mesh."""
    if mesh is None:
        return config.model.attention
    return attention.over(config.model.attention, DTYPES[config.model.dtype], mesh)


def text_embeddings(
    config: ml_collections.ConfigDict, root: Path, texts: Sequence[str]
) -> Embeddings:
    """Conditioning of a run's texts. With a cache on disk all of them are there on return, and no encoder in memory.

    The first process fills the cache, and then every other one what it does not find there.
    """

    def ready() -> Embeddings:
        found = Embeddings(
            root,
            config.model.max_sequence_length,
            DTYPES[config.model.dtype],
            t5="text_encoder_3" not in config.model.omit_text_encoders,
            cache=config.prompts.embedding_cache,
        )
        if not config.prompts.embedding_cache:
            found.load()
            return found
        missing, console = len(found.missing(texts)), Console()
        if missing:
            console.say(
                f"text embeddings: {missing} of {len(set(texts))} prompts to encode into "
                f"{config.prompts.embedding_cache}, before the transformer is loaded"
            )
        with console.bar(missing, "text embeddings", "prompt") as bar:
            found.fill(texts, bar.update)
        return found

    return (
        distributed.together("text embeddings", ready if distributed.is_first() else lambda: None)
        or ready()
    )


def read_prompts(
    place: str, split: str, sources: tuple[str, ...] | None = None
) -> dict[str, list[Prompt]]:
    """The prompts of a split, by source: from a directory, or the sets that need none."""
    if place == generated.NAME:
        return generated.generate(split, sources)
    return read_directory(place_of(place, "prompts"), split, sources)


def held_out_prompts(config: ml_collections.ConfigDict) -> list[Prompt]:
    """The first test prompts of every source, in equal shares, sources in turn."""
    sources = tuple(config.evaluation.sources) or tuple(config.prompts.sources)
    by_source = read_prompts(config.prompts.path, "test", sources)
    counts = shares(sorted(by_source), config.evaluation.num_prompts)
    return [p for name, count in counts.items() for p in by_source[name][:count]]


def lora_spec(config: ml_collections.ConfigDict) -> lora.LoraSpec:
    return lora.LoraSpec(
        config.lora.rank, config.lora.alpha, tuple(config.lora.targets) or lora.ATTENTION_TARGETS
    )


def build(config: ml_collections.ConfigDict) -> Run:
    """Everything for training; reads models, prompts and rewards, computes nothing.

    Raises:
      InputError: whatever in the configuration, or in the files it names, does not fit.
    """
    check(config)
    names = tuple(config.rewards.train)
    balancer = balancer_of(config)
    mesh = make_mesh(config)
    sizes = derive_sizes(config, device_mesh.batch_shards(mesh))
    spec = lora_spec(config)
    train_prompts = read_prompts(config.prompts.path, "train", tuple(config.prompts.sources))
    test_prompts = held_out_prompts(config)
    root = find_model(
        place_of(config.model.path, "pipeline"),
        text_encoder_3="text_encoder_3" not in config.model.omit_text_encoders,
    )
    rollout = config.rollout
    rewards = load_rewards(
        reward_place(config),
        (*names, *config.rewards.heldout),
        config.rewards.num_workers,
        upstream=config.rewards.upstream_scoring,
    )
    for reward in rewards[: len(names)]:
        check_groups(
            reward, mesh, rollout.prompts_per_step, rollout.images_per_prompt, rollout.batch_size
        )
    place_rewards(mesh, rewards)
    encode = text_embeddings(
        config, root, [p.text for p in (*itertools.chain(*train_prompts.values()), *test_prompts)]
    )
    pipeline = load_model(config, spec, mesh, text_encoders=False)
    latent_shape = pipeline.latent_shape(config.model.height, config.model.width)
    cell, largest = (
        config.model.height // latent_shape[0],
        pipeline.model.side * pipeline.model.config.patch_size,
    )
    if max(latent_shape[:2]) > largest:
        raise InputError(
            f"model.height, model.width: expected at most the model's {largest * cell} pixels; received "
            f"{config.model.height} x {config.model.width}"
        )

    def velocity(
        params: Any, adapter: Any, xt: jax.Array, sigma: jax.Array, cond: Any
    ) -> jax.Array:
        return transformer.velocity(pipeline.model, params, adapter, xt, sigma, cond)

    def scorer(chosen: list[Any]) -> Scorer:
        return Scorer(
            chosen,
            config.rewards.num_workers,
            config.rewards.on_error,
            config.rewards.max_missing_share,
            config.rewards.timeout,
        )

    shift = pipeline.scheduler.shift

    def decode(latents: jax.Array) -> jax.Array:
        place = partial(distributed.put, sharding=device_mesh.image_sharding(mesh, len(latents)))
        return place(pipeline.decode(latents, decode_size(len(latents), mesh), place))

    collector = Collector(
        make_sampler(velocity, rollout.num_steps, rollout.solver, shift, rollout.integer_timesteps),
        encode,
        decode,
        scorer(rewards[: len(names)]),
        latent_shape,
        rollout.batch_size,
        partial(device_mesh.place_batch, mesh),
        partial(device_mesh.place_everywhere, mesh),
    )
    evaluator = Evaluator(
        test_prompts,
        make_sampler(velocity, config.evaluation.num_steps, config.evaluation.solver, shift),
        encode,
        decode,
        scorer(rewards),
        latent_shape,
        rollout.batch_size,
        config.evaluation.seed,
        config.evaluation.num_images,
        config.evaluation.images_per_prompt,
        partial(device_mesh.place_batch, mesh),
    )
    optimizer = make_optimizer(config)
    recipe = make_recipe(config, sizes, mesh, balancer, shift)
    adapter = lora.init_adapter(
        stream_key(jax.random.key(config.seed), Stream.ADAPTER), pipeline.params, spec
    )
    if config.lora.init:
        adapter = start_from(
            read_lora(config.lora.init, pipeline.params, SD3_FORMATS),
            adapter,
            pipeline.params,
            spec,
        )
    state = device_mesh.place_everywhere(
        mesh, initial_state(adapter, optimizer, len(names), balancer.init(len(names)), config.seed)
    )
    steps = make_steps(
        recipe, velocity, optimizer, config.harmonize.mode, config.harmonize.refresh_every
    )
    return Run(
        config,
        mesh,
        sizes,
        pipeline,
        spec,
        train_prompts,
        collector,
        evaluator,
        optimizer,
        recipe,
        steps,
        velocity,
        state,
    )
