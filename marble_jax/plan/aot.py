"""Compiles a run's programs for a TPU slice that is not here, and reads what the compiler says of them.

`libtpu` holds the compiler of the chips, and `jax.experimental.topologies` describes a slice by name; no TPU is needed.
The programs and the shardings are those that training uses (`programs.build`, `training.step_schedule`,
`flow.policy_sampler`, `distributed.device_mesh`), with shapes in place of values.

XLA's cost analysis counts the body of a loop once: its FLOPs and bytes are of one block, one sampling step and one
micro-batch where the program loops over many.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marble_jax.config import Settings
from marble_jax.distributed import device_mesh
from marble_jax.distributed.accelerators import ACCELERATORS, GIB, Accelerator
from marble_jax.errors import InputError, nearest
from marble_jax.flow.policy_sampler import make_sampler
from marble_jax.plan.hlo import Collective, collectives
from marble_jax.plan.model_shapes import ModelShapes
from marble_jax.programs.build import build_steps, make_recipe
from marble_jax.programs.open_model import decode_size, network_options
from marble_jax.programs.run_state import blank_state
from marble_jax.training.batch_sizes import Sizes
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.state import TrainState
from marble_jax.types import Conditioning

SLICES = ("v5e", "v5p", "v6e")
_NAME = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")
_OUT_OF_MEMORY = re.compile(r"total memory required for [^(]*\(([\d.]+)([KMGT])\)")


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, a device.

    Attributes:
      name: of the program.
      needed: bytes of HBM: arguments, temporaries, code, and results that do not overwrite arguments.
      arguments: bytes of arguments; None where the program did not fit and the compiler gave up.
      temporaries: bytes of everything in between; None likewise.
      flops: by XLA's cost analysis, loop bodies counted once; None likewise.
      bytes: read and written, by the same analysis; None likewise.
      collectives: by kind.
      seconds: it took to compile.
    """

    name: str
    needed: float
    arguments: float | None
    temporaries: float | None
    flops: float | None
    bytes: float | None
    collectives: tuple[Collective, ...]
    seconds: float


def check_topology(name: str) -> tuple[Accelerator, int]:
    """The chip and the number of chips of a slice such as `v5e:4x4`.

    Raises:
      InputError: not the name of a slice, or no libtpu to compile with.
    """
    match = _NAME.fullmatch(name)
    kind = match[1] if match else name.partition(":")[0]
    if not match or kind not in SLICES:
        close = nearest(kind, SLICES) if kind not in SLICES else ""
        raise InputError(
            f"--topology: expected a slice of {', '.join(SLICES)} with its shape in chips, such as "
            f"v5e:4x4 or v5p:2x2x4; received {name!r}{close}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--topology: expected the package libtpu, which holds the compiler of TPUs; received none "
            "(pip install libtpu, or marble-jax[tpu])"
        )
    count = 1
    for side in match[2].split("x"):
        count *= int(side)
    return ACCELERATORS[kind], count


def slice_devices(name: str) -> list[Any]:
    """The devices of a slice, to compile for.

    Raises:
      InputError: a shape that the chips do not come in.
    """
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # jaxlib's exception for everything
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--topology: expected a shape made of whole hosts, such as v5e:4x4 or v5p:2x2x4; received "
            f"{name!r} ({reason})"
        ) from None


def jobs(
    settings: Settings, shapes: ModelShapes, sizes: Sizes, mesh: Mesh
) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """The compiled functions of a run by name, each with the shapes of its arguments where they lie."""
    model = _Shardings(settings, shapes, mesh)
    networks = model.networks
    rollout = settings.rollout
    levels = networks.levels(rollout.num_steps, shapes.latent)
    sampler = make_sampler(networks.velocity, rollout.solver, levels, rollout.integer_timesteps)
    recipe = make_recipe(settings, sizes, mesh, networks, shapes.latent)
    optimizer = make_optimizer(settings.training)
    steps = build_steps(settings, recipe, networks, optimizer)
    state = model.state()
    batch, decoded = rollout.batch_size, decode_size(rollout.batch_size, mesh)
    policy = None if rollout.merge_adapter else state.rollout
    noise = model.sharded((batch, *shapes.latent), jnp.float32)
    latents = jax.ShapeDtypeStruct(
        (decoded, *shapes.latent),
        jnp.float32,
        sharding=device_mesh.image_sharding(mesh, batch),
    )
    train = (state, model.params, model.rollouts(sizes))
    programs = {
        "rollout": (sampler, (model.params, policy, model.conditioning(batch), noise)),
        "decode": (jax.jit(networks.decode_latents), (model.decoder_params, latents)),
        "train, solving": (steps.refresh, train),
    }
    if steps.between is not steps.refresh:
        programs["train, between"] = (steps.between, train)
    return programs


class _Shardings:
    """Shapes of what a run's programs are given, each where it lies on the mesh."""

    def __init__(self, settings: Settings, shapes: ModelShapes, mesh: Mesh):
        self._settings, self._shapes = settings, shapes
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._batch = NamedSharding(mesh, device_mesh.BATCH)
        rules = shapes.networks.sharding_rules
        scale = settings.lora.alpha / settings.lora.rank
        options = network_options(settings.model, scale, mesh, rules.gather(mesh))
        self.networks = shapes.networks.with_options(options)
        layouts = rules.shardings(mesh, shapes.networks.params)
        self.params = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            shapes.networks.params,
            layouts,
        )
        self.decoder_params = jax.tree.map(self._whole, shapes.networks.decoder_params)

    def _whole(self, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._replicated)

    def replicated(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array that every device holds whole."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def sharded(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array whose samples are split over the devices."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._batch)

    def conditioning(self, count: int, sharded: bool = True) -> Conditioning:
        """Conditioning of `count` samples, or of prompts that every device holds."""
        length = self._settings.model.max_sequence_length
        place = self.sharded if sharded else self.replicated
        arrays = self.networks.conditioning_shapes(count, length)
        return {name: place(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}

    def state(self) -> TrainState:
        """The training state."""

        def new_state() -> TrainState:
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes.adapter
            )
            return blank_state(self._settings, zeros)

        return jax.tree.map(self._whole, jax.eval_shape(new_state))

    def rollouts(self, sizes: Sizes) -> RolloutBatch:
        """The rollouts of a step."""
        count, settings = sizes.images, self._settings
        scalarized = settings.advantages.scalarize != "none"
        columns = len(settings.rewards.train) + scalarized
        return RolloutBatch(
            self.replicated((count, *self._shapes.latent), jnp.float32),
            self.replicated((count,), jnp.int32),
            self.conditioning(settings.rollout.prompts_per_step, sharded=False),
            self.replicated((count, columns), jnp.float32),
            self.replicated((count, columns), jnp.bool_),
        )


def compile_program(name: str, function: Callable, arguments: tuple[Any, ...]) -> Program:
    """Compiles for the devices that the arguments' shardings name.

    Raises:
      RuntimeError: the compiler failed for another reason than memory.
    """
    start = time.perf_counter()
    platform = next(iter(jax.tree.leaves(arguments)[0].sharding.device_set)).platform
    elsewhere = None if platform == jax.default_backend() else (platform,)
    lowered = function.trace(*arguments).lower(lowering_platforms=elsewhere)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        return Program(name, needed, None, None, None, None, (), time.perf_counter() - start)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Program(
        name,
        float(needed),
        float(memory.argument_size_in_bytes),
        float(memory.temp_size_in_bytes),
        cost.get("flops"),
        cost.get("bytes accessed"),
        collectives(compiled.as_text()),
        time.perf_counter() - start,
    )


def out_of_memory(message: str) -> float | None:
    """Bytes that a program would have needed, of the compiler's complaint; None for another complaint."""
    match = _OUT_OF_MEMORY.search(message)
    return (
        float(match[1]) * GIB * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[match[2]]
        if match
        else None
    )


def as_record(programs: Mapping[str, Program]) -> dict[str, Any]:
    """Plain values of compiled programs, for JSON."""
    return {name: dataclasses.asdict(program) for name, program in programs.items()}
