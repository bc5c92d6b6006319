"""Full-size proof of the conversion and of a transformer: random weights, against diffusers.

    python tools/full_size.py --dir=/path/with/20GB
    python tools/full_size.py --dir=/path/with/20GB --model=wan2.1-1.3b

1. diffusers makes the transformer in bfloat16 and saves it (SD3.5-medium 4.9 GB, Wan2.1-T2V-1.3B 2.8 GB, one file).
2. `marble-jax convert` brings it into our layout, and back; both are timed against a plain copy of the file.
3. Every tensor that came back is compared with the original, bit for bit.
4. Both libraries compute velocities in float32 on the bfloat16 weights, each in a process of its own whose peak memory
   is measured: of SD3.5 at 512 x 512 (1024 image and 333 text tokens), of Wan at 240 x 416 with 1 and 5 frames.

Prints one JSON object. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIGMA = 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and what it is asked.

    Attributes:
      diffusers: class of its transformer there.
      config: of its transformer.
      latents: shapes of the latents of each sample, [1, h, w, C] or [1, f, h, w, C].
      conditioning: shapes of the text arrays, by our name of them.
      arguments: our name of a text array -> diffusers' argument.
      tokens: text tokens that are not zeros.
      load: (directory, options) -> our model and its parameters.
      velocity: ours.
    """

    diffusers: str
    config: dict[str, Any]
    latents: tuple[tuple[int, ...], ...]
    conditioning: dict[str, tuple[int, ...]]
    arguments: dict[str, str]
    tokens: int
    load: Callable[[pathlib.Path], tuple[Any, Any]]
    velocity: Callable[..., Any]


def sd35_medium() -> Case:
    import jax.numpy as jnp

    from marble_jax.families.sd3.layer_names import load_mmdit
    from marble_jax.families.sd3.transformer import velocity

    return Case(
        diffusers="SD3Transformer2DModel",
        config=dict(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        latents=((1, 64, 64, 16),),
        conditioning={"embeds": (1, 77 + 256, 4096), "pooled": (1, 2048)},
        arguments={"embeds": "encoder_hidden_states", "pooled": "pooled_projections"},
        tokens=77 + 256,
        load=lambda path: load_mmdit(path, jnp.bfloat16, table_side=32, dtype=jnp.float32),
        velocity=velocity,
    )


def wan21_1_3b() -> Case:
    import jax.numpy as jnp

    from marble_jax.families.wan.layer_names import load_transformer
    from marble_jax.families.wan.transformer import velocity

    return Case(
        diffusers="WanTransformer3DModel",
        config=dict(
            patch_size=(1, 2, 2),
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=16,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=8960,
            num_layers=30,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=1024,
        ),
        # One frame of latents is one frame, two are five.
        latents=((1, 1, 30, 52, 16), (1, 2, 30, 52, 16)),
        conditioning={"embeds": (1, 512, 4096)},
        arguments={"embeds": "encoder_hidden_states"},
        tokens=40,
        load=lambda path: load_transformer(path, jnp.bfloat16, dtype=jnp.float32),
        velocity=velocity,
    )


CASES = {"sd3.5-medium": sd35_medium, "wan2.1-1.3b": wan21_1_3b}


def inputs(case: Case) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Latents of the samples, and text arrays whose tokens beyond the prompt are zeros."""
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal(shape).astype(np.float32) for shape in case.latents]
    texts = {}
    for name, shape in case.conditioning.items():
        texts[name] = rng.standard_normal(shape).astype(np.float32)
    texts["embeds"][:, case.tokens :] = 0
    return latents, texts


def make(model: str, root: pathlib.Path) -> dict:
    import diffusers
    import torch

    case = CASES[model]()
    with torch.device("meta"):
        theirs = getattr(diffusers, case.diffusers)(**case.config)
    theirs = theirs.to(torch.bfloat16).to_empty(device="cpu")
    # Two billion normal numbers take minutes; four million, taken over and over, do as well. Their count is prime, so
    # that no two rows of a matrix are the same.
    pool = (0.02 * torch.randn(4_194_301, generator=torch.Generator().manual_seed(0))).to(
        torch.bfloat16
    )
    at = 0
    for name, tensor in theirs.state_dict().items():
        flat, done = tensor.view(-1), 0
        while done < flat.numel():
            count = min(len(pool) - at, flat.numel() - done)
            flat[done : done + count] = pool[at : at + count]
            done, at = done + count, (at + count) % len(pool)
        # Scales of norms are near one; norms without an underscore in their name have biases, too.
        if ".norm_" in name or (".norm" in name and name.endswith(".weight")):
            tensor += 1
    theirs.save_pretrained(root / "model" / "transformer")
    return {"tensors": len(theirs.state_dict())}


def convert(source: pathlib.Path, target: pathlib.Path) -> dict:
    """Runs the command line as a user would."""
    from marble_jax.cli.main import main

    start = time.perf_counter()
    assert main(["convert", f"--model={source}", f"--out={target}"]) == 0
    return {"seconds": time.perf_counter() - start}


def copy(source: pathlib.Path, target: pathlib.Path) -> dict:
    """The disk's own speed: a plain copy, on the disk when it is done."""
    start = time.perf_counter()
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 16_000_000)
        write.flush()
        os.fsync(write.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return {"seconds": seconds}


def compare(one: pathlib.Path, other: pathlib.Path) -> dict:
    from marble_jax.weights.safetensors_files import SafetensorsDir

    a, b = SafetensorsDir(one), SafetensorsDir(other)
    assert set(a.keys()) == set(b.keys())
    different = 0
    for key in a.keys():
        different += a.dtype(key) != b.dtype(key) or not np.array_equal(
            a.read(key).view(np.uint8), b.read(key).view(np.uint8)
        )
        a.release(key)
        b.release(key)
    return {"tensors": len(a.keys()), "different": int(different)}


def ours(model: str, directory: pathlib.Path, out: pathlib.Path) -> dict:
    # XLA's CPU backend otherwise converts the weights of all layers to float32 before the loop over them: 9 GB more.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_disable_hlo_passes="
        "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    ).strip()
    import jax

    case = CASES[model]()
    start = time.perf_counter()
    network, params = case.load(directory)
    loaded = time.perf_counter() - start
    samples, texts = inputs(case)

    def run(params: Any, latents: Any, texts: Any) -> Any:
        return case.velocity(network, params, None, latents, SIGMA, texts)

    start = time.perf_counter()
    for number, latents in enumerate(samples):
        np.save(out / f"ours_{number}.npy", np.asarray(jax.jit(run)(params, latents, texts)))
    return {"load_seconds": loaded, "forward_seconds": time.perf_counter() - start}


def theirs(model: str, directory: pathlib.Path, out: pathlib.Path) -> dict:
    import diffusers
    import torch

    case = CASES[model]()
    start = time.perf_counter()
    opened = getattr(diffusers, case.diffusers).from_pretrained(
        directory, torch_dtype=torch.bfloat16
    )
    network = opened.eval()

    # One layer at a time in float32, exactly; diffusers' own layerwise casting leaves every norm out.
    def widen(module, _):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        module.narrow = [(tensor, tensor.data) for tensor in tensors]
        for tensor in tensors:
            # Tables of positions may be in float64.
            if tensor.dtype == torch.bfloat16:
                tensor.data = tensor.data.float()

    def narrow(module, _, out):
        for tensor, data in module.narrow:
            tensor.data = data
        return out

    for module in network.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)
    loaded = time.perf_counter() - start
    samples, texts = inputs(case)
    arguments = {case.arguments[name]: torch.from_numpy(text) for name, text in texts.items()}
    start = time.perf_counter()
    for number, latents in enumerate(samples):
        channels_first = torch.from_numpy(np.moveaxis(latents, -1, 1).copy())
        with torch.no_grad():
            velocity = network(
                hidden_states=channels_first,
                timestep=torch.tensor([SIGMA * 1000]),
                return_dict=False,
                **arguments,
            )[0]
        np.save(out / f"theirs_{number}.npy", np.moveaxis(velocity.float().numpy(), 1, -1))
    return {"load_seconds": loaded, "forward_seconds": time.perf_counter() - start}


STEPS = {
    "make": make,
    "convert": convert,
    "copy": copy,
    "compare": compare,
    "ours": ours,
    "theirs": theirs,
}


ABOUT_MODEL = ("make", "ours", "theirs")
"""Steps that are told the model before their paths."""


def alone(step: str, *arguments: Any) -> dict:
    """Runs one step in a process of its own."""
    print(f"{step} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    record = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(record), file=sys.stderr, flush=True)
    return record


def prove(root: pathlib.Path, model: str = "sd3.5-medium") -> dict:
    """All steps of a model; the record."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "model" / "transformer" / "config.json").is_file():
        alone("make", model, root)
    (file,) = (root / "model" / "transformer").glob("*.safetensors")
    size = file.stat().st_size
    for name in ("stored", "back"):
        shutil.rmtree(root / name, ignore_errors=True)
    record = {
        "bytes": size,
        "copy": alone("copy", file, root / "copied"),
        "to_orbax": alone("convert", root / "model", root / "stored"),
        "to_diffusers": alone("convert", root / "stored", root / "back"),
        "round_trip": alone(
            "compare", root / "model" / "transformer", root / "back" / "transformer"
        ),
    }
    for step in ("copy", "to_orbax", "to_diffusers"):
        record[step]["mb_per_second"] = size / 1e6 / record[step]["seconds"]
    record["ours"] = alone("ours", model, root / "stored" / "transformer", root)
    record["theirs"] = alone("theirs", model, root / "model" / "transformer", root)
    record["errors"] = []
    for number, _ in enumerate(CASES[model]().latents):
        got, want = (
            np.load(root / f"{name}_{number}.npy").astype(np.float64) for name in ("ours", "theirs")
        )
        error = {
            "relative": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
            "largest": float(np.abs(got - want).max()),
            "largest_velocity": float(np.abs(want).max()),
        }
        record["errors"].append(error)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=pathlib.Path)
    parser.add_argument("--model", choices=CASES, default="sd3.5-medium")
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.step:
        given = options.arguments
        told = given[:1] if options.step in ABOUT_MODEL else []
        result = STEPS[options.step](*told, *map(pathlib.Path, given[len(told) :]))
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(
            json.dumps(
                {
                    **result,
                    "peak_gb": used.ru_maxrss * 1024 / 1e9,
                    "user_seconds": used.ru_utime,
                    "system_seconds": used.ru_stime,
                }
            )
        )
    elif options.dir:
        print(json.dumps(prove(options.dir, options.model), indent=1))
    else:
        parser.error("expected --dir")


if __name__ == "__main__":
    main()
