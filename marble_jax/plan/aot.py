"""Ahead-of-time compilation of a run's programs for devices that this machine need not have.

`plan.topology` describes the devices and holds what compiles for them; neither a TPU nor a GPU is needed. The programs
and the shardings are those that training uses (`programs.build`, `training.step_schedule`, `flow.policy_sampler`,
`distributed.device_mesh`), with shapes in place of values.

XLA's cost analysis counts the body of a loop once: its FLOPs and bytes are of one block, one sampling step and one
micro-batch where the program loops over many. `plan.roofline` multiplies loops out.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marble_jax.config import RolloutSettings, Settings
from marble_jax.distributed import device_mesh
from marble_jax.distributed.accelerators import GIB
from marble_jax.families.base import Networks
from marble_jax.flow.guided_policy import GuidedConditioning, guided_policy, repeated
from marble_jax.flow.policy_sampler import make_sampler, make_transition_sampler
from marble_jax.flow.trajectory import Transitions
from marble_jax.plan.hlo import Collective, Kernels, collectives, fused_kernels
from marble_jax.plan.model_shapes import ModelShapes
from marble_jax.plan.sample_memory import quantized_shapes
from marble_jax.plan.topology import compile_for, program_text
from marble_jax.programs.build import build_steps, make_recipe
from marble_jax.programs.noisy_rollouts import network_levels_of, stochastic_of, trains_guided
from marble_jax.programs.open_model import decode_size, network_options
from marble_jax.programs.run_state import new_state
from marble_jax.trainable.lora import lora_spec
from marble_jax.training.batch_sizes import Sizes, is_stochastic, kept_shape, window_of
from marble_jax.training.latent_layout import is_split, split_layout
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState
from marble_jax.training.step_gradients import MicroBatches
from marble_jax.types import PolicyVelocity

_OUT_OF_MEMORY = re.compile(r"total memory required for [^(]*\(([\d.]+)([KMGT])\)")


# The compiler's letters for powers of two, in gigabytes.
_UNITS = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}

MICRO_BATCH = "micro-batch"
"""Program that is no program of a run, but the part of one that takes most of its time; compiled where asked for."""

Abstract = Any
"""A `jax.ShapeDtypeStruct` with a sharding, in the place of the array that it describes."""


class Job(NamedTuple):
    """One program of a run, ready to compile.

    Attributes:
      function: jitted function.
      arguments: pytrees of `Abstract` leaves, each with the sharding that it has in a run.
    """

    function: Any
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program; bytes and FLOPs are those of one device.

    Attributes:
      name: key of the program in `jobs`.
      needed: bytes of HBM: arguments, temporaries, code, and results that do not overwrite arguments.
      arguments: bytes of arguments; None where the program did not fit and the compiler gave up.
      temporaries: bytes of everything in between; None likewise.
      flops: FLOPs by XLA's cost analysis, loop bodies counted once; None likewise.
      bytes: bytes read and written, by the same analysis; None likewise.
      collectives: exchanges between devices, by kind.
      kernels: fused attention in the program.
      seconds: seconds that the compilation took.
      text: the program after optimisation; empty where it did not fit.
    """

    name: str
    needed: float
    arguments: float | None
    temporaries: float | None
    flops: float | None
    bytes: float | None
    collectives: tuple[Collective, ...]
    kernels: Kernels
    seconds: float
    text: str = dataclasses.field(repr=False)


def jobs(settings: Settings, shapes: ModelShapes, sizes: Sizes, mesh: Mesh) -> dict[str, Job]:
    """Returns the functions of a run by name, ready to compile, each with the shapes and shardings of its arguments.

    Args:
      settings: settings of the run.
      shapes: its model.
      sizes: its batch arithmetic.
      mesh: its devices; they only have to be described.
    """
    abstract = _AbstractArguments(settings, shapes, mesh)
    networks = abstract.networks
    rollout = settings.rollout
    recipe = make_recipe(settings, sizes, mesh, networks, shapes.latent)
    optimizer = make_optimizer(settings.training)
    steps = build_steps(settings, recipe, networks, optimizer)
    state = abstract.state()
    # A merged policy is a copy of the weights and needs no adapter.
    policy = None if rollout.merge_adapter else state.rollout
    conditioning = abstract.conditioning(rollout.batch_size)
    noise = abstract.sharded((rollout.batch_size, *shapes.latent), jnp.float32)
    latents = abstract.decoded_latents()
    train = (state, abstract.params, abstract.rollouts(sizes))
    drawing: tuple[Any, ...] = (abstract.sampling_params(), policy, conditioning, noise)
    if is_stochastic(rollout):
        drawing += (abstract.noise_key(),)
    if rollout.guided:
        drawing += (abstract.negative_conditioning(),)
    programs = {
        "rollout": Job(_rollout_sampler(rollout, networks, shapes.latent), drawing),
        "decode": Job(jax.jit(networks.decode_latents), (abstract.decoder_params, latents)),
        "train, solving": Job(steps.refresh, train),
    }
    if steps.between is not steps.refresh:
        programs["train, between"] = Job(steps.between, train)
    if not settings.harmonize.is_upstream:
        index = abstract.replicated((), jnp.int32)
        programs[MICRO_BATCH] = Job(_micro_batch(recipe, networks), (*train, index))
    return programs


def _micro_batch(recipe: Recipe, networks: Networks) -> Callable[..., Any]:
    """One micro-batch of a solving step without anchors and divergence, which most of them are: the rewards' sums.

    Without the rollout policy, where the recipe can do without.
    """

    @jax.jit
    def train(state: TrainState, params: Any, batch: RolloutBatch, index: Any) -> Any:
        with jax.named_scope("train"):
            parts = MicroBatches(recipe, networks.velocity, state, params, batch)
            part = parts.at(index, divergence=False, alike=recipe.alike_below > 0)
            sums = parts.reward_sums(part, anchors=False)
            return parts.all_reduce(sums)

    return train


def _rollout_sampler(
    rollout: RolloutSettings, networks: Networks, latent_shape: tuple[int, ...]
) -> Callable[..., Any]:
    """A run's rollouts as one compiled function of arrays; with noise along the way, in the first window."""
    told = network_levels_of(rollout, networks, latent_shape)
    if not is_stochastic(rollout):
        levels = networks.levels(rollout.num_steps, latent_shape)
        scale = rollout.guidance_scale
        return make_sampler(networks.velocity, rollout.solver, levels, False, told, scale)
    window = window_of(rollout)
    velocity: PolicyVelocity = networks.velocity
    if rollout.guided:
        velocity = guided_policy(velocity, rollout.guidance_scale)
    table = stochastic_of(rollout, networks, latent_shape)
    run = make_transition_sampler(velocity, table, window.size, told)

    @jax.jit
    def sample(
        params: Any, policy: Any, cond: Any, noise: Any, key: Any, negative: Any = None
    ) -> Any:
        if negative is not None:
            cond = GuidedConditioning(cond, repeated(negative, len(noise)))
        return run(params, policy, cond, noise, key, window.first)

    return sample


class _AbstractArguments:
    """What a run's programs are given, as shapes with shardings.

    Attributes:
      networks: networks of the run, computed as on the mesh.
      params: weights of the transformer, split as in a run.
      decoder_params: weights of the autoencoder, whole on every device.
    """

    def __init__(self, settings: Settings, shapes: ModelShapes, mesh: Mesh):
        self._settings, self._shapes, self._mesh = settings, shapes, mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._batch = NamedSharding(mesh, device_mesh.BATCH)
        rules = shapes.networks.sharding_rules
        scale = lora_spec(settings.lora, shapes.family).scale
        options = network_options(settings.model, scale, mesh, rules.gather(mesh))
        self.networks = shapes.networks.with_options(options)
        shardings = rules.shardings(mesh, shapes.networks.params)
        self.params = jax.tree.map(_sharded_like, shapes.networks.params, shardings)
        self.decoder_params = jax.tree.map(self._whole, shapes.networks.decoder_params)

    def _whole(self, leaf: Any) -> Abstract:
        """A leaf that every device holds whole."""
        return _sharded_like(leaf, self._replicated)

    def replicated(self, shape: tuple[int, ...], dtype: Any) -> Abstract:
        """An array that every device holds whole."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def sharded(self, shape: tuple[int, ...], dtype: Any) -> Abstract:
        """An array whose samples, its first axis, are split over the devices."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._batch)

    def conditioning(self, count: int) -> dict[str, Abstract]:
        """Conditioning of `count` samples, split over the devices."""
        arrays = self._conditioning_shapes(count)
        return {name: self.sharded(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}

    def noise_key(self) -> Abstract:
        """Key of the noise along the way of a batch."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self.replicated(key.shape, key.dtype)

    def negative_conditioning(self) -> dict[str, Abstract]:
        """Conditioning of the negative prompt, whole on every device."""
        return jax.tree.map(self._whole, self._conditioning_shapes(1))

    def sampling_params(self) -> Any:
        """Weights that rollouts are drawn with, which may be of eight bits."""
        narrow = quantized_shapes(self._settings, self.params)
        if narrow is None:
            return self.params
        return jax.tree.map(self._whole, narrow)

    def _conditioning_shapes(self, count: int) -> dict[str, Any]:
        length = self._settings.model.max_sequence_length
        return self.networks.conditioning_shapes(count, length)

    def decoded_latents(self) -> Abstract:
        """Latents that the autoencoder turns into images at once, which tensor splits, too."""
        batch = self._settings.rollout.batch_size
        frames = self.networks.frames_decoded_at_once(self._shapes.size.num_frames)
        count = decode_size(batch, self._mesh, frames)
        sharding = device_mesh.image_sharding(self._mesh, batch)
        shape = (count, *self._shapes.latent)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def state(self) -> TrainState:
        """The training state, as every process keeps it: whole on every device."""

        def blank_state() -> TrainState:
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes.adapter
            )
            return new_state(self._settings, zeros, 0)

        return jax.tree.map(self._whole, jax.eval_shape(blank_state))

    def rollouts(self, sizes: Sizes) -> RolloutBatch:
        """The rollouts of a step: but for large latents, whole on every device, which takes its own samples out."""
        count, rollout = sizes.images, self._settings.rollout
        own = kept_shape(rollout, self._shapes.latent)
        split = is_split(count, own, self._mesh)
        samples: tuple[int, ...] = (count,)
        sharding = self._replicated
        if split:
            samples = (sizes.rollout_batches, rollout.batch_size)
            sharding = split_layout(self._mesh)

        def array(shape: tuple[int, ...], dtype: Any) -> Abstract:
            return jax.ShapeDtypeStruct((*samples, *shape), dtype, sharding=sharding)

        kept: Any = array(own, jnp.float32)
        if is_stochastic(rollout):
            log_prob = array((window_of(rollout).size,), jnp.float32)
            kept = Transitions(kept, array((), jnp.int32), log_prob)
        conditioning = self._conditioning_shapes(rollout.prompts_per_step)
        # A scalarized advantage is a column behind the rewards'.
        scalarized = self._settings.advantages.scalarized
        num_columns = len(self._settings.rewards.train) + scalarized
        return RolloutBatch(
            kept=kept,
            prompt=self.replicated((count,), jnp.int32),
            cond=jax.tree.map(self._whole, conditioning),
            advantages=self.replicated((count, num_columns), jnp.float32),
            valid=self.replicated((count, num_columns), jnp.bool_),
            negative=self.negative_conditioning() if trains_guided(self._settings) else None,
            is_split=split,
        )


def _sharded_like(leaf: Any, sharding: Any) -> Abstract:
    """The shape and dtype of a leaf, with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def compile_program(name: str, job: Job) -> Program:
    """Compiles a program for the devices that the shardings of its arguments name.

    Args:
      name: name of the program, for the result.
      job: the function and its arguments.

    Raises:
      RuntimeError: the compiler failed for another reason than memory.
    """
    with tempfile.TemporaryDirectory(prefix="marble_jax_") as dump:
        return _compiled(name, job, dump)


def _compiled(name: str, job: Job, dump: str) -> Program:
    start = time.perf_counter()
    try:
        compiled = compile_for(job.function, job.arguments, dump)
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        return Program(name, needed, None, None, None, None, (), Kernels(0, 0), seconds, "")
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    # Results that overwrite arguments take no memory of their own.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + results
    text = program_text(compiled, dump)
    working = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Program(
        name=name,
        needed=float(held + working),
        arguments=float(memory.argument_size_in_bytes),
        temporaries=float(memory.temp_size_in_bytes),
        flops=cost.get("flops"),
        bytes=cost.get("bytes accessed"),
        collectives=collectives(text),
        kernels=fused_kernels(text),
        seconds=time.perf_counter() - start,
        text=text,
    )


def out_of_memory(message: str) -> float | None:
    """Bytes that a program would have needed, by the compiler's complaint; None for another complaint."""
    match = _OUT_OF_MEMORY.search(message)
    if match is None:
        return None
    amount, unit = match.groups()
    return float(amount) * GIB * _UNITS[unit]


def as_record(programs: Mapping[str, Program]) -> dict[str, Any]:
    """Plain values of compiled programs, for JSON."""
    record = {name: dataclasses.asdict(program) for name, program in programs.items()}
    for program in record.values():
        # Megabytes, which everything else here is read off.
        del program["text"]
    return record
