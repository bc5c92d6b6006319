"""Where a measurement was taken, and how it is shown."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from marble_jax.trainable import lora
from marble_jax.version import VERSION
from tools.benchmark import measure
from tools.benchmark.sizes import ROOT, Problem

QUIET = 0.05
"""Largest share of the cores that other processes may use. A thread that waits for its turn stops the other threads of
a parallel loop too; PyTorch's then spin, which made a tiny step 30 times slower on a loaded machine."""
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "peft")


def versions() -> dict[str, str]:
    """Of everything that takes part; a library that is not installed is left out."""
    found = {"python": platform.python_version(), "marble_jax": VERSION}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def hardware(threads: int) -> dict[str, Any]:
    """Processor, threads and devices."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    models = [
        line.partition(":")[2].strip()
        for line in text.splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "graphics": graphics(),
    }


def busy_seconds() -> tuple[float, float]:
    """Processor seconds that the machine and this process have spent so far; the first is NaN outside Linux."""
    own = sum(os.times()[:4])
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan"), own
    user, nice, system, _, _, *more = map(
        int, stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK"), own


def share_of_others(
    before: tuple[float, float], after: tuple[float, float], seconds: float, cores: int
) -> float:
    """Share of the machine's cores that other processes kept busy, from two readings of `busy_seconds`."""
    return ((after[0] - before[0]) - (after[1] - before[1])) / (seconds * cores)


def shapes(problem: Problem) -> dict[str, Any]:
    """The size, with the numbers of values in the network and in the adapter."""
    return {
        **dataclasses.asdict(problem.size),
        "parameters": lora.num_parameters(problem.params),
        "adapter_parameters": lora.num_parameters(problem.current),
    }


def graphics() -> list[str]:
    """Name, driver, memory and clocks of every NVIDIA GPU, as its own tool reports them; nothing without one."""
    try:
        asked = subprocess.run(
            [
                "nvidia-smi",
                "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm",
                "--format=csv,noheader",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return asked.stdout.strip().splitlines() if asked.returncode == 0 else []


def times_record(
    times: Mapping[str, list[float]],
    memory: Mapping[str, int],
    flops: Mapping[str, float] | None = None,
    peak: float | None = None,
    bounds: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Quartiles in milliseconds, the single times, and where they are known bytes of memory, TFLOP/s and MFU.

    Where a bound is known, `bound_milliseconds` is it, and `mfu_cap` the MFU that the program would have at it.

    Args:
      times: seconds by name, one a round.
      memory: bytes by name.
      flops: FLOPs that the mathematics asks for, by name.
      peak: FLOP/s of the device; None where it is not in the table of chips.
      bounds: the least seconds that the compiled program can take, by name.
    """
    found = {}
    bounds = bounds or {}
    for name, values in times.items():
        entry: dict[str, Any] = {
            "milliseconds": measure.quartiles([1e3 * t for t in values]),
            "rounds": [round(1e3 * t, 3) for t in values],
        }
        if name in memory:
            entry["bytes"] = memory[name]
        if flops and flops.get(name):
            rate = flops[name] / (entry["milliseconds"]["median"] / 1e3)
            entry |= {"flops": flops[name], "tflops": rate / 1e12} | (
                {"mfu": rate / peak} if peak else {}
            )
        if name in bounds:
            entry["bound_milliseconds"] = 1e3 * bounds[name]
            if "mfu" in entry:
                entry["mfu_cap"] = flops[name] / (bounds[name] * peak)
        found[name] = entry
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    size, where = record["shapes"], record["hardware"]
    lines = [
        f"{size['name']}: {size['num']} samples of {size['side']} x {size['side']} latents and {size['tokens']} "
        f"text tokens, {size['parameters'] / 1e6:.1f} M parameters, {size['adapter_parameters'] / 1e6:.2f} M in "
        f"the adapter, {size['dtype']}, chunk {size['chunk']}",
        f"{where['processor']}, {where['threads']} threads, {', '.join(where['devices'])}; other processes kept "
        f"{100 * record['others']:.0f} % of the cores busy"
        + (
            f", so nothing here is a measurement (wanted: at most {100 * QUIET:.0f} %)"
            if record["others"] > QUIET
            else ""
        ),
        "",
        f"{'milliseconds a micro-batch':44s} {'median':>9s} {'q1':>9s} {'q3':>9s} {'memory MB':>10s} "
        f"{'TFLOP/s':>8s} {'MFU':>4s} {'cap':>4s}",
    ]
    for name, entry in record["times"].items():
        ms, held = entry["milliseconds"], entry.get("bytes")
        line = (
            f"{name:44s} {ms['median']:9.2f} {ms['q1']:9.2f} {ms['q3']:9.2f} "
            + (f"{held / 1e6:10.1f}" if held is not None else " " * 10)
            + (f" {entry['tflops']:8.3g}" if "tflops" in entry else "")
            + (f" {entry['mfu']:4.0%}" if "mfu" in entry else "")
            + (f" {entry['mfu_cap']:4.0%}" if "mfu_cap" in entry else "")
        )
        lines.append(line.rstrip())
    lines += [
        "",
        f"{'speed relative to (above 1: the first is faster)':74s} {'median':>7s} {'q1':>7s} {'q3':>7s}",
    ]
    for name, found in record["ratios"].items():
        lines.append(f"{name:74s} {found['median']:7.3f} {found['q1']:7.3f} {found['q3']:7.3f}")
    rounds = next(iter(record["times"].values()))["milliseconds"]["num"]
    return "\n".join([*lines, "", f"{rounds} rounds"])


def write(record: Mapping[str, Any], path: Path) -> None:
    """Writes JSON beside the target first, so that a broken run leaves an older record alone."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
