"""Compiles a run's programs for a TPU slice that is not here, and reads what the compiler says of them.

`libtpu` holds the compiler of the chips, and `jax.experimental.topologies` describes a slice by name; no TPU is needed.
The programs and the shardings are those that training uses (`build.make_recipe`, `training.step_schedule`, `sampling`,
`parallel`), with shapes in place of values.

XLA's cost analysis counts the body of a loop once: its FLOPs and bytes are of one block, one sampling step and one
micro-step where the program loops over many.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marble_jax.distributed import device_mesh, sharding
from marble_jax.distributed.accelerators import ACCELERATORS, GIB, Accelerator
from marble_jax.errors import InputError, nearest
from marble_jax.families.sd3 import transformer
from marble_jax.flow.policy_sampler import make_sampler
from marble_jax.harmonize.registry import balancer_of
from marble_jax.networks import autoencoder_kl
from marble_jax.plan.hlo import Collective, collectives
from marble_jax.plan.model_shapes import Architecture
from marble_jax.programs import build
from marble_jax.training.batch_sizes import Sizes
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.state import initial_state
from marble_jax.training.step_schedule import make_steps
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
    config: ml_collections.ConfigDict, made: Architecture, sizes: Sizes, mesh: Mesh
) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """The compiled functions of a run by name, each with the shapes of its arguments where they lie."""
    everywhere, batch = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, device_mesh.BATCH)

    def struct(
        shape: tuple[int, ...], dtype: Any, sharding: NamedSharding = everywhere
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def cond(count: int, sharding: NamedSharding) -> Conditioning:
        widths, dtype = made.model.config, build.DTYPES[config.model.dtype]
        return Conditioning(
            struct((count, made.text_tokens, widths.joint_attention_dim), dtype, sharding),
            struct((count, widths.pooled_projection_dim), dtype, sharding),
        )

    model = made.model.clone(
        attention=build.attention_of(config, mesh),
        gather=sharding.gather(mesh, made.model.config.attention_head_dim),
    )

    def velocity(
        params: Any, adapter: Any, xt: jax.Array, sigma: jax.Array, cond: Any
    ) -> jax.Array:
        return transformer.velocity(model, params, adapter, xt, sigma, cond)

    lie = sharding.shardings(mesh, "transformer", made.params, made.model.config.attention_head_dim)
    params = jax.tree.map(lambda s, where: struct(s.shape, s.dtype, where), made.params, lie)
    optimizer, balancer = (
        make_optimizer(config.training),
        balancer_of(config.harmonize, config.rewards.train),
    )
    recipe = build.make_recipe(config, sizes, mesh, balancer, made.shift)
    names = len(config.rewards.train)
    state = jax.tree.map(
        lambda s: struct(s.shape, s.dtype),
        jax.eval_shape(
            lambda: initial_state(
                jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), made.adapter),
                optimizer,
                names,
                balancer.init(names),
                0,
            )
        ),
    )
    rows, drawn = recipe.harmonization.num_objectives, sizes.images
    rollouts = RolloutBatch(
        struct((drawn, *made.latent), jnp.float32),
        struct((drawn,), jnp.int32),
        cond(config.rollout.prompts_per_step, everywhere),
        struct((drawn, rows), jnp.float32),
        struct((drawn, rows), jnp.bool_),
    )
    sampler = make_sampler(
        velocity,
        config.rollout.num_steps,
        config.rollout.solver,
        made.shift,
        config.rollout.integer_timesteps,
    )
    steps = make_steps(
        recipe, velocity, optimizer, config.harmonize.mode, config.harmonize.refresh_every
    )
    at_once, decoded = config.rollout.batch_size, build.decode_size(config.rollout.batch_size, mesh)
    found = {
        "rollout": (
            sampler,
            (
                params,
                None if config.rollout.merge_adapter else state.rollout,
                cond(at_once, batch),
                struct((at_once, *made.latent), jnp.float32, batch),
            ),
        ),
        "decode": (
            jax.jit(partial(autoencoder_kl.decode, made.vae)),
            (
                jax.tree.map(lambda s: struct(s.shape, s.dtype), made.vae_params),
                struct(
                    (decoded, *made.latent),
                    jnp.float32,
                    device_mesh.image_sharding(mesh, at_once),
                ),
            ),
        ),
        "train, solving": (steps.refresh, (state, params, rollouts)),
    }
    if steps.between is not steps.refresh:
        found["train, between"] = (steps.between, (state, params, rollouts))
    return found


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
