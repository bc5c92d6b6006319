"""Messages between two processes of a run: a kind, a length and JSON over TCP."""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from marble_jax.validation import parse_json

VALUE, LOST, BYE = b"V", b"L", b"B"
"""Kinds of messages: a value, somebody is lost, a farewell."""
LARGEST = 1 << 26
"""Bytes of a message at most; a longer one is another program's."""
MOST_LINE = 2000
"""Characters of a line about a loss."""
_HEAD = struct.Struct("!cI")  # kind, bytes of the body
_READ = 1 << 16  # bytes asked for at a time


def send(connection: socket.socket, kind: bytes, value: Any) -> None:
    """Sends anything JSON knows.

    Raises:
      OSError: nobody is there.
    """
    body = json.dumps(value).encode()
    connection.sendall(_HEAD.pack(kind, len(body)) + body)


def receive(
    connection: socket.socket, largest: int = LARGEST, deadline: float | None = None
) -> tuple[bytes, Any] | None:
    """Returns one message; None at the end of the connection or for anything that is no message.

    Args:
      connection: the socket.
      largest: bytes of the message at most.
      deadline: `time.monotonic()` by which the whole message is there, however slowly it comes; None for no end.

    Raises:
      OSError: the connection broke, or the deadline has passed.
    """
    head = _read_exactly(connection, _HEAD.size, deadline)
    if head is None:
        return None
    try:
        size = _size_in(head, largest)
    except ValueError:
        return None
    body = _read_exactly(connection, size, deadline)
    if body is None:
        return None
    try:
        return unpack(head + body, largest)
    except ValueError:
        return None


def unpack(data: bytes, largest: int = LARGEST) -> tuple[bytes, Any] | None:
    """Returns the message that some bytes are; None while they are only the beginning of one.

    Raises:
      ValueError: no message begins like this, or it is larger than `largest` bytes.
    """
    if len(data) < _HEAD.size:
        # Enough to tell a stranger, who may say no more than this.
        if data and data[:1] not in (VALUE, LOST, BYE):
            raise ValueError("no message")
        return None
    size = _size_in(data[: _HEAD.size], largest)
    body = data[_HEAD.size :]
    if len(body) < size:
        return None
    # Scores among the values may be NaN.
    return data[:1], parse_json(body[:size], "message", lenient=True)


def _size_in(head: bytes, largest: int) -> int:
    """Bytes of the body behind a head. Raises ValueError for what is no head."""
    kind, size = _HEAD.unpack(head)
    # Another program at this port may send anything, such as an HTTP request.
    if kind not in (VALUE, LOST, BYE) or size > largest:
        raise ValueError("no message")
    return size


def _read_exactly(
    connection: socket.socket, size: int, deadline: float | None = None
) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            # Of the whole, not of each part: a byte now and then would hold it up for ever.
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(min(size - len(parts), _READ))
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
        self.index = index
        self.name = name
        self.messages: queue.SimpleQueue[tuple[bytes, Any]] = queue.SimpleQueue()
        self._connection = connection
        # The main thread and the reading threads of other peers may send at once.
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"process {self.index} ({self.name})"

    def send(self, kind: bytes, value: Any) -> None:
        """Sends, or lets the reading thread find out that nobody is there."""
        try:
            with self._lock:
                send(self._connection, kind, value)
        except OSError:
            # The reading thread notices as well, and says it to those who wait.
            pass

    def read(self, on_loss: Callable[[Peer, str], None]) -> None:
        """Collects messages until the connection ends.

        Args:
          on_loss: called with the line that says who is lost, unless the connection ends with a farewell.
        """
        while True:
            try:
                message = receive(self._connection)
            except OSError:
                message = None
            if message is None:
                on_loss(self, f"{self} ended, or cannot be reached any more")
                return
            kind, value = message
            if kind == LOST:
                on_loss(self, str(value)[:MOST_LINE])
                continue
            self.messages.put(message)
            if kind == BYE:
                return

    def close(self) -> None:
        """Ends the connection, and with it the reading thread."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other side was faster.
            pass
        self._connection.close()


def listen(port: int) -> socket.socket:
    """Returns a socket on every address of this host, as JAX's service has it; its port may just have been in use."""
    # One socket for both versions of IP, where the system can: names of hosts resolve to either.
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=256, dualstack_ipv6=dual_stack)


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """Has the system find out when the other host is gone without a word.

    Args:
      connection: to the other host.
      seconds: of silence until it counts as gone, about.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Half of the time without a word, then three questions over the other half.
    interval = max(1, int(seconds / 6))
    options = (("TCP_KEEPIDLE", 3 * interval), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", 3))
    for option, value in options:
        # Not every system has all of them.
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
