"""Where connections to process 0 wait until they have said who they are: strangers neither hold it up nor fill it.

All of them are read at once, each for a few seconds and a few bytes at most. So a port scan, a browser or somebody who
sends a byte a second costs the processes of the run nothing.
"""

from __future__ import annotations

import dataclasses
import selectors
import socket
import time
from typing import Any

from marble_jax.distributed.secret import challenge, is_proof
from marble_jax.distributed.wire import VALUE, send, unpack

MAGIC = "marble_jax channel 2"
HELLO_TIMEOUT = 5.0
"""Seconds for a new connection to say which process it is."""
MOST_WAITING = 1024
"""Connections that wait at the same time; the one that has waited longest makes room for another."""
MOST_BYTES = 4096
"""Of what a connection says about itself."""
_FIELDS = (("process", int), ("of", int), ("name", str), ("nonce", str))


@dataclasses.dataclass
class _Guest:
    """A connection that has not said yet who it is.

    Attributes:
      connection: the socket, which never blocks.
      challenge: what it has to prove the secret with.
      deadline: `time.monotonic()` until which it may wait.
      said: bytes so far.
    """

    connection: socket.socket
    challenge: str
    deadline: float
    said: bytearray


class WaitingRoom:
    """Connections of a listening socket, up to what they say about themselves.

    Args:
      listener: the socket.
      secret: of the run.

    Attributes:
      num_refused: connections that spoke as processes of a run and did not have its secret.
    """

    def __init__(self, listener: socket.socket, secret: str):
        self._listener = listener
        self._secret = secret
        self.num_refused = 0
        self._guests: dict[socket.socket, _Guest] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, seconds: float) -> list[tuple[dict[str, Any], socket.socket]]:
        """Waits until something happens, `seconds` at most.

        Returns:
          (hello, connection) of those that have said who they are and have the secret; their sockets block again.
        """
        now = time.monotonic()
        until = min([now + seconds, *(guest.deadline for guest in self._guests.values())])
        arrived = []
        for key, _ in self._selector.select(max(0.0, until - now)):
            if key.fileobj is self._listener:
                self._accept()
                continue
            guest = self._guests.get(key.fileobj)  # type: ignore[call-overload]
            hello = None if guest is None else self._listen_to(guest)
            if guest is not None and hello is not None:
                arrived.append((hello, guest.connection))
        self._send_away_the_late()
        return arrived

    def close(self) -> None:
        """Sends everybody away who still waits."""
        for guest in list(self._guests.values()):
            self._send_away(guest)
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
            connection.settimeout(HELLO_TIMEOUT)
            guest = _Guest(connection, challenge(), time.monotonic() + HELLO_TIMEOUT, bytearray())
            # A few bytes into the empty buffer of a new connection: this does not wait.
            send(connection, VALUE, {"magic": MAGIC, "challenge": guest.challenge})
            connection.setblocking(False)
        except OSError:
            # Gone again.
            return
        if len(self._guests) >= MOST_WAITING:
            self._send_away(next(iter(self._guests.values())))
        self._guests[connection] = guest
        self._selector.register(connection, selectors.EVENT_READ)

    def _listen_to(self, guest: _Guest) -> dict[str, Any] | None:
        """Reads on; returns what a process says of itself once it is complete, and sends strangers away."""
        try:
            part = guest.connection.recv(MOST_BYTES)
            guest.said += part
            message = unpack(bytes(guest.said), MOST_BYTES)
        except BlockingIOError:
            return None
        except (OSError, ValueError):
            self._send_away(guest)
            return None
        if message is None:
            # Without a byte more the connection has ended.
            if not part:
                self._send_away(guest)
            return None
        hello = message[1]
        if not _is_hello(hello):
            self._send_away(guest)
            return None
        parts = (guest.challenge, hello["process"], hello["of"], hello["name"], hello["nonce"])
        if not is_proof(hello.get("proof"), self._secret, *parts):
            self.num_refused += 1
            self._send_away(guest)
            return None
        self._leave(guest)
        guest.connection.setblocking(True)
        return hello

    def _send_away_the_late(self) -> None:
        now = time.monotonic()
        for guest in list(self._guests.values()):
            if guest.deadline <= now:
                self._send_away(guest)

    def _leave(self, guest: _Guest) -> None:
        self._selector.unregister(guest.connection)
        del self._guests[guest.connection]

    def _send_away(self, guest: _Guest) -> None:
        self._leave(guest)
        guest.connection.close()


def _is_hello(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("magic") != MAGIC:
        return False
    # By type: true is a process number to Python.
    return all(type(value.get(key)) is kind for key, kind in _FIELDS)
