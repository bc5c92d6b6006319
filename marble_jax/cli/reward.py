"""`marble-jax reward check` scores golden images with every reward; `marble-jax reward serve` puts rewards online."""

from __future__ import annotations

import argparse

from marble_jax.cli.kinds import Number, Place, Switch, Whole, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError

_CHOICE = (
    Option(
        "rewards_path",
        "directory with rewards.json, 'embedded' or 'embedded_video'",
        Place(),
        "DIR",
        aliases=("path",),
    ),
    Option(
        "rewards",
        "rewards of it, or functions as module:function; all of them by default",
        Words(),
        "A,B",
    ),
    Option(
        "frames",
        "frames of clips that rewards of images see: all, first, every:K or count:M (the run's own with --config)",
        shown="CHOICE",
        rare=True,
    ),
    Option(
        "frame_reduction",
        "mean or min, which makes one score of those of the frames (the run's own with --config)",
        shown="NAME",
        rare=True,
    ),
)
"""Which rewards, the same for both."""
_CHECK = Verb(
    about="Loads each reward, scores images whose scores (or whose order) are known, and measures speed; status 2 if "
    "one is broken.",
    usage=("(--config=PRESET | --rewards_path=DIR) [--rewards=A,B] [options]",),
    options=(
        *_CHOICE,
        Option(
            "size",
            "pixels of the golden images (the run's own with --config; 64 for 'embedded', 48 for 'embedded_video', "
            "else 512)",
            Whole(16, 8192),
            "N",
        ),
        Option(
            "num_frames",
            "frames of golden clips, for rewards that take clips (the run's own with --config, else 5)",
            Whole(1),
            "N",
        ),
        Option(
            "batch",
            "images, or clips, at once when the speed is measured",
            Whole(1, 65536),
            default="16",
            aliases=("batch_size",),
        ),
        Option("timeout", "seconds a call may take", Number(0.1, 1e6), default="120"),
        Option(
            "write",
            "record the scores as the expected ones, in golden.json beside rewards.json",
            Switch(),
        ),
    ),
    config=True,
)
_LIMITS = "limits"
_SERVE = Verb(
    about="Scores other machines' images until a signal comes: answers POST /score and GET /health; the format is "
    "described in marble_jax/rewards/http/protocol.py.",
    usage=("(--config=PRESET | --rewards_path=DIR) [--rewards=A,B] [--host=127.0.0.1] [options]",),
    options=(
        *_CHOICE,
        # Port 0 lets the system choose a free one.
        Option(
            "host",
            "any other than a loopback address needs a token",
            default="127.0.0.1",
        ),
        Option(
            "port",
            "port; 0 for a free one",
            Whole(0, 65535),
            default="8810",
        ),
        Option(
            "token_file",
            "what clients have to know",
            Place(),
            "FILE",
        ),
        Option(
            "token",
            "the same as text, which other users of this machine can see",
            rare=True,
        ),
        Option(
            "workers",
            "requests scored at the same time",
            Whole(1, 1024),
            default="2",
        ),
        Option(
            "batch",
            "images scored at once; 0 takes a request as it is",
            Whole(0),
            default="0",
        ),
        Option(
            "timeout",
            "seconds a request's scores may take",
            Number(0.1, 1e6),
            default="300",
        ),
        Option(
            "tls_cert",
            "speak TLS with this certificate; clients name one of their own authority by ca_file",
            Place(),
            "FILE",
        ),
        Option(
            "tls_key",
            "its key",
            Place(),
            "FILE",
        ),
        Option(
            "waiting",
            "whole requests that wait for a worker besides",
            Whole(0),
            default="256",
            group=_LIMITS,
            rare=True,
        ),
        Option(
            "queue_timeout",
            "seconds that they wait",
            Number(0.1, 1e6),
            default="40",
            group=_LIMITS,
            rare=True,
        ),
        Option(
            "connections",
            "of clients that know the token",
            Whole(1),
            default="1024",
            group=_LIMITS,
            rare=True,
        ),
        Option(
            "max_mb",
            "megabytes of a request",
            Whole(1, 4000),
            default="64",
            group=_LIMITS,
            rare=True,
        ),
        Option(
            "max_images",
            "images of a request, every frame counted",
            Whole(1),
            default="256",
            group=_LIMITS,
            rare=True,
        ),
        Option(
            "max_side",
            "pixels of an image's side",
            Whole(1, 32768),
            default="2048",
            group=_LIMITS,
            rare=True,
        ),
    ),
    config=True,
)
ACTIONS = {"check": _CHECK, "serve": _SERVE}


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, rewards that do not load, or, of a check, rewards that do not pass.
    """
    if bool(options.config) == bool(options.rewards_path):
        received = "both" if options.config else "neither"
        raise InputError(f"reward: expected either --config or --rewards_path; received {received}")
    from marble_jax.cli import reward_check, reward_serve
    from marble_jax.cli.configuration import load_settings

    settings = load_settings(options.config) if options.config else None
    if options.action == "check":
        return reward_check.run(options, settings)
    return reward_serve.run(options, settings)
