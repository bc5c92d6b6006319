"""`marble-jax train --config=FILE[:preset] --workdir=DIR [--config.key=value ...]`."""
from __future__ import annotations

import sys
from collections.abc import Sequence

from marble_jax.cli.options import load_config, split
from marble_jax.config import describe


def help_text() -> str:
    return ("usage: marble-jax train --config=FILE[:preset] --workdir=DIR [--config.key=value ...]\n\n"
            "  The same command again resumes. Keys, with the defaults of the paper's recipe:\n\n" + describe())


def run(argv: Sequence[str]) -> int:
    values, config_args = split(argv, {"workdir": None})
    config = load_config(config_args)
    from marble_jax.run import train_run
    from marble_jax.training.loop import Interrupted

    try:
        train_run(config, values["workdir"], " ".join(["marble-jax", "train", *argv]))
    except Interrupted as stop:
        print(f"marble-jax train: {stop}", file=sys.stderr)
        return 143
    return 0
