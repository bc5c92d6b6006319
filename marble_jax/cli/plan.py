"""`marble-jax plan --config=FILE[:preset] [--devices=N | --topology=v5e:4x4]`: what a run comes to, without running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from marble_jax import platform
from marble_jax.cli.options import number, split, whole_number, word_list
from marble_jax.errors import InputError, one_of

OPTIONS = {
    "devices": "0",
    "topology": "",
    "chip": "",
    "utilisation": "0.4",
    "json": "",
    "programs": "",
}
PROGRAMS = {
    "rollout": "rollout",
    "decode": "decode",
    "solving": "train, solving",
    "between": "train, between",
}
"""Short name of a program -> its name in the plan."""


def help_text() -> str:
    """Returns what `--help` prints."""
    return """usage: marble-jax plan --config=FILE[:preset] [--config.key=value ...] [options]

  Batches and groups, what runs where, memory a device by source, FLOPs and seconds of a step. Reads no weights and
  needs no accelerator; settings that do not fit are refused with the nearest that do.

  --devices=N          devices in all, with neither weights nor topology; 1 unless given
  --chip=NAME          what they are: v4, v5e, v5p, v6e, a100, h100, h200 (for seconds, MFU and HBM)
  --topology=v5e:4x4   a TPU slice (v5e, v5p or v6e, with its shape in chips): compiles rollout, decoder and training
                       for it with libtpu (pip install libtpu) and says what the compiler says: HBM a chip, FLOPs,
                       bytes, collectives, and whether it fits. Minutes on a few CPU cores
  --programs=A,B       compile only some of rollout, decode, solving, between
  --utilisation=0.4    share of the peak that products are taken to run at
  --json=FILE          write all of it there, too"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or settings that do not fit each other or the devices.
    """
    from marble_jax.cli.configuration import load_settings

    # Before anything asks JAX for a device: a plan must not claim one.
    platform.compile_elsewhere()
    values, config_args = split(argv, OPTIONS)
    settings = load_settings(config_args)
    utilisation = _utilisation(values)
    # Names in the plan hold a comma, which separates the option's words.
    programs = []
    for name in word_list(values["programs"]):
        one_of("--programs", name, PROGRAMS)
        programs.append(PROGRAMS[name])
    num_devices = whole_number(values, "devices", 0, 65536)
    from marble_jax.console import Console
    from marble_jax.plan.planner import plan
    from marble_jax.plan.request import Request

    request = Request(
        devices=num_devices,
        topology=values["topology"],
        chip=values["chip"],
        utilisation=utilisation,
        file=values["json"],
        programs=tuple(programs),
    )
    plan(settings, request, Console())
    return 0


def _utilisation(values: Mapping[str, str]) -> float:
    """The share of the peak that products are taken to run at.

    Raises:
      InputError: not a number in (0, 1].
    """
    utilisation = number(values, "utilisation", 0)
    if not 0 < utilisation <= 1:
        raise InputError(
            f"--utilisation: expected a share in (0, 1]; received {values['utilisation']!r}"
        )
    return utilisation
