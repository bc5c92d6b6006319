"""`marble-jax report --workdir=DIR`: (re)writes the report; needs no accelerator and no jax."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from marble_jax.cli.kinds import Place, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError

if TYPE_CHECKING:
    from etils import epath

_RECORDS = ("run.json", "config.json", "metrics.jsonl")
"""One of them is there as soon as a run has begun."""
VERB = Verb(
    about="Writes DIR/report.html from the records of a (finished or running) run.",
    usage=("--workdir=DIR [--compare=DIR,DIR]",),
    options=(
        Option("workdir", "a training run", Place(), "DIR", required=True),
        Option(
            "compare",
            "other runs, whose gains and conflict rates are shown beside this one's (kept in DIR/compare by their "
            "folders' names; NAME=DIR gives another)",
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
    summaries: dict[str, dict[str, Any]] = {}
    for compared in options.compare:
        name, summary = _summary(compared)
        if name in summaries:
            raise InputError(
                f"--compare: expected runs of different names (NAME=DIR names one); received {name!r} of "
                f"{summaries[name]['workdir']} and of {summary['workdir']}"
            )
        summaries[name] = summary
    for name, summary in summaries.items():
        _say_replaced(workdir.path / "compare" / f"{name}.json", summary)
        workdir.write_json(f"compare/{name}.json", summary)
    print(f"report: {write_report(options.workdir)}")
    return 0


def _summary(compared: str) -> tuple[str, dict[str, Any]]:
    """The name of a run that is compared, and its figures.

    Raises:
      InputError: not the workdir of a run.
    """
    from marble_jax.report import read_records, summarise

    name, path = _name_and_path(compared)
    if not (path / "metrics.jsonl").exists():
        raise InputError(f"--compare: expected the workdir of a run; received {compared!r}")
    if not name or "/" in name:
        raise InputError(
            f"--compare: expected a folder with a name, or NAME=DIR; received {compared!r}"
        )
    return name, summarise(read_records(str(path))) | {"workdir": str(path)}


def _name_and_path(compared: str) -> tuple[str, epath.Path]:
    """What a run that is compared is called, and its whole path; a folder may have an equals sign in its own path."""
    from marble_jax.storage.files import is_remote
    from marble_jax.storage.workdir import Workdir

    name, separator, place = compared.partition("=")
    if not separator or Workdir(compared).path.exists():
        name, place = "", compared
    path = Workdir(place).path
    if not is_remote(path):
        # "." and ".." have no name of their own.
        path = path.resolve()
    return name or path.name, path


def _say_replaced(file: epath.Path, summary: Mapping[str, Any]) -> None:
    """Says that figures on file are replaced by those of a run that lies elsewhere."""
    from marble_jax.storage.files import read_json

    earlier = read_json(file).get("workdir") if file.exists() else None
    if earlier not in (None, summary["workdir"]):
        print(f"report: {file.name} was of {earlier}; it is of {summary['workdir']} now")
