"""`marble-jax reward serve`: scores other machines' images until a signal comes."""

from __future__ import annotations

import contextlib
import signal
import ssl
import threading
from collections.abc import Iterator, Mapping

from marble_jax import platform
from marble_jax.cli.options import number, whole_number
from marble_jax.cli.reward_choice import chosen_rewards, load_chosen
from marble_jax.config import Settings
from marble_jax.console import Console
from marble_jax.errors import InputError, one_line
from marble_jax.rewards.http.access import is_loopback, read_token
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.rewards.http.images import Limits
from marble_jax.rewards.http.server import RewardServer

BROKEN_STATUS = 75
"""Exit status of a server whose calls hang: start it again. Source: EX_TEMPFAIL of sysexits.h."""
OPTIONS = {
    "path": "",
    "rewards": "",
    "frames": "",
    "frame_reduction": "",
    "host": "127.0.0.1",
    "port": "8810",
    "token": "",
    "token_file": "",
    "workers": "2",
    "waiting": "256",
    "connections": "1024",
    "batch": "0",
    "queue_timeout": "40",
    "tls_cert": "",
    "tls_key": "",
    "timeout": "300",
    "max_mb": "64",
    "max_images": "256",
    "max_side": "2048",
}


def run(values: Mapping[str, str], settings: Settings | None) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the exit status.

    Raises:
      InputError: options that are wrong, a reward that does not load, or an address that cannot be listened at.
    """
    # Port 0 lets the system choose a free one.
    port = whole_number(values, "port", 0, 65535)
    workers = whole_number(values, "workers", 1, 1024)
    # Loading rewards takes long: options that are wrong are refused first.
    limits = Limits(
        body=10**6 * whole_number(values, "max_mb", 1, 4000),
        images=whole_number(values, "max_images", 1),
        side=whole_number(values, "max_side", 1, 32768),
    )
    timeout = number(values, "timeout", 0.1, 1e6)
    token = _token(values)
    platform.keep_compilations()
    rewards = load_chosen(chosen_rewards(values, settings))
    options = ServerOptions(
        token=token,
        workers=workers,
        waiting=whole_number(values, "waiting", 0),
        connections=whole_number(values, "connections", 1),
        queue_seconds=number(values, "queue_timeout", 0.1, 1e6),
        score_seconds=timeout,
        batch=whole_number(values, "batch", 0),
        limits=limits,
        tls=_tls(values["tls_cert"], values["tls_key"]),
    )
    access = "with" if token else "without"
    names = ", ".join([reward.name for reward in rewards])
    console = Console()
    with _stop_signals() as stop, RewardServer(rewards, values["host"], port, options) as server:
        console.say(f"serving {names} at {server.url} ({access} a token); Ctrl-C stops")
        if token and options.tls is None and not is_loopback(values["host"]):
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


def _token(values: Mapping[str, str]) -> str:
    """The token that clients have to know; empty for none.

    Raises:
      InputError: a token given twice, or a file without one.
    """
    if values["token"] and values["token_file"]:
        raise InputError("serve: expected --token or --token_file; received both")
    return values["token"] or read_token("server", "", values["token_file"])


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set while the context lasts; their handlers come back after it."""
    # The handler only sets an event: a server that is closed inside of one could wait for itself.
    stop = threading.Event()
    handlers = {}
    for which in (signal.SIGTERM, signal.SIGINT):
        handlers[which] = signal.signal(which, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
