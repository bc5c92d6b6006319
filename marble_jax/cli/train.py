"""`marble-jax train --config=PRESET --workdir=DIR [--config.key=value ...]`."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import TYPE_CHECKING, Any

from marble_jax.cli.kinds import Place, Switch
from marble_jax.cli.options import Option, Verb
from marble_jax.cli.processes import GROUP, NOTE, OPTIONS, cluster_of
from marble_jax.version import VERSION

if TYPE_CHECKING:
    from marble_jax.config import Settings

VERB = Verb(
    about="Trains an adapter on several rewards. The same command again resumes.",
    usage=("--config=PRESET --workdir=DIR [--config.key=value ...]",),
    options=(
        Option(
            "workdir",
            "records, checkpoints, exports and report.html go there; a directory or a bucket",
            Place(),
            "DIR",
            required=True,
        ),
        Option("verbose", "all figures in every step's line, however long it gets", Switch()),
        *OPTIONS,
    ),
    config=True,
    groups={GROUP: NOTE},
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or settings that a run cannot begin with.
    """
    from marble_jax.cli.configuration import load_settings, stated_keys

    cluster = cluster_of(options)
    init_timeout, heartbeat_timeout = options.init_timeout, options.heartbeat_timeout
    from marble_jax import distributed

    secret = None
    if cluster is not None:
        from marble_jax.distributed.secret import secret_of

        secret = secret_of(options.workdir)
    with distributed.process_group(cluster, "train", init_timeout, heartbeat_timeout, secret):
        # JAX is imported inside of the group, so that whatever is wrong with one process ends all of them.
        from marble_jax.distributed.waiting import is_left_behind
        from marble_jax.process_end import end_process
        from marble_jax.programs.train import train_run
        from marble_jax.training.stops import TERMINATED, Interrupted, held_to_deadline

        settings = distributed.run_on_all("configuration", lambda: load_settings(options.config))
        if cluster is not None:
            distributed.assert_equal("", _shared_values(settings, options.workdir))
            distributed.start_jax(cluster, init_timeout, heartbeat_timeout)
        try:
            with held_to_deadline():
                stated = stated_keys(options.config)
                train_run(settings, options.workdir, options.command, options.verbose, stated)
        except Interrupted as stop:
            # Every process stops; one line is enough.
            if distributed.is_first():
                print(f"marble-jax train: {stop}", file=sys.stderr)
            if distributed.is_single_process() and is_left_behind():
                # A compiler that is torn down at work may crash, and the exit status with it.
                end_process(TERMINATED)
            return TERMINATED
    return 0


def _shared_values(settings: Settings, workdir: str) -> dict[str, Any]:
    """What has to be the same on every host of a run, by the name that a message gives it."""
    from marble_jax.config import flatten
    from marble_jax.programs.run_record import package_versions

    shared: dict[str, Any] = {f"config.{name}": value for name, value in flatten(settings).items()}
    shared |= package_versions()
    shared["--workdir"] = workdir
    shared["marble_jax"] = VERSION
    # A patch release of Python computes nothing otherwise.
    major, minor, _ = platform.python_version_tuple()
    shared["python"] = f"{major}.{minor}"
    return shared
