"""Measures signal and noise of a run's per-reward gradients at a fixed policy, and what directions are worth.

    python -m tools.harmony --workdir=runs/first --policy=base --steps=48 --out=runs/harmony/base

Nothing is trained. See HELP for the options, and `marble_jax report` for the page that shows the result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from marble_jax import platform
from marble_jax.cli.options import boolean, refuse_config, split, whole_number, word_list
from marble_jax.errors import InputError
from marble_jax.storage.files import read_json
from marble_jax.storage.workdir import Workdir
from tools.harmony import results, table
from tools.harmony.collect import DESCRIPTION, claim, collect, describe, measured
from tools.harmony.policy import POLICIES, open_policy
from tools.harmony.steps import read_steps

HELP = f"""usage: python -m tools.harmony --workdir=RUN --out=DIR [options]

  --workdir=RUN     a training run, in part or whole
  --out=DIR         the measured steps (some MB each), table.txt and harmony.json; the same command goes on after a kill
  --policy=current  where gradients are taken: {", ".join(POLICIES)}
                    current: the trained policy, on images of the run's rollout policy; rollout: the rollout policy, on
                    its own; base: the base model with a new adapter, on its own
  --checkpoint=N    optimiser step of the checkpoint (the newest)
  --steps=48        steps to measure, each with other prompts, noise and timesteps
  --unit=9          samples of the smallest mini-batch in the table by mini-batch size
  --anchors         with the part of the objective that no advantage scales, at every sample
  --rewards=a,b     measured instead of the run's own
  --to_report=true  adds the result to RUN/{results.FILE}, which `marble-jax report` shows
"""
OPTIONS: dict[str, str | None] = {
    "workdir": None,
    "out": None,
    "policy": "current",
    "checkpoint": "",
    "steps": "48",
    "unit": "9",
    "anchors": "false",
    "rewards": "",
    "to_report": "true",
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    if any(word in ("-h", "--help") for word in argv):
        print(HELP, end="")
        return 0
    try:
        _main(argv)
    except InputError as error:
        print(f"harmony: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("harmony: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _main(argv: Sequence[str]) -> None:
    values, config_args = split(argv, OPTIONS)
    refuse_config("harmony: expected no --config, a run has its own", config_args)
    num_steps = whole_number(values, "steps", 4)
    smallest = whole_number(values, "unit", 1)
    checkpoint = None
    if values["checkpoint"]:
        checkpoint = whole_number(values, "checkpoint", 1)
    anchors = boolean("anchors", values["anchors"])
    to_report = boolean("to_report", values["to_report"])
    workdir, folder = Workdir(values["workdir"]), Path(values["out"])
    platform.keep_compilations()
    policy = open_policy(workdir, values["policy"], checkpoint, word_list(values["rewards"]))
    try:
        claim(
            folder,
            describe(policy, str(workdir.path.resolve()), values["policy"], smallest, anchors),
        )
        collect(policy, folder, num_steps, smallest, anchors, _say)
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
    if to_report:
        results.add_to_workdir(workdir, measurement)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
