"""Connections to a reward server: one request each, with bounds on everything that a client can cost.

Bounded are connections, the bytes of a request and the seconds for it to arrive. Whatever goes wrong is answered with
a status and one line of JSON. What the answers are is up to the server, see `server.RewardServer`.
"""

from __future__ import annotations

import dataclasses
import hmac
import http.server
import io
import json
import logging
import socket
import socketserver
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

from marble_jax.errors import one_line
from marble_jax.rewards.http import protocol
from marble_jax.rewards.http.images import DEFAULT_LIMITS, Limits
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.rewards.http.protocol import Request
from marble_jax.version import VERSION

log = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
"""Seconds for which a refused client may go on to send, so that it gets to read why; its bytes are dropped."""
ANSWER_SECONDS = 10.0
"""Seconds that a client may take to receive an answer."""
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b'Content-Type: application/json\r\n\r\n{"error": "server: expected fewer connections at a time"}'
)
"""The answer to a connection for which there is no thread."""


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    Attributes:
      token: who sends another, or none, gets 401; empty lets everyone in.
      workers: requests scored at the same time.
      waiting: requests held in memory besides those; more get 503.
      connections: open connections; more get 503.
      read_seconds: for a whole request to arrive, from the first byte of the connection.
      score_seconds: for its scores, once their making has begun.
      limits: of a request.
    """

    token: str = ""
    workers: int = 2
    waiting: int = 6
    connections: int = 64
    read_seconds: float = 30.0
    score_seconds: float = 300.0
    limits: Limits = DEFAULT_LIMITS


DEFAULT_OPTIONS = ServerOptions()


class ConnectionServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A thread for each of a bounded number of connections; subclasses give the answers."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], options: ServerOptions):
        """Binds the address; `serve_forever` answers.

        Raises:
          OSError, OverflowError: the address cannot be bound.
        """
        self.options = options
        self._connected = threading.BoundedSemaphore(options.connections)
        self.address_family = socket.AF_INET
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def health(self) -> dict[str, Any]:
        """The answer to `/health` for who may know."""
        raise NotImplementedError

    def admitted(self) -> AbstractContextManager[None]:
        """A context for one request in memory.

        Raises:
          ProtocolError: there are too many.
        """
        raise NotImplementedError

    def score(self, request: Request) -> bytes:
        """The answer to a request.

        Raises:
          ProtocolError: there are no scores; with the status to answer.
        """
        raise NotImplementedError

    def server_bind(self) -> None:
        """Binds without asking the resolver for a name, as the base class would, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name = str(host)
        self.server_port = port

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or a refusal when there are too many."""
        if not self._connected.acquire(blocking=False):
            self._refuse(request)
            return
        try:
            super().process_request(request, client_address)
        # No thread was started, so none will give the place back.
        except BaseException:
            self._connected.release()
            raise

    def _refuse(self, connection: socket.socket) -> None:
        try:
            # In the thread that accepts connections, which a client must not hold up.
            connection.settimeout(1)
            connection.sendall(_TOO_MANY)
        except OSError:
            pass
        self.shutdown_request(connection)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Runs in the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connected.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs connections that break in odd places, which are no event, where nobody has to see them."""
        log.debug("connection from %s broke", client_address, exc_info=True)


class _SlowClient(Exception):
    """The request did not arrive in time."""


class _Arrival(io.RawIOBase):
    """A connection's incoming bytes, all of which have to be there by `deadline` (on the monotonic clock)."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A socket's own time-out begins anew with every byte; a client could drip for ever.
        left = self._deadline - time.monotonic()
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


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection with one request."""

    server: ConnectionServer
    # HTTP/1.1, so that clients that ask before they send a body get an answer.
    protocol_version = "HTTP/1.1"
    server_version = f"marble-jax/{VERSION}"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        deadline = time.monotonic() + self.server.options.read_seconds
        self.rfile = io.BufferedReader(_Arrival(self.connection, deadline))
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
            seconds = self.server.options.read_seconds
            self._refuse(408, f"request: expected within {seconds:g} s; received only part of it")
        # The client went away.
        except ConnectionError:
            pass
        # A fault of ours costs one answer, not the server.
        except Exception as error:
            log.exception("reward server: %s", one_line(error))
            self._refuse(500, "server: an error of its own; its log has more")

    def finish(self) -> None:
        self._linger()
        super().finish()

    def do_GET(self) -> None:
        """Answers `/health`."""
        if self.path != "/health":
            self._refuse(404, f"path: expected /health; received {self.path[:80]!r}")
            return
        health: dict[str, Any] = {"status": "ok"}
        # What is served, and how busy it is, is not for everyone.
        if self._authorised():
            health = self.server.health()
        self._answer(200, json.dumps(health).encode())

    def do_POST(self) -> None:
        """Answers `/score`."""
        try:
            length = self._body_length()
            # Before the body is read: it is what takes memory.
            with self.server.admitted():
                body = self._read_body(length)
                request = protocol.decode_request(body, self.server.options.limits)
                scores = self.server.score(request)
        except ProtocolError as error:
            self._refuse(error.status, str(error))
        else:
            self._answer(200, scores)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers, in our form, what the base class finds wrong with a request."""
        text = f"request: {message or http.HTTPStatus(code).phrase}"
        # The base class says "not implemented" of methods that we do not allow.
        if code == 501:
            code = 405
        self._refuse(code, text[:200])

    def log_message(self, format: str, *args: Any) -> None:
        """Logs requests for debugging alone."""
        log.debug("%s %s", self.address_string(), format % args)

    def handle_expect_100(self) -> bool:
        """Says whether the body is wanted before it is sent."""
        try:
            self._body_length()
        except ProtocolError as error:
            self._refuse(error.status, str(error))
            return False
        return super().handle_expect_100()

    def _authorised(self) -> bool:
        token = self.server.options.token
        if not token:
            return True
        sent = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        expected = f"Bearer {token}".encode()
        # Takes as long for every wrong token, so that the time does not tell how much of it is
        # right.
        return hmac.compare_digest(sent, expected)

    def _body_length(self) -> int:
        """The length of a body that will be read, after everything that can be wrong without reading it.

        Raises:
          ProtocolError: something is.
        """
        self._check_access()
        kind = self.headers.get_content_type()
        if kind != protocol.CONTENT_TYPE:
            raise ProtocolError(
                415, f"Content-Type: expected {protocol.CONTENT_TYPE}; received {kind[:80]}"
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
        if self.path != "/score":
            raise ProtocolError(404, f"path: expected /score; received {self.path[:80]!r}")
        if not self._authorised():
            raise ProtocolError(401, "token: expected the server's; received another or none")

    def _read_body(self, length: int) -> bytes:
        body = self.rfile.read(length)
        if len(body) < length:
            raise ProtocolError(400, f"body: expected {length} bytes; received {len(body)}")
        return body

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, json.dumps({"error": message}).encode())

    def _answer(self, status: int, data: bytes) -> None:
        """Sends the answer, a JSON object; the first one of a connection counts."""
        # A refusal may be followed by an error while the connection is taken down.
        if self._answered:
            return
        self._answered = True
        try:
            self.connection.settimeout(ANSWER_SECONDS)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
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
