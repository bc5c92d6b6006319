"""Full-size proof of the conversion and of the transformer: SD3.5-medium with random weights, against diffusers.

    python tools/full_size.py --dir=/path/with/20GB

1. diffusers makes the transformer in bfloat16 and saves it (4.9 GB, one file).
2. `marble-jax convert` brings it into our layout, and back; both are timed against a plain copy of the file.
3. Every tensor that came back is compared with the original, bit for bit.
4. Both libraries compute one velocity at 512 x 512 (1024 image and 333 text tokens), in float32 on the bfloat16
   weights, each in a process of its own whose peak memory is measured.

Prints one JSON object. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np

TOKENS = 77 + 256


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Latents [1, 64, 64, 16], text embeddings, pooled embeddings and sigma."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return draw(1, 64, 64, 16), draw(1, TOKENS, 4096), draw(1, 2048), 0.7


def make(root: pathlib.Path) -> dict:
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(
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
        )
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    # Two billion normal numbers take minutes; four million, taken over and over, do as well. Their count is prime, so
    # that no two rows of a matrix are the same.
    pool = (0.02 * torch.randn(4_194_301, generator=torch.Generator().manual_seed(0))).to(
        torch.bfloat16
    )
    at = 0
    for name, tensor in model.state_dict().items():
        flat, done = tensor.view(-1), 0
        while done < flat.numel():
            count = min(len(pool) - at, flat.numel() - done)
            flat[done : done + count] = pool[at : at + count]
            done, at = done + count, (at + count) % len(pool)
        if ".norm_" in name:
            tensor += 1
    model.save_pretrained(root / "model" / "transformer")
    return {"tensors": len(model.state_dict())}


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


def ours(directory: pathlib.Path, out: pathlib.Path) -> dict:
    # XLA's CPU backend otherwise converts the weights of all layers to float32 before the loop over them: 9 GB more.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_disable_hlo_passes="
        "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    ).strip()
    import jax
    import jax.numpy as jnp

    from marble_jax.families.sd3.layer_names import load_mmdit
    from marble_jax.families.sd3.transformer import velocity

    start = time.perf_counter()
    model, params = load_mmdit(directory, jnp.bfloat16, table_side=32, dtype=jnp.float32)
    loaded = time.perf_counter() - start
    latents, embeds, pooled, sigma = arrays()
    run = jax.jit(lambda p, x, e, q: velocity(model, p, None, x, sigma, {"embeds": e, "pooled": q}))
    start = time.perf_counter()
    np.save(out, np.asarray(run(params, latents, embeds, pooled)))
    return {"load_seconds": loaded, "forward_seconds": time.perf_counter() - start}


def theirs(directory: pathlib.Path, out: pathlib.Path) -> dict:
    import torch
    from diffusers import SD3Transformer2DModel

    start = time.perf_counter()
    model = SD3Transformer2DModel.from_pretrained(directory, torch_dtype=torch.bfloat16).eval()

    # One layer at a time in float32, exactly; diffusers' own layerwise casting leaves every norm out.
    def widen(module, _):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        module.narrow = [(tensor, tensor.data) for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.float()

    def narrow(module, _, out):
        for tensor, data in module.narrow:
            tensor.data = data
        return out

    for module in model.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)
    loaded = time.perf_counter() - start
    latents, embeds, pooled, sigma = arrays()
    start = time.perf_counter()
    with torch.no_grad():
        velocity = model(
            torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(embeds),
            torch.from_numpy(pooled),
            torch.tensor([sigma * 1000]),
            return_dict=False,
        )[0]
    np.save(out, velocity.float().numpy().transpose(0, 2, 3, 1))
    return {"load_seconds": loaded, "forward_seconds": time.perf_counter() - start}


STEPS = {
    "make": make,
    "convert": convert,
    "copy": copy,
    "compare": compare,
    "ours": ours,
    "theirs": theirs,
}


def alone(step: str, *paths: pathlib.Path) -> dict:
    """Runs one step in a process of its own."""
    print(f"{step} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--step", step, *map(str, paths)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    record = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(record), file=sys.stderr, flush=True)
    return record


def prove(root: pathlib.Path) -> dict:
    """All steps; the record."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "model" / "transformer" / "config.json").is_file():
        alone("make", root)
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
    record["ours"] = alone("ours", root / "stored" / "transformer", root / "ours.npy")
    record["theirs"] = alone("theirs", root / "model" / "transformer", root / "theirs.npy")
    got, want = (np.load(root / f"{name}.npy").astype(np.float64) for name in ("ours", "theirs"))
    record["error"] = {
        "relative": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "largest": float(np.abs(got - want).max()),
        "largest_velocity": float(np.abs(want).max()),
    }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=pathlib.Path)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("paths", nargs="*", type=pathlib.Path)
    options = parser.parse_args()
    if options.step:
        result = STEPS[options.step](*options.paths)
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
        print(json.dumps(prove(options.dir), indent=1))
    else:
        parser.error("expected --dir")


if __name__ == "__main__":
    main()
