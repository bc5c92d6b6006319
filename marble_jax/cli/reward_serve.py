"""`marble-jax reward serve`: scores other machines' images until a signal comes."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Sequence

from marble_jax import platform
from marble_jax.cli.reward_choice import UPSTREAM_RULES, chosen_rewards, load_chosen
from marble_jax.cli.signals import stop_signals
from marble_jax.config import Settings
from marble_jax.console import Console
from marble_jax.errors import InputError, one_line
from marble_jax.rewards.base import Reward
from marble_jax.rewards.http.access import is_loopback, read_token
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.rewards.http.images import Limits
from marble_jax.rewards.http.server import RewardServer

BROKEN_STATUS = 75
"""Exit status of a server whose calls hang: start it again. Source: EX_TEMPFAIL of sysexits.h."""


def run(options: argparse.Namespace, settings: Settings | None) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the exit status.

    Raises:
      InputError: options that are wrong, a reward that does not load, or an address that cannot be listened at.
    """
    # Loading rewards takes long: what is wrong with the token is said first.
    token = _token(options)
    platform.keep_compilations()
    choice = chosen_rewards(options, settings)
    rewards = load_chosen(choice)
    for reward in rewards:
        # One that another server computes may need whole groups, which clients of this one ask about.
        reward.inquire()
    how = ServerOptions(
        token=token,
        workers=options.workers,
        waiting=options.waiting,
        connections=options.connections,
        queue_seconds=options.queue_timeout,
        score_seconds=options.timeout,
        batch=options.batch,
        limits=Limits(
            body=10**6 * options.max_mb, images=options.max_images, side=options.max_side
        ),
        tls=_tls(options.tls_cert, options.tls_key),
    )
    access = "with" if token else "without"
    names = ", ".join([reward.name for reward in rewards])
    console = Console()
    with stop_signals() as stop, RewardServer(rewards, options.host, options.port, how) as server:
        console.say(f"serving {names} at {server.url} ({access} a token); Ctrl-C stops")
        for line in _passed_over(rewards):
            console.say(line)
        if choice.upstream_scoring:
            console.say(UPSTREAM_RULES)
        if token and how.tls is None and not is_loopback(options.host):
            console.say(
                "the token comes unencrypted: --tls_cert and --tls_key, or a tunnel, hide it"
            )
        while not stop.wait(0.5):
            if server.broken.is_set():
                # The threads that hang cannot be ended, but a launcher starts another process.
                console.say(
                    "reward serve: expected calls to return; received too many that hang: ended"
                )
                return BROKEN_STATUS
    return 0


def _passed_over(rewards: Sequence[Reward]) -> list[str]:
    """Returns a line for every reward whose entry says what only a client can go by."""
    lines = []
    for reward in rewards:
        if reward.sources:
            lines.append(
                f"reward {reward.name}: sources ({', '.join(reward.sources)}) have no effect here, where prompts come "
                "without a source: they belong in the client's entry"
            )
    return lines


def _tls(certificate: str, key: str) -> ssl.SSLContext | None:
    """What TLS needs; None without a certificate.

    Raises:
      InputError: one without the other, or files that do not hold them.
    """
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise InputError("serve: expected --tls_cert and --tls_key; received one of them")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a pass phrase would be asked for on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tls_cert, --tls_key: expected a certificate with its key in PEM; received {one_line(error)}"
        ) from None
    return context


def _token(options: argparse.Namespace) -> str:
    """The token that clients have to know; empty for none.

    Raises:
      InputError: a token given twice, or a file without one.
    """
    if options.token and options.token_file:
        raise InputError("serve: expected --token or --token_file; received both")
    return options.token or read_token("server", "", options.token_file)
