"""Every collective of rollout, decoder and train step on a mesh of fake CPU devices, with the reason why it is there.

  python -m tools.collectives [--mesh=1x1x1,8x1x1,4x2x1,2x2x2] [--programs=rollout,solving] [--json] [--run] [--time]

A transformer of two blocks is compiled with the functions and shardings of training for every mesh (data x fsdp x
tensor), at the same total work. A line a mesh says how many FLOPs a device executes, loops multiplied out, and what
that is in shares of the first mesh's: 1 is work that is shared out evenly, more is work done twice. An exchange that
nothing explains ends the program with 1.

  --programs  of rollout, decode, solving and between, the train steps with a solve for alpha and without
  --run       also runs each program and says how far its results are from the first mesh's
  --time      also times it, all devices on this machine's cores: overhead shows, speed does not
  --json      one line of JSON instead of tables
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from typing import Any

CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
WIDTH = 4  # of a head


def prepare(devices: int, fast: bool) -> None:
    """Makes this process one with fake devices; before JAX is imported. Code that is not timed is not optimised."""
    flags = f"--xla_force_host_platform_device_count={devices}" + ("" if fast else f" {CHEAP}")
    os.environ |= {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
    }


def settings() -> Any:
    """A configuration whose 16 images, 8 at a time, are shared by up to 8 devices."""
    from marble_jax.config import default_config

    config = default_config()
    for name, value in {
        "model.path": "embedded",
        "model.height": 32,
        "model.width": 32,
        "model.dtype": "float32",
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
        room, leaf = name.split(".")
        config[room][leaf] = value
    return config


def architecture(config: Any) -> Any:
    """A transformer of two blocks with eight heads, and an autoencoder, as shapes."""
    import jax

    from marble_jax.families.sd3 import transformer
    from marble_jax.families.sd3.config import MMDiTConfig
    from marble_jax.networks import autoencoder_kl
    from marble_jax.plan.model_shapes import Architecture
    from marble_jax.programs import build
    from marble_jax.trainable import lora

    sizes = MMDiTConfig(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=WIDTH,
        num_attention_heads=8,
        joint_attention_dim=24,
        caption_projection_dim=8 * WIDTH,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(),
        qk_norm=None,
    )
    spec = build.lora_spec(config)
    model = transformer.MMDiT(sizes, lora_scale=spec.scale)
    params = transformer.abstract_params(model)
    decoder = autoencoder_kl.AutoencoderKL(
        autoencoder_kl.VAEConfig(
            latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
        )
    )
    adapter = jax.eval_shape(lambda: lora.init_adapter(jax.random.key(0), params, spec))
    return Architecture(
        model,
        params,
        decoder,
        autoencoder_kl.abstract_params(decoder),
        0,
        adapter,
        3.0,
        (8, 8, 4),
        6,
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
    sizes: tuple[int, int, int], wanted: tuple[str, ...], run: bool, timed: bool
) -> dict[str, dict[str, Any]]:
    """Figures of every program on a mesh."""
    import math

    import jax

    from marble_jax.distributed import device_mesh
    from marble_jax.plan import aot
    from marble_jax.plan.hlo_costs import by_reason, executed
    from marble_jax.training.batch_sizes import derive_sizes

    mesh = device_mesh.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    config = settings()
    jobs = aot.jobs(
        config,
        architecture(config),
        derive_sizes(config.rollout, config.training, device_mesh.batch_shards(mesh)),
        mesh,
    )
    found = {}
    for name, (function, shapes) in jobs.items():
        if not name.endswith(wanted):
            continue
        compiled = function.lower(*shapes).compile()
        what = executed(compiled.as_text())
        row = {
            "flops": what.flops,
            "exchanges": by_reason(what.exchanges),
            "looped_bytes": max(
                (e.bytes for e in what.exchanges if e.looped and e.kind == "all-reduce"), default=0
            ),
            "unexplained": [
                f"{e.kind} of {e.bytes} bytes, {e.times} times, from {e.origin or 'the compiler'}"
                for e in what.exchanges
                if not e.reason
            ],
        }
        if run or timed:
            row["results"] = telling(name, compiled(*values(shapes)))
        if timed:
            seconds = []
            for _ in range(3):
                arguments = jax.block_until_ready(values(shapes))
                start = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                seconds.append(time.perf_counter() - start)
            row["seconds"] = min(seconds)
        found[name] = row
    return found


def main(arguments: list[str]) -> int:
    given = dict(a.removeprefix("--").partition("=")[::2] for a in arguments)
    meshes = [
        tuple(int(n) for n in each.split("x"))
        for each in given.pop("mesh", "1x1x1,8x1x1,4x2x1,2x2x2").split(",")
    ]
    wanted = tuple(given.pop("programs", "rollout,decode,solving,between").split(","))
    flags = {name for name in ("run", "time", "json") if given.pop(name, None) is not None}
    if given or any(len(sizes) != 3 for sizes in meshes):
        sys.exit(__doc__)
    prepare(max(a * b * c for a, b, c in meshes), "time" in flags)
    import numpy as np

    from marble_jax.console import Console

    console, record, first = Console(), {}, {}
    for sizes in meshes:
        shown = "x".join(map(str, sizes))
        for name, row in measure(sizes, wanted, "run" in flags, "time" in flags).items():
            start = first.setdefault(name, (np.prod(meshes[0]), row))
            row["share"] = row["flops"] * np.prod(sizes) / (start[1]["flops"] * start[0])
            results = (
                row.pop("results")
                if sizes != meshes[0] and "results" in row
                else row.get("results")
            )
            if results is not None:
                row["gap"] = max(
                    float(np.max(np.abs(x - y), initial=0) / (np.max(np.abs(y), initial=0) + 1e-12))
                    for x, y in zip(results, start[1]["results"], strict=True)
                )
            record[f"{name} {shown}"] = row
            if "json" in flags:
                continue
            console.say(
                f"{name} on {shown}: {row['flops'] / 1e6:.2f} MFLOP a device, {row['share']:.3f} of an even "
                "share"
                + (f", {row['gap']:.1e} from the first mesh" if "gap" in row else "")
                + (
                    f", {row['seconds']:.3f} s, {row['seconds'] / start[1]['seconds']:.2f} x the first mesh"
                    if "seconds" in row
                    else ""
                )
            )
            for kind, why, count, times, size in row["exchanges"]:
                console.say(
                    f"  {kind}: {count} in the text, {times} a run, {size / 1e3:.1f} kB: "
                    f"{why or 'UNEXPLAINED'}"
                )
            for line in row["unexplained"]:
                console.say(f"  unexplained: {line}")
    if "json" in flags:
        print(
            json.dumps(
                {
                    name: {k: v for k, v in row.items() if k != "results"}
                    for name, row in record.items()
                },
                default=float,
            )
        )
    return 1 if any(row["unexplained"] for row in record.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
