"""Builds a training run from its settings: every part made and put together, nothing computed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from marble_jax import platform
from marble_jax.config import Settings
from marble_jax.convert.lora import start_from
from marble_jax.convert.lora_reading import read_lora
from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError
from marble_jax.evaluation.evaluate import Evaluator
from marble_jax.families.base import Family, Networks
from marble_jax.families.descriptions import Size
from marble_jax.families.embedding_cache import EmbeddingCache
from marble_jax.flow.guided_policy import guided_policy
from marble_jax.harmonize.registry import balancer_of
from marble_jax.networks.quantized import MODEL_PRODUCTS, quantize_blocks
from marble_jax.objectives.registry import make_objective
from marble_jax.programs.build_rewards import make_scorer, open_rewards
from marble_jax.programs.check_settings import check_settings
from marble_jax.programs.drawn_prompts import sampling_of, texts_to_draw
from marble_jax.programs.imaging import Imaging, make_decoder
from marble_jax.programs.locations import embedding_folder, held_out_prompts, read_prompts
from marble_jax.programs.noisy_rollouts import timesteps_of, trains_guided
from marble_jax.programs.open_model import (
    check_model,
    encode_ahead,
    locate,
    open_networks,
    size_of,
    text_embeddings,
)
from marble_jax.programs.prompt_remarks import Reach, cut_lines, reach_of
from marble_jax.programs.run_state import new_state
from marble_jax.programs.upstream import upstream_rules
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.groups import by_source
from marble_jax.rewards.base import Reward
from marble_jax.rewards.placement import rows_together
from marble_jax.streams import Stream, stream_key
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import (
    Sizes,
    chunk_size,
    derive_sizes,
    is_stochastic,
    kept_shape,
    window_of,
)
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.latent_layout import is_split, make_stack
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.recipe import (
    MicroBatching,
    Recipe,
    averages_of,
    harmonization_of,
)
from marble_jax.training.rollout import Collector
from marble_jax.training.rounding import floor_of, marks
from marble_jax.training.state import TrainState
from marble_jax.training.step_schedule import Steps, make_steps
from marble_jax.types import Adapter, Conditioning, PolicyVelocity


@dataclasses.dataclass
class Run:
    """Everything a training run is made of.

    Attributes:
      settings: the run was built from.
      mesh: its devices.
      sizes: batch arithmetic of a step.
      family: of the model.
      networks: the frozen networks.
      spec: of the adapter.
      train_prompts: by source.
      sampling: which of them a step draws.
      encode: conditioning of prompts.
      collector: samples and scores rollouts.
      evaluator: samples and scores held-out prompts.
      recipe: what an optimiser step does.
      optimizer: of the adapter.
      steps: the compiled optimiser steps.
      state: before the first step.
      reach: of each reward that is trained on over the training prompts.
      negative: conditioning of the negative prompt, where the policy that is trained is guided.
    """

    settings: Settings
    mesh: Mesh
    sizes: Sizes
    family: Family
    networks: Networks
    spec: lora.LoraSpec
    train_prompts: dict[str, list[Prompt]]
    sampling: Sampling
    encode: EmbeddingCache
    collector: Collector
    evaluator: Evaluator
    recipe: Recipe
    optimizer: optax.GradientTransformation
    steps: Steps
    state: TrainState
    reach: Mapping[str, Reach]
    negative: Conditioning | None = None

    @property
    def size(self) -> Size:
        """Size of the images."""
        return size_of(self.settings.model)

    @property
    def iteration(self) -> Iteration:
        """What every optimiser step does."""
        settings = self.settings
        merge, quantize = None, None
        if settings.rollout.merge_adapter:
            merge = jax.jit(partial(lora.merge, scale=self.spec.scale))
        if settings.rollout.products != MODEL_PRODUCTS:
            quantize = jax.jit(partial(quantize_blocks, kind=settings.rollout.products))
        return Iteration(
            self.networks.params,
            self.collector,
            self.sampling,
            self.steps,
            partial(device_mesh.replicate, self.mesh),
            merge,
            quantize,
            self._rounding_marks(),
            window_of(settings.rollout) if is_stochastic(settings.rollout) else None,
            self.negative,
        )

    def cut_prompts(self) -> list[str]:
        """Lines about the prompts of training and evaluation that a text encoder does not read to their end."""
        texts = [prompt.text for prompts in self.train_prompts.values() for prompt in prompts]
        texts += [prompt.text for prompt in self.evaluator.prompts]
        if self.settings.rollout.guided:
            texts.append(self.settings.rollout.negative_prompt)
        return cut_lines(self.encode, texts)

    def encode_ahead(self, seed: int, step: int) -> None:
        """Encodes the prompts that are drawn from a step on, where conditioning is kept on disk.

        Args:
          seed: of the state, which a rollback changes.
          step: optimiser steps done.
        """
        if self.settings.prompts.embedding_cache:
            texts = texts_to_draw(self.sampling, seed, step, self.settings.training.num_steps)
            encode_ahead(self.encode, texts)

    def _rounding_marks(self) -> Callable[[Mapping[str, float]], dict[str, float]]:
        """What marks the figures of a record that rounding makes."""
        model = self.settings.model
        shape = self.networks.transformer_shape(self.size, model.max_sequence_length)
        return partial(
            marks,
            dtype=model.dtype,
            stream_dtype=model.stream_dtype,
            num_blocks=shape.num_layers,
        )


def build(settings: Settings, done: int = 0, shared: str = "") -> Run:
    """Makes everything for training; reads models, prompts and rewards, computes nothing but text embeddings.

    Args:
      settings: of the run.
      done: optimiser steps done, whose prompts need no text embeddings.
      shared: folder for text embeddings that all processes see, see `embedding_folder`; empty for none.

    Raises:
      InputError: whatever in the settings, or in the files they name, does not fit.
    """
    check_settings(settings)
    platform.check_backend()
    mesh = device_mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    sizes = derive_sizes(settings.rollout, settings.training, device_mesh.batch_shards(mesh))
    train_prompts = read_prompts(settings.prompts.path, "train", settings.prompts.sources)
    test_prompts = held_out_prompts(settings.prompts, settings.evaluation)
    _check_held_out(train_prompts, test_prompts)
    root, family = locate(settings.model)
    spec = lora.lora_spec(settings.lora, family)
    rewards = open_rewards(settings, mesh, family.frames_per_second)
    sampling = sampling_of(settings, train_prompts, sizes)
    trained = rewards[: len(settings.rewards.train)]
    reach = reach_of(trained, train_prompts, sampling.reward_schedule)
    # A size that does not fit shows before text encoders are read.
    check_model(root, family, settings.model)
    # Text encoders are the larger part of a model: with a cache they are gone before the transformer comes.
    texts = [prompt.text for prompt in test_prompts]
    if settings.rollout.guided:
        texts.append(settings.rollout.negative_prompt)
    folder = embedding_folder(settings.prompts.embedding_cache, shared)
    if folder:
        texts += texts_to_draw(sampling, settings.seed, done, settings.training.num_steps)
    encode = text_embeddings(root, family, settings.model, folder, texts)
    networks = open_networks(root, family, settings.model, spec.scale, mesh)
    imaging = Imaging(
        networks,
        networks.latent_shape(size_of(settings.model)),
        encode,
        make_decoder(networks, size_of(settings.model), mesh),
        mesh,
        settings.rollout,
    )
    recipe = make_recipe(settings, sizes, mesh, networks, imaging.latent_shape)
    optimizer = make_optimizer(settings.training)
    steps = build_steps(settings, recipe, networks, optimizer)
    state = _first_state(settings, family, networks, spec)
    return Run(
        settings=settings,
        mesh=mesh,
        sizes=sizes,
        family=family,
        networks=networks,
        spec=spec,
        train_prompts=train_prompts,
        sampling=sampling,
        encode=encode,
        collector=_collector(settings, imaging, trained),
        evaluator=_evaluator(settings, imaging, rewards, test_prompts),
        recipe=recipe,
        optimizer=optimizer,
        steps=steps,
        state=device_mesh.replicate(mesh, state),
        reach=reach,
        negative=imaging.negative if trains_guided(settings) else None,
    )


def _collector(settings: Settings, imaging: Imaging, rewards: Sequence[Reward]) -> Collector:
    """What samples and scores rollouts, with the rewards trained on."""
    rollout = settings.rollout
    num_samples = rollout.prompts_per_step * rollout.images_per_prompt
    split = is_split(num_samples, kept_shape(rollout, imaging.latent_shape), imaging.mesh)
    return Collector(
        imaging.rollout_sampler(),
        imaging.encode,
        imaging.decode,
        make_scorer(settings.rewards, rewards),
        imaging.latent_shape,
        rollout.batch_size,
        partial(device_mesh.shard_batch, imaging.mesh),
        partial(device_mesh.replicate, imaging.mesh),
        make_stack(imaging.mesh) if split else None,
    )


def _evaluator(
    settings: Settings, imaging: Imaging, rewards: Sequence[Reward], prompts: Sequence[Prompt]
) -> Evaluator:
    """What samples and scores held-out prompts, with all rewards."""
    evaluation = settings.evaluation
    evaluator = Evaluator(
        prompts,
        imaging.sampler(evaluation.solver, evaluation.num_steps, evaluation.integer_timesteps),
        imaging.encode,
        imaging.decode,
        make_scorer(settings.rewards, rewards),
        imaging.latent_shape,
        settings.rollout.batch_size,
        evaluation.seed,
        evaluation.num_images,
        evaluation.images_per_prompt,
        partial(device_mesh.shard_batch, imaging.mesh),
        rows_together(imaging.mesh, settings.rollout.batch_size),
    )
    # Prompts whose images do not fit together show now, not after the base model's were drawn.
    evaluator.batches()
    return evaluator


def _check_held_out(
    train_prompts: Mapping[str, Sequence[Prompt]], test_prompts: Sequence[Prompt]
) -> None:
    """Raises InputError where the held-out prompts of a source are those trained on: they would hold nothing out."""
    trained = {prompt.text for prompt in itertools.chain(*train_prompts.values())}
    for source, held_out in sorted(by_source(test_prompts).items()):
        if trained.issuperset(prompt.text for prompt in held_out):
            raise InputError(
                f"prompts: expected test prompts of {source} that are not trained on; received {len(held_out)} "
                "that all are training prompts"
            )


def make_recipe(
    settings: Settings,
    sizes: Sizes,
    mesh: Any,
    networks: Networks,
    latent_shape: tuple[int, ...],
) -> Recipe:
    """Returns what an optimiser step of a run does.

    Args:
      settings: of the run.
      sizes: its batch arithmetic.
      mesh: its devices.
      networks: of its model, with weights or shapes.
      latent_shape: of one sample.
    """
    names = settings.rewards.train
    shards = device_mesh.Shards(mesh)
    balancer = balancer_of(settings.harmonize, names)
    chunk = chunk_size(settings.training, settings.harmonize, shards.count)
    return Recipe(
        objective=make_objective(settings),
        timesteps=timesteps_of(settings.rollout, sizes, networks, latent_shape),
        micro_batching=MicroBatching(settings.training.micro_batch_size, chunk, shards),
        harmonization=harmonization_of(
            settings.harmonize, settings.advantages, balancer, len(names)
        ),
        averages=averages_of(settings.rollout_policy, settings.ema),
        updates=settings.training.updates_per_rollout,
        alike_below=_alike_below(settings, networks),
    )


def _alike_below(settings: Settings, networks: Networks) -> float:
    """See `Recipe.alike_below`."""
    if not settings.nft.skip_rollout_pass:
        return 0.0
    model = settings.model
    shape = networks.transformer_shape(size_of(model), model.max_sequence_length)
    # Of velocities whose mean square is 1.
    return floor_of(model.dtype, model.stream_dtype, shape.num_layers, 1.0)


def build_steps(
    settings: Settings,
    recipe: Recipe,
    networks: Networks,
    optimizer: optax.GradientTransformation,
) -> Steps:
    """Returns the compiled steps of a run."""
    harmonize = settings.harmonize
    velocity: PolicyVelocity = networks.velocity
    if trains_guided(settings):
        velocity = guided_policy(velocity, settings.rollout.guidance_scale)
    return make_steps(
        recipe,
        velocity,
        optimizer,
        harmonize.mode,
        harmonize.refresh_every,
        upstream_rules(settings),
    )


def _first_state(
    settings: Settings,
    family: Family,
    networks: Networks,
    spec: lora.LoraSpec,
) -> TrainState:
    """The state before the first step, from a new adapter or the LoRA that the run starts from."""
    key = stream_key(jax.random.key(settings.seed), Stream.ADAPTER)
    adapter: Adapter = lora.init_adapter(key, family.layers_at, networks.params, spec)
    if settings.lora.init:
        # Read against the new adapter: it says which layers the run adapts, and at which rank.
        start = read_lora(settings.lora.init, networks.params, family.formats)
        adapter = start_from(start, adapter, networks.params, family.formats, spec)
    return new_state(settings, adapter, settings.seed)
