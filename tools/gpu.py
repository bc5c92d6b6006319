"""Everything that wants a GPU, on a machine with one: the GPU tests, and the benchmark against PyTorch.

    python -m tools.gpu --out=results/h200                              # all parts, those that are done left out
    python -m tools.gpu --out=results/h200 --parts=tests,core --total=540
    python -m tools.gpu --out=results/h200 --show                       # only the table of what is there

A part is a process of its own, so that JAX and PyTorch do not share the card's memory, one failure does not take the
rest with it, and a part that ran out of time is all that has to be repeated: what is finished lies in `--out` as
PART.json and is not run again without `--again`. Compiled programs are kept in `~/.cache/marble_jax/xla`.

  tests      pytest -m gpu: fused attention, exact gradients in bfloat16, memory of chunks
  core       our weighted sum and our exact step for five rewards
  upstream   the PyTorch peer (diffusers, PEFT) as upstream's trainer runs it
  tuned      the PyTorch peer with its best reasonable settings; `compiled` is the same through torch.compile
  more       our amortized step, twenty rewards, six separate backward passes
  presets    compiles the training step of the preset for this card at full size: does it fit as planned

`gpu.json` has hardware, driver, versions, shapes, times with quartiles, TFLOP/s, MFU and ratios, and the reason for a
part that is missing. Sides are timed in different processes, so the spread of a ratio is that of its two medians: from
q1 / q3 to q3 / q1. PyTorch parts need torch, diffusers and peft, and are skipped without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = {
    "core": "weighted_sum,weighted_sum.no_kl,exact_k5.*,solve_k5",
    "upstream": "torch.upstream.*",
    "tuned": "torch.tuned.*",
    "compiled": "torch.compiled.*",
    "more": "combined_k5,exact_k20.*,separate_k5",
}
TESTS = {
    "tests": ("tests/harmonize/test_gpu_gradients.py", "tests/networks/test_gpu_attention.py"),
    "presets": ("tests/plan/test_gpu_memory.py",),
}
PARTS = ("tests", *ROWS, "presets")
OURS = ("core", "more")
NEEDS = {
    **{part: ("pytest", "jax", "flax", "optax", "jaxopt", "ml_collections") for part in TESTS},
    **{
        part: (
            "jax",
            "flax",
            "jaxopt",
            "ml_collections",
            *(() if part in OURS else ("torch", "diffusers", "peft")),
        )
        for part in ROWS
    },
}
FEWEST_SECONDS = 30  # a part is not begun with less
PAIRS = (
    ("exact_k5", "torch.upstream.harmonised"),
    ("exact_k5", "torch.tuned.harmonised"),
    ("exact_k5", "torch.compiled.harmonised"),
    ("weighted_sum", "torch.upstream.weighted_sum"),
    ("weighted_sum", "torch.tuned.weighted_sum"),
    ("weighted_sum", "torch.compiled.weighted_sum"),
    ("exact_k5", "weighted_sum"),
    ("exact_k20.signal", "exact_k5.signal"),
    ("exact_k5", "separate_k5"),
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, in the order to run them"
    )
    parser.add_argument("--size", choices=("tiny", "embedded", "mid", "sd35m"), default="sd35m")
    parser.add_argument(
        "--rows",
        default="",
        help="rows to time in place of a part's own (see tools.benchmark --help)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="of the benchmark")
    parser.add_argument("--seconds", type=float, default=420.0, help="longest a part may take")
    parser.add_argument(
        "--total", type=float, default=1500.0, help="longest all of it may take, seconds"
    )
    parser.add_argument("--again", action="store_true", help="run parts that are finished, too")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument(
        "--force", action="store_true", help="without a GPU: proves the way, measures nothing"
    )
    options = parser.parse_args(arguments)
    options.parts = [part.strip() for part in options.parts.split(",") if part.strip()]
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"--parts: expected some of {', '.join(PARTS)}; received {part!r}")
    for name in ("rounds", "seconds", "total"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}: expected a number above 0; received {getattr(options, name)}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder; received the file {options.out}")
    return options


def command(part: str, options: argparse.Namespace, seconds: float, record: Path) -> list[str]:
    """What runs a part, leaving its record in `record`."""
    if part in TESTS:
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-rs",
            f"--junitxml={record}",
            *TESTS[part],
        ]
    torch = [] if part not in OURS else ["--no-torch"]
    return [
        sys.executable,
        "-m",
        "tools.benchmark",
        f"--size={options.size}",
        f"--only={options.rows or ROWS[part]}",
        f"--repeats={options.rounds}",
        f"--seconds={0.4 * seconds:.0f}",
        f"--json={record}",
        *torch,
        f"--torch-compile={'on' if part == 'compiled' else 'off'}",
        *(["--force"] if options.force else []),
    ]


def run_part(part: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs a part in a process of its own for at most `seconds`.

    Returns:
      {"state": "done", "result": ...}, or "skipped", "failed" or "stopped" with a reason.
    """
    if missing := [name for name in NEEDS[part] if importlib.util.find_spec(name) is None]:
        return {"state": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    record = options.out / f".{part}.part"
    record.unlink(missing_ok=True)
    # Memory is taken as it is needed, not three quarters at once: PyTorch's parts have the card but for JAX's copy of
    # the weights. The tests' own configuration would keep JAX on the CPU.
    environ = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if part in TESTS and not options.force:
        environ["JAX_PLATFORMS"] = "cuda"
    start = time.monotonic()
    with open(options.out / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n=== {part}, at most {seconds:.0f} s\n")
        log.flush()
        process = subprocess.Popen(
            command(part, options, seconds, record),
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
            return {
                "state": "stopped",
                "reason": f"not finished within {seconds:.0f} s (log.txt says how far it came)",
            }
    taken = round(time.monotonic() - start, 1)
    if part in TESTS and record.exists():
        return {"state": "done", "seconds": taken, "result": tests_record(record, code)}
    if code or not record.exists():
        return {"state": "failed", "seconds": taken, "reason": last_line(options.out / "log.txt")}
    result = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    return {"state": "done", "seconds": taken, "result": result}


def tests_record(file: Path, code: int) -> dict[str, Any]:
    """Counts and names of pytest's XML report."""
    import xml.etree.ElementTree as xml

    cases = list(xml.parse(file).getroot().iter("testcase"))
    file.unlink()

    def having(tag: str) -> list[dict[str, str]]:
        return [
            {"name": case.get("name", ""), "message": found.get("message", "")[:300]}
            for case in cases
            for found in case.findall(tag)
        ]

    bad, skipped = having("failure") + having("error"), having("skipped")
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": bad,
        "skipped": skipped,
        "exit": code,
        "seconds": {case.get("name"): float(case.get("time", 0)) for case in cases},
    }


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1][:300] if lines else ""


def combine(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One record of all parts: rows of every side, and the ratios between them."""
    results = {
        part: found["result"]
        for part, found in parts.items()
        if part in ROWS and found["state"] == "done"
    }
    times = {name: entry for result in results.values() for name, entry in result["times"].items()}
    first = next(iter(results.values()), {})
    versions = {
        name: version for result in results.values() for name, version in result["versions"].items()
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "hardware": first.get("hardware", {}),
        "shapes": first.get("shapes", {}),
        "times": times,
        "ratios": ratios(times),
        "tests": {
            part: parts[part]["result"]
            for part in TESTS
            if parts.get(part, {}).get("state") == "done"
        },
        "parts": {
            part: {k: v for k, v in found.items() if k != "result"} for part, found in parts.items()
        },
    }


def ratios(times: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Speeds relative to each other, from medians; low and high from the quartiles of both."""
    found = {}
    seldom = [("exact_k5", name) for name in times if name.startswith("weighted_sum.kl_every_")]
    for fast, slow in (*PAIRS, *seldom):
        if fast in times and slow in times:
            one, other = times[fast]["milliseconds"], times[slow]["milliseconds"]
            found[f"{fast} / {slow}"] = {
                "median": other["median"] / one["median"],
                "low": other["q1"] / one["q3"],
                "high": other["q3"] / one["q1"],
            }
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown for the README, and what is missing."""
    lines = []
    if size := record["shapes"]:
        where = record["hardware"]
        lines += [
            f"{size['name']}: {size['num']} samples of {size['side']} x {size['side']} latents and "
            f"{size['tokens']} text tokens, {size['parameters'] / 1e6:.0f} M parameters, {size['dtype']}; "
            f"{'; '.join(where.get('graphics') or where['devices'])}; "
            + ", ".join(
                f"{name} {record['versions'][name]}"
                for name in ("python", "jax", "torch", "diffusers")
                if name in record["versions"]
            ),
            "",
            "| micro-batch | ms (quartiles) | TFLOP/s | MFU | GB |",
            "|---|---|---|---|---|",
        ]
    for name, entry in record["times"].items():
        ms = entry["milliseconds"]
        lines.append(
            f"| {name} | {ms['median']:.2f} ({ms['q1']:.2f} to {ms['q3']:.2f}) | "
            + (f"{entry['tflops']:.3g}" if "tflops" in entry else "")
            + " | "
            + (f"{entry['mfu']:.0%}" if "mfu" in entry else "")
            + " | "
            + (f"{entry['bytes'] / 1e9:.1f}" if "bytes" in entry else "")
            + " |"
        )
    if record["ratios"]:
        lines += ["", "| times as fast as | median | from | to |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {r['median']:.2f} | {r['low']:.2f} | {r['high']:.2f} |"
            for name, r in record["ratios"].items()
        ]
    for part, tests in record["tests"].items():
        lines += [
            "",
            f"{part}: {tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} "
            "skipped",
        ]
        lines += [
            f"  {kind}: {each['name']}: {each['message']}"
            for kind in ("failed", "skipped")
            for each in tests[kind]
        ]
    lines += [
        f"{part}: {found['state']}: {found['reason']}"
        for part, found in record["parts"].items()
        if found["state"] != "done"
    ]
    return "\n".join(lines)


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU; JAX is not asked, which would open the card in this process."""
    try:
        return (
            "GPU 0"
            in subprocess.run(
                ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60
            ).stdout
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def write(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not (options.show or options.force or has_gpu()):
        print(
            "tools.gpu: expected a machine with an NVIDIA GPU; received one of which nvidia-smi -L lists none "
            "(--force runs all the same, --show prints what is there)",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    end, parts = time.monotonic() + options.total, {}
    for part in PARTS:
        file = options.out / f"{part}.json"
        if file.exists() and not (options.again and part in options.parts):
            parts[part] = json.loads(file.read_text(encoding="utf-8"))
    for part in [] if options.show else options.parts:
        if part in parts:
            continue
        seconds = min(options.seconds, end - time.monotonic())
        if seconds < FEWEST_SECONDS:
            parts[part] = {"state": "stopped", "reason": "no time left; the same command goes on"}
            continue
        print(f"{part} ...", file=sys.stderr, flush=True)
        parts[part] = run_part(part, options, seconds)
        print(
            f"{part}: {parts[part]['state']} {parts[part].get('reason', '')}",
            file=sys.stderr,
            flush=True,
        )
        if parts[part]["state"] == "done":
            write(options.out / f"{part}.json", parts[part])
        write(options.out / "gpu.json", combine(parts))
    record = combine(parts)
    write(options.out / "gpu.json", record)
    print(table(record))
    failed = any(found["state"] == "failed" for found in parts.values()) or any(
        found["failed"] for found in record["tests"].values()
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
