"""Measures signal and noise of a run's per-reward gradients at a fixed policy, and what directions are worth.

    python -m tools.harmony --workdir=runs/first --policy=base --steps=48 --out=runs/harmony/base

Nothing is trained. `--help` prints the options, and `marble_jax report` for the page that shows the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from marble_jax import platform
from marble_jax.cli.help import ALL, verb_help
from marble_jax.cli.kinds import Place, Switch, Whole, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.cli.parsing import parse
from marble_jax.errors import InputError
from marble_jax.storage.files import read_json
from marble_jax.storage.workdir import Workdir
from tools.harmony import results, table
from tools.harmony.collect import DESCRIPTION, claim, collect, describe, measured
from tools.harmony.policy import POLICIES, open_policy
from tools.harmony.steps import read_steps

VERB = Verb(
    about="Measures signal and noise of a run's per-reward gradients at a fixed policy. Nothing is trained.",
    usage=("--workdir=RUN --out=DIR [options]",),
    options=(
        Option("workdir", "a training run, in part or whole", Place(), "RUN", required=True),
        Option(
            "out",
            "the measured steps (some MB each), table.txt and harmony.json; the same command goes on after a kill",
            Place(),
            "DIR",
            required=True,
        ),
        Option(
            "policy",
            f"where gradients are taken, {', '.join(POLICIES)}: the trained policy, on images of the run's rollout "
            "policy; the rollout policy, on its own; the base model with a new adapter, on its own",
            default="current",
        ),
        Option("checkpoint", "optimiser step of the checkpoint (the newest)", Whole(1), "N"),
        Option(
            "steps",
            "steps to measure, each with other prompts, noise and timesteps",
            Whole(4),
            default="48",
        ),
        Option(
            "unit",
            "samples of the smallest mini-batch in the table by mini-batch size",
            Whole(1),
            default="9",
        ),
        Option(
            "anchors",
            "with the part of the objective that no advantage scales, at every sample",
            Switch(),
        ),
        Option("rewards", "measured instead of the run's own", Words(), "A,B"),
        Option(
            "to_report",
            f"does not add the result to RUN/{results.FILE}, which `marble-jax report` shows",
            Switch(),
            default="true",
        ),
    ),
    no_config="a run has its own",
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    if any(word in ("-h", "--help") for word in argv):
        print(
            verb_help("harmony", VERB, ALL).replace("marble-jax harmony", "python -m tools.harmony")
        )
        return 0
    try:
        _main(parse("harmony", VERB, argv), argv)
    except InputError as error:
        print(f"harmony: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("harmony: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _main(options: argparse.Namespace, argv: Sequence[str]) -> None:
    workdir, folder = Workdir(options.workdir), Path(options.out)
    num_steps = options.steps
    platform.keep_compilations()
    policy = open_policy(workdir, options.policy, options.checkpoint, options.rewards)
    try:
        claim(
            folder,
            describe(
                policy, str(workdir.path.resolve()), options.policy, options.unit, options.anchors
            ),
        )
        collect(policy, folder, num_steps, options.unit, options.anchors, _say)
    finally:
        policy.close()
    if len(measured(folder)) > num_steps:
        _say(f"{folder} holds {len(measured(folder))} steps; the first {num_steps} are used")
    measurement = results.analyse(read_steps(folder, num_steps), read_json(folder / DESCRIPTION))
    measurement["command"] = f"python -m tools.harmony {' '.join(argv)}"
    results.write_json(folder / results.FILE, measurement)
    written = table.text(measurement)
    (folder / "table.txt").write_text(written + "\n", encoding="utf-8")
    print(written)
    if options.to_report:
        results.add_to_workdir(workdir, measurement)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
