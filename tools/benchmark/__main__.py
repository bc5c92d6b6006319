"""Times a training micro-batch: ours by every method, and the same one in PyTorch, interleaved in one process.

    python -m tools.benchmark --size=mid --json=mid.json
    python -m tools.benchmark --size=embedded --formulations --no-torch
    python -m tools.benchmark --size=mid --only='weighted_sum*,combined_k5,exact_k5*,solve_k5,torch.*' --seconds=300

Sizes: `embedded` is the shipped pipeline as configs/embedded.py trains it; `mid` fills two cores; `sd35m` is
SD3.5-medium at 512 px with random weights in bfloat16, for a GPU (`--force` for another device). A micro-batch is what
one turn of the loop in `marble_jax.training.train_step` does: noise, v_rollout and v_base, the current velocity with
its pull-backs, and the sums.

Times are rows, in milliseconds:

  weighted_sum           one advantage, one backward pass, three forward passes
  weighted_sum.no_kl     the same without the reference policy; .kl_every_N is the average with it every Nth time, as
                         seldom as exact_kK has it: like against like
  combined_k5            between solves of the amortized mode, .no_kl and .kl_every_N likewise; amortized_k5 is nine of
                         the latter and one of exact_k5
  exact_kK.anchors       gradients of K rewards with everything in them (anchor_every = 1)
  exact_kK.signal        without the terms that no advantage scales
  exact_kK               their average as training mixes them by default (one in anchor_every)
  solve_kK               once an optimiser step: Gram matrix, alpha, update
  exact_kK.step          average micro-batch of a whole optimiser step, solve included
  separate_kK            K + 1 backward passes through one forward pass
  pg.*                   a policy gradient with one update a rollout: of one advantage, and of every reward's
  f.*                    formulations that training does not use (`--formulations`); .rolled has one block in a turn of
                         the scan where the size has several
  torch.upstream.*       diffusers and PEFT as upstream's trainer runs them; harmonised is K = 5
  torch.tuned.*          with the rollout policy merged, inference mode, float32 losses; torch.compiled.* compiled too

TFLOP/s and MFU count what the mathematics asks for (`marble_jax.families.sd3.flops`), not what is computed again. The
cap beside it is the MFU that the roofline of our compiled program leaves room for (`marble-jax help roofline`), on a
device whose peak and bandwidth are known.
Memory is what the compiler reserves for temporaries (ours) or PyTorch's peak allocation (on a GPU).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=("tiny", "embedded", "mid", "sd35m"), default="embedded")
    parser.add_argument(
        "--repeats", type=int, default=15, help="rounds, each of which runs everything once"
    )
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="no round begins after this long"
    )
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="cores, for both libraries",
    )
    parser.add_argument(
        "--chunk", type=int, help="samples whose per-sample gradients are held at once"
    )
    parser.add_argument(
        "--unroll", type=int, help="transformer blocks in one turn of our scan (that of the size)"
    )
    parser.add_argument(
        "--remat",
        choices=("none", "full", "dots", "products"),
        help="what our backward pass recomputes (that of the size)",
    )
    parser.add_argument(
        "--formulations",
        action="store_true",
        help="time the formulations that were not chosen, too",
    )
    parser.add_argument(
        "--only",
        default="",
        help="rows to time, shell patterns separated by commas, so that more "
        "rounds fit: 'weighted_sum*,combined_k5,exact_k5*,solve_k5,torch.*'",
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "xla", "cudnn", "einsum"),
        default="auto",
        help="of our side; auto is the fused kernel where the machine has it",
    )
    parser.add_argument(
        "--no-torch", dest="torch", action="store_false", help="leave the PyTorch side out"
    )
    parser.add_argument(
        "--torch-compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="also time torch.compile (auto: on a GPU, or with a C++ compiler)",
    )
    parser.add_argument(
        "--force", action="store_true", help="run a size for GPUs on another device"
    )
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    if not 1 <= options.threads <= cores:
        parser.error(f"--threads: expected 1 to {cores}; received {options.threads}")
    for name in ("repeats", "unroll"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1; received {getattr(options, name)}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: expected a file in an existing directory; received {options.json}")
    return options


def prepare(options: argparse.Namespace) -> None:
    """What has to be set before JAX and PyTorch are imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is for both


def run(options: argparse.Namespace) -> dict:
    """Measures; returns the record."""
    import dataclasses

    import jax

    import marble_jax  # noqa: F401  (sets a compiler flag before the first backend opens)
    from marble_jax import platform
    from marble_jax.distributed import accelerators
    from marble_jax.errors import InputError
    from tools.benchmark import bounds, cases, measure, record
    from tools.benchmark.sizes import SIZES, make_problem

    platform.keep_compilations()
    size = dataclasses.replace(SIZES[options.size](), attention=options.attention)
    chosen = {
        name: getattr(options, name)
        for name in ("chunk", "unroll", "remat")
        if getattr(options, name) is not None
    }
    size = dataclasses.replace(size, **chosen)
    if size.num % size.chunk:
        raise InputError(
            f"--chunk: expected a divisor of the {size.num} samples; received {size.chunk}"
        )
    if size.gpu_only and jax.default_backend() != "gpu" and not options.force:
        raise InputError(
            f"--size: expected a GPU for {size.name}; received {jax.default_backend()} (--force to run)"
        )
    if options.torch and (
        missing := [p for p in ("torch", "diffusers", "peft") if not importlib.util.find_spec(p)]
    ):
        raise InputError(
            f"PyTorch side: expected torch, diffusers and peft; received no {', '.join(missing)} "
            "(--no-torch to leave it out)"
        )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    problem = make_problem(size)
    wanted = cases.chooser(options.only)
    found = cases.our_cases(problem, options.formulations, wanted, say)
    if options.torch:
        able = jax.default_backend() == "gpu" or shutil.which("g++") is not None
        compiled = options.torch_compile == "on" or options.torch_compile == "auto" and able
        cases.add_peer(found, problem, options.threads, compiled, wanted, say)
    if not found.ours and not found.peer:
        raise InputError(
            f"--only: expected patterns of rows (--help names them); received {options.only!r}, which "
            "matches none"
        )
    say(f"timing {len(found.ours) + len(found.peer)} programs")
    before, start = record.busy_seconds(), time.perf_counter()
    times = measure.interleave([found.ours, found.peer], options.repeats, options.seconds)
    others = record.share_of_others(
        before, record.busy_seconds(), time.perf_counter() - start, os.cpu_count()
    )
    derived = cases.derive(size, times)
    chip = accelerators.by_device_kind(jax.devices()[0].device_kind)
    times = dict(
        sorted(
            {**times, **derived}.items(),
            key=lambda item: (item[0].startswith(("f.", "torch.")), item[0]),
        )
    )
    return {
        "command": " ".join(["python -m tools.benchmark", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": record.versions(),
        "hardware": record.hardware(options.threads),
        "others": others,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "shapes": record.shapes(problem),
        "times": record.times_record(
            times,
            found.memory,
            cases.flops(problem),
            chip.flops if chip else None,
            bounds.bounds(found.ours, size, chip, say),
        ),
        "ratios": cases.ratios(size, times),
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    prepare(options)
    from marble_jax.errors import InputError

    try:
        found = run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    from tools.benchmark import record

    print(record.table(found))
    if options.json is not None:
        record.write(found, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
