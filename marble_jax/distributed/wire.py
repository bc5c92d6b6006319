"""Messages between two processes of a run: a kind, a length and JSON over TCP."""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

VALUE, LOST, BYE = b"V", b"L", b"B"
"""Kinds of messages: a value, somebody is lost, a farewell."""
_LARGEST = 1 << 26


def send(connection: socket.socket, kind: bytes, value: Any) -> None:
    """Sends anything JSON knows. Raises OSError when nobody is there."""
    body = json.dumps(value).encode()
    connection.sendall(struct.pack("!cI", kind, len(body)) + body)


def receive(connection: socket.socket) -> tuple[bytes, Any] | None:
    """One message; None at the end of the connection or of something else than a message."""
    head = _exactly(connection, 5)
    if head is None:
        return None
    kind, size = struct.unpack("!cI", head)
    if kind not in (VALUE, LOST, BYE) or size > _LARGEST:
        return None
    body = _exactly(connection, size)
    try:
        return None if body is None else (kind, json.loads(body))
    except ValueError:
        return None


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 16))
        if not part:
            return None
        parts += part
    return bytes(parts)


class Peer:
    """The connection to one other process, read by a thread of its own.

    Attributes:
      index: of that process.
      name: of its host.
      messages: (kind, value) that came and nobody has taken yet.
    """

    def __init__(self, index: int, name: str, connection: socket.socket):
        self.index, self.name, self._connection = index, name, connection
        self.messages: queue.SimpleQueue[tuple[bytes, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"process {self.index} ({self.name})"

    def send(self, kind: bytes, value: Any) -> None:
        """Sends, or lets the reading thread find out that nobody is there."""
        try:
            with self._lock:
                send(self._connection, kind, value)
        except OSError:
            pass

    def read(self, lost: Callable[[Peer, str], None]) -> None:
        """Collects messages until the connection ends; `lost` is called unless it ends with a farewell."""
        while True:
            try:
                message = receive(self._connection)
            except OSError:
                message = None
            if message is None:
                lost(self, f"{self} ended, or cannot be reached any more")
                return
            if message[0] == LOST:
                lost(self, message[1])
                continue
            self.messages.put(message)
            if message[0] == BYE:
                return

    def close(self) -> None:
        """Ends the connection, and with it the reading thread."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._connection.close()


def listen(port: int) -> socket.socket:
    """On every address of this host, as JAX's service does; the port may have been used a moment ago."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    return socket.create_server(
        ("", port), family=family, backlog=256, dualstack_ipv6=family == socket.AF_INET6
    )


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """Has the system find out when the other host is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    step = max(1, int(seconds / 6))
    for option, value in (("TCP_KEEPIDLE", 3 * step), ("TCP_KEEPINTVL", step), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
