"""`marble-jax report --workdir=DIR`: (re)writes the report; needs no accelerator and no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from marble_jax.cli.options import refuse_config, split, word_list
from marble_jax.errors import InputError

_RECORDS = ("run.json", "config.json", "metrics.jsonl")
"""One of them is there as soon as a run has begun."""


def help_text() -> str:
    """Returns what `--help` prints."""
    return """usage: marble-jax report --workdir=DIR [--compare=DIR,DIR]

  Writes DIR/report.html from the records of a (finished or running) run.
  --compare: other runs, whose gains and conflict rates are shown beside this one's (kept in DIR/compare)"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or a directory that is no run.
    """
    from marble_jax.report import read_records, write_report
    from marble_jax.storage.workdir import Workdir

    values, config_args = split(argv, {"workdir": None, "compare": ""})
    refuse_config("report: expected --workdir and --compare alone", config_args)
    # A directory that is no run is refused before anything is written to it.
    read_records(values["workdir"])
    workdir = Workdir(values["workdir"])
    if not any((workdir.path / name).exists() for name in _RECORDS):
        raise InputError(
            f"report workdir: expected the directory of a training run, with {' or '.join(_RECORDS)}; received "
            f"{values['workdir']!r} without"
        )
    for compared in word_list(values["compare"]):
        name, summary = _summary(compared)
        workdir.write_json(f"compare/{name}.json", summary)
    print(f"report: {write_report(values['workdir'])}")
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
