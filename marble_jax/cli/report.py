"""`marble-jax report --workdir=DIR`: (re)writes the report; needs no accelerator and no jax."""

from __future__ import annotations

import argparse
from typing import Any

from marble_jax.cli.kinds import Place, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError

_RECORDS = ("run.json", "config.json", "metrics.jsonl")
"""One of them is there as soon as a run has begun."""
VERB = Verb(
    about="Writes DIR/report.html from the records of a (finished or running) run.",
    usage=("--workdir=DIR [--compare=DIR,DIR]",),
    options=(
        Option("workdir", "a training run", Place(), "DIR", required=True),
        Option(
            "compare",
            "other runs, whose gains and conflict rates are shown beside this one's (kept in DIR/compare)",
            Words(),
            "DIR,DIR",
        ),
    ),
    no_config="a run brings its own",
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or a directory that is no run.
    """
    from marble_jax.report import read_records, write_report
    from marble_jax.storage.workdir import Workdir

    # A directory that is no run is refused before anything is written to it.
    read_records(options.workdir)
    workdir = Workdir(options.workdir)
    if not any((workdir.path / name).exists() for name in _RECORDS):
        raise InputError(
            f"report workdir: expected the directory of a training run, with {' or '.join(_RECORDS)}; received "
            f"{options.workdir!r} without"
        )
    for compared in options.compare:
        name, summary = _summary(compared)
        workdir.write_json(f"compare/{name}.json", summary)
    print(f"report: {write_report(options.workdir)}")
    return 0


def _summary(compared: str) -> tuple[str, dict[str, Any]]:
    """The name of a run that is compared, and its figures.

    Raises:
      InputError: not the workdir of a run.
    """
    from marble_jax.report import read_records, summarise
    from marble_jax.storage.workdir import Workdir

    path = Workdir(compared).path
    if not (path / "metrics.jsonl").exists():
        raise InputError(f"--compare: expected the workdir of a run; received {compared!r}")
    return path.name, summarise(read_records(compared))
