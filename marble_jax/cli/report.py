"""`marble-jax report --workdir=DIR`: (re)writes the report; needs no accelerator and no jax."""

from __future__ import annotations

from collections.abc import Sequence

from marble_jax.cli.options import split
from marble_jax.errors import InputError


def help_text() -> str:
    return """usage: marble-jax report --workdir=DIR [--compare=DIR,DIR]

  Writes DIR/report.html from the records of a (finished or running) run.
  --compare: other runs, whose gains and conflict rates are shown beside this one's (kept in DIR/compare)"""


def run(argv: Sequence[str]) -> int:
    from marble_jax.report import read_records, summarise, write_report
    from marble_jax.storage.workdir import Workdir

    values, rest = split(argv, {"workdir": None, "compare": ""})
    if rest:
        raise InputError(f"report: expected --workdir and --compare alone; received {rest[0]}")
    read_records(
        values["workdir"]
    )  # a directory that is no run is refused before anything is written to it
    workdir = Workdir(values["workdir"])
    for other in filter(None, values["compare"].split(",")):
        path = Workdir(other).path
        if not (path / "metrics.jsonl").exists():
            raise InputError(f"--compare: expected the workdir of a run; received {other!r}")
        workdir.write_json(f"compare/{path.name}.json", summarise(read_records(other)))
    print(f"report: {write_report(values['workdir'])}")
    return 0
