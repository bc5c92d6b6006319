"""`marble-jax report --workdir=DIR`: (re)writes the report; needs no accelerator and no jax."""
from __future__ import annotations

from collections.abc import Sequence

from marble_jax.cli.options import split
from marble_jax.errors import InputError


def help_text() -> str:
    return "usage: marble-jax report --workdir=DIR\n\n  Writes DIR/report.html from the records of a (finished or running) run."


def run(argv: Sequence[str]) -> int:
    from marble_jax.report import write_report

    values, rest = split(argv, {"workdir": None})
    if rest:
        raise InputError(f"report: expected --workdir alone; received {rest[0]}")
    print(f"report: {write_report(values['workdir'])}")
    return 0
