"""`marble-jax train --config=FILE[:preset] --workdir=DIR [--config.key=value ...]`."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from marble_jax.cli.options import load_config, split
from marble_jax.cli.processes import HELP, OPTIONS, cluster_of
from marble_jax.config import describe, flatten
from marble_jax.version import VERSION


def help_text() -> str:
    return (
        "usage: marble-jax train --config=FILE[:preset] --workdir=DIR [--config.key=value ...]\n\n"
        "  The same command again resumes.\n\n"
        + HELP
        + "\n\n  Keys, with the defaults of the paper's recipe:\n\n"
        + describe()
    )


def run(argv: Sequence[str]) -> int:
    values, config_args = split(argv, {"workdir": None, **OPTIONS})
    cluster, init_timeout, heartbeat_timeout = cluster_of(values)
    from marble_jax import distributed

    with distributed.process_group(cluster, "train", init_timeout, heartbeat_timeout):
        from marble_jax.programs.train import PACKAGES, train_run
        from marble_jax.training.stops import Interrupted

        config = distributed.run_on_all("configuration", lambda: load_config(config_args))
        if cluster is not None:
            versions = {name: importlib.metadata.version(name) for name in PACKAGES}
            distributed.assert_equal(
                "",
                {f"config.{name}": value for name, value in flatten(config).items()}
                | versions
                | {
                    "--workdir": values["workdir"],
                    "marble_jax": VERSION,
                    "python": ".".join(platform.python_version_tuple()[:2]),
                },
            )
            distributed.start_jax(cluster, init_timeout, heartbeat_timeout)
        try:
            train_run(config, values["workdir"], " ".join(["marble-jax", "train", *argv]))
        except Interrupted as stop:
            if distributed.is_first():
                print(f"marble-jax train: {stop}", file=sys.stderr)
            return 143
    return 0
