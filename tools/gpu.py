"""Everything that wants a GPU, on a machine that is had for minutes: the benchmark against PyTorch, and the GPU tests.

    python -m tools.gpu --out=results/h200 --total=540     # what there is time for, the most telling first
    python -m tools.gpu --out=results/h200                 # the parts that are left
    python -m tools.gpu --out=results/h200 --parts=tests
    python -m tools.gpu --out=results/h200 --show          # only the table of what is there

`--out` has two files: `gpu.json`, everything that was found, and `log.txt`. A part is a process of its own, so that JAX
and PyTorch do not share the card's memory, one failure does not take the rest with it, and a part that ran out of time
is all that has to be repeated: what is finished stands in `gpu.json` and is not run again without `--again`. To go on
elsewhere, bring that file. No part is begun that is unlikely to end in time, and the last one is ended before `--total`
is over. Compiled programs are kept in `~/.cache/marble_jax/xla`. Weights are drawn on the card.

  core       our weighted sum and our exact step for five rewards, with the blocks in a loop (model.unroll=1)
  unrolled   core with all blocks one behind another (model.unroll=13), as presets for 80 and 140 GB have them; compiles
             for minutes
  tuned      the PyTorch peer (diffusers, PEFT) with its best reasonable settings
  tests      pytest -m gpu: fused attention, exact gradients in bfloat16, memory of chunks
  dots       core with model.remat=dots, which no preset has
  upstream   the PyTorch peer as upstream's trainer runs it
  compiled   `tuned` through torch.compile
  more       our amortized step, twenty rewards, six separate backward passes
  presets    compiles the training step of the preset for this card at full size: does it fit as planned

`gpu.json` has hardware, driver, versions, shapes, times with quartiles, TFLOP/s, MFU and ratios, and the reason for a
part that is missing; beside MFU stands the cap that the roofline of the compiled program sets, on a card that
`marble_jax.distributed.accelerators` knows. Rows of `dots` and `unrolled` end with the part's name. Sides are timed in
different processes, so the spread of a ratio is that of its two medians: from q1 / q3 to q3 / q1. A part whose packages
are not installed is skipped; PyTorch's need torch, diffusers and peft, too. `--force --size=tiny --rows=weighted_sum
--rounds=1` goes all the way on a CPU, in seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from tools.gpu_record import ROWS, TESTS, VARIANTS, combine, table

ROOT = Path(__file__).parents[1]
PARTS = ("core", "unrolled", "tuned", "tests", "dots", "upstream", "compiled", "more", "presets")
"""In the order of what they tell: what the presets run comes before what none of them does."""
OURS = ("core", "more", *VARIANTS)


def distributions(requirements: Sequence[str]) -> tuple[str, ...]:
    """Names of distributions in requirements such as "etils[epath]>=1.10"."""
    return tuple(re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements)


def needed_distributions() -> dict[str, tuple[str, ...]]:
    """Distributions that each part needs: those of the package, by pyproject, and pytest or those of PyTorch's side."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = distributions(project["dependencies"])
    peer = own + distributions(project["optional-dependencies"]["torch"])
    needed = dict.fromkeys(TESTS, (*own, "pytest"))
    needed |= {part: own if part in OURS else peer for part in ROWS}
    return needed


NEEDS = needed_distributions()
FEWEST_SECONDS = {"core": 90, "dots": 90, "unrolled": 240, "compiled": 120, "presets": 150}
"""A part is not begun with less time than this, or than `FEWEST` where it is not here."""
FEWEST = 60
MARGIN = 20
"""Seconds that are left of `--total` when the last part is ended: its files still have to be brought away."""


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
        "--total", type=float, default=840.0, help="longest all of it may take, seconds"
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
        *VARIANTS.get(part, ()),
        *(["--force"] if options.force else []),
    ]


def not_installed(names: Sequence[str]) -> list[str]:
    """Those of some distributions that this Python has not."""
    missing = []
    for name in names:
        # By distribution: a module may be called otherwise, and a folder of the same name is none.
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def run_part(part: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs a part in a process of its own for at most `seconds`.

    Returns:
      {"state": "done", "result": ...}, or "skipped", "failed" or "stopped" with a reason.
    """
    if missing := not_installed(NEEDS[part]):
        return {"state": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    with tempfile.TemporaryDirectory() as place:
        return _run_part(part, options, seconds, Path(place) / "record")


def _run_part(
    part: str, options: argparse.Namespace, seconds: float, record: Path
) -> dict[str, Any]:
    # Memory is taken as it is needed, not three quarters at once: PyTorch's parts have the card but for JAX's copy of
    # the weights. The tests' own configuration would keep JAX on the CPU.
    environ = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if part in TESTS and not options.force:
        environ["JAX_PLATFORMS"] = "cuda"
    start = monotonic()
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
    taken = round(monotonic() - start, 1)
    if part in TESTS and record.exists():
        return {"state": "done", "seconds": taken, "result": tests_record(record, code)}
    if code or not record.exists():
        return {"state": "failed", "seconds": taken, "reason": last_line(options.out / "log.txt")}
    result = json.loads(record.read_text(encoding="utf-8"))
    return {"state": "done", "seconds": taken, "result": result}


def tests_record(file: Path, code: int) -> dict[str, Any]:
    """Counts and names of pytest's XML report."""
    import xml.etree.ElementTree as xml

    cases = list(xml.parse(file).getroot().iter("testcase"))

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


class DamagedRecord(Exception):
    """A record that cannot be read; the message is one line."""


def finished(folder: Path) -> dict[str, Any]:
    """Parts that an earlier call finished.

    Raises:
      DamagedRecord: the file is cut, or no record.
    """
    file = folder / "gpu.json"
    if not file.exists():
        return {}
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
        return {name: part for name, part in parts.items() if part["state"] == "done"}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DamagedRecord(
            f"--out: expected the record of an earlier call, or none, as {file}; received one that cannot be read "
            f"({type(error).__name__}: move it away)"
        ) from error


def kept(parts: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What goes on record: a part that failed this time leaves what an earlier call found."""
    return {
        name: part if part["state"] == "done" else earlier.get(name, part)
        for name, part in parts.items()
    }


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
    end = monotonic() + options.total - MARGIN
    try:
        earlier = finished(options.out)
    except DamagedRecord as error:
        print(f"tools.gpu: {error}", file=sys.stderr)
        return 2
    parts = dict(earlier)
    for part in [] if options.show else options.parts:
        if part in parts and not options.again:
            continue
        seconds = min(options.seconds, end - monotonic())
        if seconds < FEWEST_SECONDS.get(part, FEWEST):
            parts[part] = {"state": "stopped", "reason": "no time left; the same command goes on"}
            continue
        print(f"{part} ...", file=sys.stderr, flush=True)
        parts[part] = run_part(part, options, seconds)
        state, reason = parts[part]["state"], parts[part].get("reason", "")
        print(f"{part}: {state} {reason}", file=sys.stderr, flush=True)
        write(options.out / "gpu.json", combine(kept(parts, earlier)))
    write(options.out / "gpu.json", combine(kept(parts, earlier)))
    record = combine(parts)
    print(table(record))
    failed = any(found["state"] == "failed" for found in parts.values())
    return int(failed or any(found["failed"] for found in record["tests"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
