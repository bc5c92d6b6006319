"""`marble-jax plan --config=PRESET [--devices=N | --topology=v5e:4x4]`: what a run comes to, without running."""

from __future__ import annotations

import argparse

from marble_jax.cli.kinds import Number, Place, Switch, Whole, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError, one_of

PROGRAMS = {
    "rollout": "rollout",
    "decode": "decode",
    "solving": "train, solving",
    "between": "train, between",
    "micro": "micro-batch",
}
"""Short name of a program -> its name in the plan."""
VERB = Verb(
    about="What a run comes to: batches and groups, what runs where, memory a device by source, FLOPs and seconds of a "
    "step. Reads no weights and needs no accelerator; settings that do not fit are refused with the nearest that do.",
    usage=("--config=PRESET [--config.key=value ...] [options]",),
    options=(
        Option(
            "devices",
            "devices in all, 1 unless given; instead of --topology",
            Whole(0, 65536),
            "N",
        ),
        Option(
            "chip",
            "what they are (for seconds, MFU and memory): v4, v5e, v5p, v6e, v7x, a100, h100, h200, b200, l4, a10g, "
            "l40s, rtx4090, rtx5090",
            shown="NAME",
        ),
        Option(
            "topology",
            "a TPU slice (v5e, v5p or v6e, with its shape in chips) or GPUs (h100:8; a100, h200, b200): compiles "
            "rollout, decoder and training for them with libtpu (pip install libtpu) or JAX's GPU plugin "
            "(marble-jax[cuda]), without such a device, and says what the compiler says: memory a device, FLOPs, "
            "bytes, fused attention, exchanges, and whether it fits. Minutes on a few CPU cores",
            shown="v5e:4x4",
        ),
        Option(
            "programs",
            "compile only some of rollout, decode, solving, between; and micro, one micro-batch of solving without "
            "anchors, which is no program of a run but takes a tenth of the time to compile",
            Words(),
            "A,B",
        ),
        Option(
            "roofline",
            "with --topology, the least time that each program can take on the device; by instruction max(FLOPs / "
            "peak, bytes / bandwidth), by source in the model, and the MFU that it caps",
            Switch(),
        ),
        Option(
            "utilisation",
            "share of the peak that products are taken to run at",
            Number(0),
            default="0.4",
            aliases=("utilization",),
        ),
        Option("json", "write all of it there, too", Place(), "FILE"),
    ),
    config=True,
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or settings that do not fit each other or the devices.
    """
    from marble_jax import platform
    from marble_jax.cli.configuration import load_settings, stated_keys

    # Before anything asks JAX for a device: a plan must not claim one.
    platform.compile_elsewhere()
    settings = load_settings(options.config)
    _check_utilisation(options.utilisation)
    # Names in the plan hold a comma, which separates the option's words.
    programs = []
    for name in options.programs:
        one_of("--programs", name, PROGRAMS)
        programs.append(PROGRAMS[name])
    if options.roofline and not options.topology:
        raise InputError(
            "--roofline: expected --topology=NAME beside it, whose compiler makes the program; received none"
        )
    from marble_jax.console import Console
    from marble_jax.plan.planner import plan
    from marble_jax.plan.request import Request

    request = Request(
        devices=options.devices or 0,
        topology=options.topology,
        chip=options.chip,
        utilisation=options.utilisation,
        file=options.json,
        programs=tuple(programs),
        roofline=options.roofline,
    )
    plan(settings, request, Console(), stated_keys(options.config))
    return 0


def _check_utilisation(utilisation: float) -> None:
    """Checks the share of the peak that products are taken to run at.

    Raises:
      InputError: not in (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise InputError(f"--utilisation: expected a share in (0, 1]; received {utilisation:g}")
