"""Every collective of rollout, decoder and train step on a mesh of fake CPU devices, with the reason why it is there.

  python -m tools.collectives [--mesh=1x1x1,8x1x1,4x2x1,2x2x2] [--programs=rollout,solving] [--json] [--run] [--time]

A transformer of three blocks is compiled with the functions and shardings of training for every mesh (data x fsdp x
tensor), at the same total work. A line a mesh says how many FLOPs a device executes, loops multiplied out, and what
that is in shares of the first mesh's: 1 is work that is shared out evenly, more is work done twice. An exchange that
nothing explains ends the program with 1.

  --programs  of rollout, decode, solving and between, the train steps with a solve for alpha and without
  --run       also runs each program and says how far its results are from the first mesh's
  --time      also times it, all devices on this machine's cores: overhead shows, speed does not
  --json      one line of JSON instead of tables
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import zlib
from typing import Any

CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
HEAD_WIDTH, NUM_HEADS = 4, 8
CLIP_TOKENS, T5_TOKENS = 2, 4


def prepare(devices: int, fast: bool) -> None:
    """Makes this process one with fake devices; before JAX is imported. Code that is not timed is not optimised."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if not fast:
        flags += f" {CHEAP}"
    os.environ |= {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
    }


def small_settings() -> Any:
    """Settings whose 16 images, 8 at a time, are shared by up to 8 devices."""
    from marble_jax.config import default_config, settings_of

    config = default_config()
    for name, value in {
        "model.path": "embedded",
        "model.height": 16,
        "model.width": 16,
        "model.dtype": "float32",
        "model.max_sequence_length": T5_TOKENS,
        "rollout.prompts_per_step": 4,
        "rollout.images_per_prompt": 4,
        "rollout.batch_size": 16,
        "rollout.num_steps": 3,
        "lora.rank": 2,
        "training.micro_batch_size": 8,
        "harmonize.mode": "amortized",
        "harmonize.anchor_every": 1,
        "harmonize.chunk_size": 1,
        "rewards.train": ("a", "b"),
    }.items():
        section, leaf = name.split(".")
        config[section][leaf] = value
    return settings_of(config)


def small_shapes(settings: Any) -> Any:
    """A transformer of three blocks with eight heads, and an autoencoder, as shapes."""
    import jax

    from marble_jax.families.scheduler import SchedulerConfig
    from marble_jax.families.sd3 import transformer
    from marble_jax.families.sd3.config import MMDiTConfig
    from marble_jax.families.sd3.family import FAMILY
    from marble_jax.families.sd3.networks import SD3Networks
    from marble_jax.families.transformer_module import module_fields
    from marble_jax.networks import autoencoder_kl
    from marble_jax.plan.model_shapes import ModelShapes
    from marble_jax.programs.open_model import network_options, size_of
    from marble_jax.trainable import lora

    config = MMDiTConfig(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=24,
        caption_projection_dim=NUM_HEADS * HEAD_WIDTH,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(),
        qk_norm=None,
    )
    spec = lora.lora_spec(settings.lora, FAMILY)
    options = network_options(settings.model, spec.scale)
    model = transformer.MMDiT(config, **module_fields(options))
    params = transformer.abstract_params(model)
    vae = autoencoder_kl.AutoencoderKL(
        autoencoder_kl.VAEConfig(
            latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
        )
    )
    networks = SD3Networks(
        None,
        options,
        (model, params),
        (vae, autoencoder_kl.abstract_params(vae)),
        SchedulerConfig(shift=3.0),
        CLIP_TOKENS,
    )
    size = size_of(settings.model)
    return ModelShapes(
        family=FAMILY,
        networks=networks,
        adapter=jax.eval_shape(
            lambda: lora.init_adapter(jax.random.key(0), FAMILY.layers_at, params, spec)
        ),
        size=size,
        latent=networks.latent_shape(size),
        transformer=networks.transformer_shape(size, T5_TOKENS),
        encoder_parameters=0,
    )


def values(shapes: Any) -> Any:
    """Arrays for the shapes of arguments, the same on every mesh: numbers where there is a choice, else zeros."""
    import jax
    import numpy as np

    def one(path: Any, struct: Any) -> Any:
        name = jax.tree_util.keystr(path)
        numbers = np.random.default_rng(zlib.crc32(name.encode()))
        if struct.dtype == bool:
            made = np.ones(struct.shape, bool)
        elif "opt_state" in name or np.issubdtype(struct.dtype, np.integer):
            made = np.zeros(struct.shape, struct.dtype)
        else:
            # Products keep their size: a saturated softmax would turn rounding into differences.
            scale = struct.shape[-2] ** -0.5 if "kernel" in name else 0.1
            made = (scale * numbers.normal(size=struct.shape)).astype(struct.dtype)
        return jax.device_put(made, struct.sharding)

    return jax.tree_util.tree_map_with_path(one, shapes)


def telling(name: str, results: Any) -> list[Any]:
    """What is compared: images, or the gradient's moments and figures of a step (Adam's update is but their sign)."""
    import jax
    import numpy as np

    state_or_array = results
    if name.startswith("train"):
        state, metrics = results
        state_or_array = (
            state.opt_state,
            metrics["training/grad_norm"],
            metrics["objective/loss"],
            state.alpha,
        )
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state_or_array)]


def measure(
    sides: tuple[int, ...], wanted: tuple[str, ...], run: bool, timed: bool
) -> dict[str, dict[str, Any]]:
    """Figures of every program on a mesh."""
    import jax

    from marble_jax.distributed import device_mesh
    from marble_jax.plan import aot
    from marble_jax.training.batch_sizes import derive_sizes

    mesh = device_mesh.make_mesh(*sides, devices=jax.devices()[: math.prod(sides)])
    settings = small_settings()
    sizes = derive_sizes(settings.rollout, settings.training, device_mesh.batch_shards(mesh))
    shapes = small_shapes(settings)
    rows = {}
    for name, job in aot.jobs(settings, shapes, sizes, mesh).items():
        if not name.endswith(wanted):
            continue
        compiled = job.function.trace(*job.arguments).lower().compile()
        row = exchanges_of(compiled.as_text(), shapes.family)
        if run or timed:
            row["results"] = telling(name, compiled(*values(job.arguments)))
        if timed:
            row["seconds"] = fastest(compiled, job.arguments)
        rows[name] = row
    return rows


def exchanges_of(text: str, family: Any) -> dict[str, Any]:
    """FLOPs and exchanges of an HLO text, and what of them nothing explains."""
    from marble_jax.plan.hlo_costs import by_reason, program_costs

    costs = program_costs(text, family)
    looped_bytes, unexplained = 0, []
    for exchange in costs.exchanges:
        if exchange.looped and exchange.kind == "all-reduce":
            looped_bytes = max(looped_bytes, exchange.bytes)
        if not exchange.reason:
            origin = exchange.origin or "the compiler"
            unexplained.append(
                f"{exchange.kind} of {exchange.bytes} bytes, {exchange.times} times, from {origin}"
            )
    return {
        "flops": costs.flops,
        "exchanges": [dataclasses.astuple(total) for total in by_reason(costs.exchanges)],
        "looped_bytes": looped_bytes,
        "unexplained": unexplained,
    }


def fastest(compiled: Any, shapes: Any) -> float:
    """Seconds of the fastest of three runs."""
    import jax

    seconds = []
    for _ in range(3):
        # Made anew each time: a train step takes over the state that it is given.
        arguments = jax.block_until_ready(values(shapes))
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def gap(results: list[Any], expected: list[Any]) -> float:
    """Largest difference of two lists of arrays, relative to the largest number of the array it is in."""
    import numpy as np

    gaps = []
    for one, two in zip(results, expected, strict=True):
        difference = np.max(np.abs(one - two), initial=0)
        # The small number keeps an array of zeros from dividing zero by zero.
        gaps.append(float(difference / (np.max(np.abs(two), initial=0) + 1e-12)))
    return max(gaps)


def show(name: str, row: dict[str, Any], first: dict[str, Any], console: Any) -> None:
    """Prints one program's figures."""
    line = f"{name}: {row['flops'] / 1e6:.2f} MFLOP a device, {row['share']:.3f} of an even share"
    if "gap" in row:
        line += f", {row['gap']:.1e} from the first mesh"
    if "seconds" in row:
        ratio = row["seconds"] / first["seconds"]
        line += f", {row['seconds']:.3f} s, {ratio:.2f} x the first mesh"
    console.say(line)
    for kind, why, count, times, size in row["exchanges"]:
        console.say(
            f"  {kind}: {count} in the text, {times} a run, {size / 1e3:.1f} kB: "
            f"{why or 'UNEXPLAINED'}"
        )
    for unexplained in row["unexplained"]:
        console.say(f"  unexplained: {unexplained}")


def main(arguments: list[str]) -> int:
    options = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    names = options.pop("mesh", "1x1x1,8x1x1,4x2x1,2x2x2").split(",")
    meshes = [tuple(int(side) for side in name.split("x")) for name in names]
    wanted = tuple(options.pop("programs", "rollout,decode,solving,between").split(","))
    flags = {name for name in ("run", "time", "json") if options.pop(name, None) is not None}
    if "help" in options:
        print(__doc__)
        return 0
    if options or any(len(sides) != 3 for sides in meshes):
        sys.exit(__doc__)
    prepare(max(math.prod(sides) for sides in meshes), "time" in flags)

    from marble_jax.console import Console

    console, record, first = Console(), {}, {}
    for sides in meshes:
        mesh_name = "x".join(map(str, sides))
        for name, row in measure(sides, wanted, "run" in flags, "time" in flags).items():
            reference = first.setdefault(name, row)
            even = reference["flops"] * math.prod(meshes[0])
            row["share"] = row["flops"] * math.prod(sides) / even
            if "results" in row:
                row["gap"] = gap(row["results"], reference["results"])
            record[f"{name} {mesh_name}"] = row
            if "json" not in flags:
                show(f"{name} on {mesh_name}", row, reference, console)
    # The first mesh's results are needed until the last program has run.
    for row in record.values():
        row.pop("results", None)
    if "json" in flags:
        print(json.dumps(record, default=float))
    return 1 if any(row["unexplained"] for row in record.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
