"""One request over a connection to a reward server, with bounds on everything that its client can cost.

Bounded are the bytes of the request and the seconds for it to arrive. Whatever goes wrong is answered with a status and
one line of JSON.
"""

from __future__ import annotations

import hmac
import http.server
import io
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

from marble_jax.errors import one_line
from marble_jax.rewards.http import protocol
from marble_jax.rewards.http.connections import ConnectionServer
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.version import VERSION

log = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
"""Seconds for which a refused client may go on to send, so that it gets to read why; its bytes are dropped."""
ANSWER_SECONDS = 10.0
"""Seconds that a client may take to receive an answer."""
_CHUNK = 1 << 18
"""Bytes read at a time: they are counted as they arrive."""


class _SlowClient(Exception):
    """The request did not arrive in time."""


class _Arrival(io.RawIOBase):
    """A connection's incoming bytes, all of which have to be there by `deadline` (on the monotonic clock)."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection = connection
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A socket's own time-out begins anew with every byte; a client could drip for ever.
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise _SlowClient
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        except TimeoutError:
            raise _SlowClient from None


def _is_length(text: str) -> bool:
    """Whether a text is a number of bytes; stricter than `int`, which takes signs, underscores and other digits."""
    return text.isascii() and text.isdigit() and len(text) < 16


class ConnectionHandler(http.server.BaseHTTPRequestHandler):
    """One connection with one request.

    Attributes:
      body_path: path that bodies may be sent to.
      body_type: media type of the bodies.
    """

    server: ConnectionServer
    body_path = "/score"
    body_type = protocol.CONTENT_TYPE
    # HTTP/1.1, so that clients that ask before they send a body get an answer.
    protocol_version = "HTTP/1.1"
    server_version = f"marble-jax/{VERSION}"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        options = self.server.options
        # The head first; the body has a time of its own once the client is known.
        self._seconds = min(options.header_seconds, options.read_seconds)
        self._arrival = _Arrival(self.connection, time.monotonic() + self._seconds)
        self.rfile = io.BufferedReader(self._arrival)
        self._answered = False
        # The base class sets these from the request line and reads them for an answer, which may
        # come before.
        self.requestline = ""
        self.request_version = self.protocol_version
        self.command = ""

    def handle(self) -> None:
        try:
            self.handle_one_request()
        except _SlowClient:
            self.refuse(
                408, f"request: expected within {self._seconds:g} s; received only part of it"
            )
        # The client went away.
        except ConnectionError:
            pass
        # A fault of ours costs one answer, not the server.
        except Exception as error:
            log.exception("reward server: %s", one_line(error))
            self.refuse(500, "server: an error of its own; its log has more")

    def finish(self) -> None:
        self._linger()
        super().finish()

    def do_GET(self) -> None:
        """Answers `/health`."""
        if self.path != "/health":
            self.refuse(404, f"path: expected /health; received {self.path[:80]!r}")
            return
        health: dict[str, Any] = {"status": "ok"}
        # What is served, and how busy it is, is not for everyone.
        if self.authorised():
            health = self.server.health()
        self.answer(200, json.dumps(health).encode())

    def do_POST(self) -> None:
        """Answers `/score`."""
        try:
            length = self.body_length()
            with self.server.known(self.request), self.server.held() as hold:
                # A place is for whole bodies: a slow client keeps nobody from it.
                body = self.read_body(length, hold)
                with self.server.admitted():
                    scores = self.server.score(body, self._is_gone)
        except ProtocolError as error:
            self.refuse(error.status, str(error))
        else:
            self.answer(200, scores)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers, in our form, what the base class finds wrong with a request."""
        text = f"request: {message or http.HTTPStatus(code).phrase}"
        # The base class says "not implemented" of methods that we do not allow.
        if code == 501:
            code = 405
        self.refuse(code, text[:200])

    def log_message(self, format: str, *args: Any) -> None:
        """Logs requests for debugging alone."""
        log.debug("%s %s", self.address_string(), format % args)

    def handle_expect_100(self) -> bool:
        """Says whether the body is wanted before it is sent."""
        try:
            self.body_length()
        except ProtocolError as error:
            self.refuse(error.status, str(error))
            return False
        return super().handle_expect_100()

    def authorised(self) -> bool:
        """Returns whether the client has shown the token, if there is one."""
        token = self.server.options.token
        if not token:
            return True
        sent = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        expected = f"Bearer {token}".encode()
        # Takes as long for every wrong token, so that the time does not tell how much of it is
        # right.
        return hmac.compare_digest(sent, expected)

    def body_length(self) -> int:
        """The length of a body that will be read, after everything that can be wrong without reading it.

        Raises:
          ProtocolError: something is.
        """
        self._check_access()
        kind = self.headers.get_content_type()
        if kind != self.body_type:
            raise ProtocolError(
                415, f"Content-Type: expected {self.body_type}; received {kind[:80]}"
            )
        length = self.headers.get("Content-Length")
        # Chunks come without a length, so what they add up to is known too late.
        if length is None or self.headers.get("Transfer-Encoding"):
            raise ProtocolError(411, "body: expected a Content-Length; received none")
        if not _is_length(length):
            raise ProtocolError(
                400, f"Content-Length: expected a number of bytes; received {length[:40]!r}"
            )
        limit = self.server.options.limits.body
        if int(length) > limit:
            raise ProtocolError(413, f"body: expected at most {limit} bytes; received {length}")
        return int(length)

    def _check_access(self) -> None:
        if self.path != self.body_path:
            raise ProtocolError(
                404, f"path: expected {self.body_path}; received {self.path[:80]!r}"
            )
        if not self.authorised():
            raise ProtocolError(401, "token: expected the server's; received another or none")

    def read_body(self, length: int, hold: Callable[[int], None]) -> bytes:
        """Returns a body of `length` bytes, which `hold` counts as they arrive.

        Raises:
          ProtocolError: it ends early, or there is no room.
        """
        self._seconds = self.server.options.read_seconds
        self._arrival.deadline = time.monotonic() + self._seconds
        body = bytearray()
        while len(body) < length:
            chunk = self.rfile.read(min(_CHUNK, length - len(body)))
            if not chunk:
                raise ProtocolError(400, f"body: expected {length} bytes; received {len(body)}")
            hold(len(chunk))
            body += chunk
        return bytes(body)

    def _is_gone(self) -> bool:
        """Whether the client has hung up; with TLS that shows only when the answer is sent."""
        if isinstance(self.connection, ssl.SSLSocket):
            return False
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            # Nothing to read, and nobody gone.
            return False
        except OSError:
            return True

    def refuse(self, status: int, message: str) -> None:
        """Answers one line that says what is wrong."""
        self.answer(status, json.dumps({"error": message}).encode())

    def answer(
        self,
        status: int,
        data: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Sends the answer; the first one of a connection counts."""
        # A refusal may be followed by an error while the connection is taken down.
        if self._answered:
            return
        self._answered = True
        try:
            self.connection.settimeout(ANSWER_SECONDS)
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if status in (429, 503):
                self.send_header("Retry-After", "1")
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.end_headers()
            self.wfile.write(data)
        # The client went away.
        except OSError:
            self.close_connection = True

    def _linger(self) -> None:
        """Reads on for a moment: closing with unread bytes would reset the connection under the answer."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + LINGER_SECONDS
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65536):
                    break
        except OSError:
            pass
