"""Connections to a reward server: bounds on how many there are and on what all requests hold.

A client that has not shown the token keeps no place from one that has. What is said over a connection is
`connection_handler`'s, and what the answers are is up to the server, see `server.RewardServer`.
"""

from __future__ import annotations

import dataclasses
import http.server
import logging
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from marble_jax.rewards.http.images import DEFAULT_LIMITS, Limits
from marble_jax.rewards.http.parsing import ProtocolError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    Attributes:
      token: who sends another, or none, gets 401; empty lets everyone in.
      workers: requests scored at the same time.
      waiting: whole requests that wait for a worker besides those; more get 503.
      connections: open connections of clients that know the token; more get 503.
      idle: connections that have not shown it yet; the oldest of more is closed.
      memory: bytes of requests held at a time; what is beyond gets 503.
      header_seconds: for the head of a request to arrive.
      read_seconds: for a whole request to arrive.
      queue_seconds: for a worker to come free; then 503, after which the client asks again.
      score_seconds: for its scores, once their making has begun.
      batch: images scored at once; 0 takes a request as it is.
      limits: of a request.
      tls: speaks TLS with its certificate; None speaks plain HTTP.
    """

    token: str = ""
    workers: int = 2
    waiting: int = 256
    connections: int = 1024
    idle: int = 128
    memory: int = 2 * 2**30
    header_seconds: float = 10.0
    read_seconds: float = 30.0
    queue_seconds: float = 40.0
    score_seconds: float = 300.0
    batch: int = 0
    limits: Limits = DEFAULT_LIMITS
    tls: ssl.SSLContext | None = None


DEFAULT_OPTIONS = ServerOptions()


class ConnectionServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A thread for each of a bounded number of connections; subclasses give the answers."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        options: ServerOptions,
        handler: type[http.server.BaseHTTPRequestHandler],
    ):
        """Binds the address; `serve_forever` answers.

        Args:
          address: host and port.
          options: how it works.
          handler: answers a connection.

        Raises:
          OSError, OverflowError: the address cannot be bound.
        """
        self.options = options
        self._known = threading.BoundedSemaphore(options.connections)
        self._idle: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._held_bytes = 0
        self.address_family = socket.AF_INET
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def health(self) -> dict[str, Any]:
        """The answer to `/health` for who may know."""
        raise NotImplementedError

    def admitted(self) -> AbstractContextManager[None]:
        """A context for one request in memory.

        Raises:
          ProtocolError: there are too many.
        """
        raise NotImplementedError

    def score(self, body: bytes, is_gone: Callable[[], bool]) -> bytes:
        """The answer to the body of a request.

        Args:
          body: as it came.
          is_gone: whether the client has hung up, so that its scores need not be made.

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
        """A thread for the connection; where too many show no token, the oldest of them makes room."""
        oldest = None
        with self._lock:
            if len(self._idle) >= self.options.idle:
                oldest = self._idle.pop(next(iter(self._idle)))
            self._idle[id(request)] = request
        if oldest is not None:
            _hang_up(oldest)
        try:
            super().process_request(request, client_address)
        # No thread was started, so none will take it out.
        except BaseException:
            self._forget(request)
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Runs in the connection's thread; with TLS the handshake comes first."""
        if self.options.tls is not None:
            request.settimeout(self.options.header_seconds)
            try:
                request = self.options.tls.wrap_socket(request, server_side=True)
            except OSError:
                # No TLS, or none in time: nobody that could be answered.
                return
        super().finish_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Runs in the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: Any) -> None:
        with self._lock:
            self._idle.pop(id(request), None)

    @contextmanager
    def known(self, request: Any) -> Iterator[None]:
        """A context for a connection whose client has shown the token: it makes no room for others.

        Raises:
          ProtocolError: there are too many.
        """
        if not self._known.acquire(blocking=False):
            raise ProtocolError(503, "server: expected fewer connections at a time")
        self._forget(request)
        try:
            yield
        finally:
            self._known.release()

    @contextmanager
    def held(self) -> Iterator[Callable[[int], None]]:
        """A context with a function that counts bytes of a request as they arrive.

        Raises:
          ProtocolError: (by the function) all requests together hold too many.
        """
        count = 0

        def hold(size: int) -> None:
            nonlocal count
            with self._lock:
                if self._held_bytes + size > self.options.memory:
                    raise ProtocolError(503, "server: expected fewer requests at a time")
                self._held_bytes += size
            count += size

        try:
            yield hold
        finally:
            with self._lock:
                self._held_bytes -= count

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs connections that break in odd places, which are no event, where nobody has to see them."""
        log.debug("connection from %s broke", client_address, exc_info=True)


def _hang_up(connection: socket.socket) -> None:
    """Ends a connection, and with it the reading of its thread."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It was ended already.
        pass
