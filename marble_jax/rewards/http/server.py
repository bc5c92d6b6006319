"""The reward server: any reward of this project behind HTTP, for `remote.RemoteReward` and whoever speaks `protocol`.

One request a connection. What a client can cost is bounded: connections, requests in memory, bytes, images, pixels
before anything is decompressed, seconds for its request to arrive and for its scores to be made. Whatever goes wrong
is answered with a status and one line of JSON; a call that hangs is given up and its thread replaced.
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
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError, nearest
from marble_jax.rewards import base
from marble_jax.rewards.base import Reward
from marble_jax.rewards.http import protocol
from marble_jax.rewards.http.calls import is_loopback
from marble_jax.rewards.http.protocol import Limits, ProtocolError, Request
from marble_jax.rewards.workers.host_scorer import line
from marble_jax.rewards.workers.threads import Expired, Pool
from marble_jax.version import VERSION

log = logging.getLogger(__name__)

LINGER = 2.0
"""Seconds for which what a refused client still sends is thrown away, so that it gets to read why."""


_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b'Content-Type: application/json\r\n\r\n{"error": "server: expected fewer connections at a time"}'
)
"""The answer to a connection for which there is no thread."""


@dataclasses.dataclass(frozen=True)
class Service:
    """How a server works.

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
    limits: Limits = Limits()


class _SlowClient(Exception):
    """The request did not arrive in time."""


class _Arrival(io.RawIOBase):
    """A connection's incoming bytes, all of which have to be there by `end` (on the monotonic clock)."""

    def __init__(self, connection: socket.socket, end: float):
        self._connection, self._end = connection, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise _SlowClient
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        except TimeoutError:
            raise _SlowClient from None


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection with one request."""

    server: RewardServer
    protocol_version = "HTTP/1.1"  # clients that ask before they send a body get an answer
    server_version, sys_version = f"marble-jax/{VERSION}", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(
            _Arrival(self.connection, time.monotonic() + self.server.service.read_seconds)
        )
        self._answered = False
        self.requestline, self.request_version, self.command = "", self.protocol_version, ""

    def handle(self) -> None:
        try:
            self.handle_one_request()
        except _SlowClient:
            self._answer(
                408,
                {
                    "error": f"request: expected within {self.server.service.read_seconds:g} s; received "
                    "only part of it"
                },
            )
        except ConnectionError:
            pass  # the client went away
        except Exception as error:  # a fault of ours costs one answer, not the server
            log.exception("reward server: %s", line(error))
            self._answer(500, {"error": "server: an error of its own; its log has more"})

    def finish(self) -> None:
        self._linger()
        super().finish()

    def do_GET(self) -> None:
        """`/health`."""
        if self.path != "/health":
            self._answer(404, {"error": f"path: expected /health; received {self.path[:80]!r}"})
            return
        self._answer(200, self.server.health() if self._authorised() else {"status": "ok"})

    def do_POST(self) -> None:
        """`/score`."""
        try:
            length = self._length()
            with self.server.admitted():
                scores = self.server.score(
                    protocol.decode_request(self._body(length), self.server.service.limits)
                )
        except ProtocolError as error:
            self._answer(error.status, {"error": str(error)})
        else:
            self._answer(200, scores)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, in our form."""
        text = f"request: {message or http.HTTPStatus(code).phrase}"
        self._answer(405 if code == 501 else code, {"error": text[:200]})

    def log_message(self, format: str, *args: Any) -> None:
        """Requests go to the debug log."""
        log.debug("%s %s", self.address_string(), format % args)

    def handle_expect_100(self) -> bool:
        """Says whether the body is wanted before it is sent."""
        try:
            self._length()
        except ProtocolError as error:
            self._answer(error.status, {"error": str(error)})
            return False
        return super().handle_expect_100()

    def _authorised(self) -> bool:
        given = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        return not self.server.service.token or hmac.compare_digest(
            given, f"Bearer {self.server.service.token}".encode()
        )

    def _length(self) -> int:
        """The length of a body that will be read, after everything that can be wrong without reading it.

        Raises:
          ProtocolError: something is.
        """
        if self.path != "/score":
            raise ProtocolError(404, f"path: expected /score; received {self.path[:80]!r}")
        if not self._authorised():
            raise ProtocolError(401, "token: expected the server's; received another or none")
        kind, most = self.headers.get_content_type(), self.server.service.limits.body
        if kind != protocol.CONTENT_TYPE:
            raise ProtocolError(
                415, f"Content-Type: expected {protocol.CONTENT_TYPE}; received {kind[:80]}"
            )
        length = self.headers.get("Content-Length")
        if length is None or self.headers.get("Transfer-Encoding"):
            raise ProtocolError(411, "body: expected a Content-Length; received none")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise ProtocolError(
                400, f"Content-Length: expected a number of bytes; received {length[:40]!r}"
            )
        if int(length) > most:
            raise ProtocolError(413, f"body: expected at most {most} bytes; received {length}")
        return int(length)

    def _body(self, length: int) -> bytes:
        body = self.rfile.read(length)
        if len(body) < length:
            raise ProtocolError(400, f"body: expected {length} bytes; received {len(body)}")
        return body

    def _answer(self, status: int, body: dict[str, Any] | bytes) -> None:
        if self._answered:
            return
        self._answered, data = True, body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.connection.settimeout(10)
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
        except OSError:
            self.close_connection = True  # the client went away

    def _linger(self) -> None:
        """Reads on for a moment: closing with unread bytes would reset the connection under the answer."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + LINGER
            while (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65536):
                    break
        except OSError:
            pass


class RewardServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves rewards until closed; a context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        rewards: Sequence[Reward],
        host: str = "127.0.0.1",
        port: int = 0,
        service: Service = Service(),
    ):
        """Binds the address and begins to answer.

        Args:
          rewards: with distinct names.
          host: address to bind.
          port: to bind; 0 takes a free one, see `url`.
          service: how it works.

        Raises:
          InputError: an address that cannot be bound, or one that others can reach without a token.
        """
        if not service.token and not is_loopback(host):
            raise InputError(
                f"--host: expected a loopback address such as 127.0.0.1, or a token with any other; "
                f"received {host!r} without a token"
            )
        self.service = service
        self._rewards = {reward.name: reward for reward in rewards}
        self._pool = Pool(service.workers, "reward server")
        self._admitted = threading.BoundedSemaphore(service.workers + service.waiting)
        self._connected = threading.BoundedSemaphore(service.connections)
        self._device = threading.Lock()
        self._count, self._busy = threading.Lock(), 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host.strip("[]"), port), _Handler)
        except (OSError, OverflowError) as error:
            self._pool.close()
            raise InputError(
                f"--host, --port: expected an address that is free; received {host}:{port} "
                f"({getattr(error, 'strerror', None) or error})"
            ) from None
        self._loop = threading.Thread(
            target=self.serve_forever, args=(0.1,), name="reward server", daemon=True
        )
        self._loop.start()

    @property
    def url(self) -> str:
        """The address clients use."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def server_bind(self) -> None:
        """Binds without asking the resolver for a name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def close(self) -> None:
        """Stops answering and ends the threads; calls that hang are left behind."""
        self.shutdown()
        self._loop.join()
        self.server_close()
        self._pool.close()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or a refusal when there are too many."""
        if not self._connected.acquire(blocking=False):
            try:
                request.settimeout(1)
                request.sendall(_FULL)
            except OSError:
                pass
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connected.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Runs in the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connected.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break in odd places are no event."""
        log.debug("connection from %s broke", client_address, exc_info=True)

    def health(self) -> dict[str, Any]:
        """What `/health` tells who may know."""
        return {
            "status": "ok" if not self._pool.lost else "degraded",
            "version": VERSION,
            "rewards": sorted(self._rewards),
            "requests": self._busy,
            "workers": self.service.workers,
            "hanging": self._pool.lost,
        }

    def admitted(self) -> _Admission:
        """A context for one request in memory.

        Raises:
          ProtocolError: there are too many.
        """
        return _Admission(self)

    def score(self, request: Request) -> bytes:
        """The answer to a request.

        Raises:
          ProtocolError: no such reward, or the reward failed or took too long.
        """
        reward = self._rewards.get(request.reward)
        if reward is None:
            raise ProtocolError(
                404,
                f"reward: expected one of {', '.join(sorted(self._rewards))}; received "
                f"{protocol.short(request.reward)}{nearest(request.reward, self._rewards)}",
            )
        future = self._pool.submit(self._score, reward, request)
        try:
            return self._pool.result(future, self.service.score_seconds)
        except Expired:
            raise ProtocolError(
                504,
                f"reward {reward.name}: expected scores within {self.service.score_seconds:g} s; "
                "received none",
            ) from None
        except (Exception, SystemExit) as error:  # foreign code
            log.warning("reward %s failed: %s", reward.name, line(error))
            raise ProtocolError(500, f"reward {reward.name}: {line(error)}"[:300]) from None

    def _score(self, reward: Reward, request: Request) -> bytes:
        images = request.images.astype(np.float32) / 255
        if reward.kind == "host":
            result = base.score(reward, images, request.prompts, request.metadata)
            return protocol.encode_scores(result.values, result.valid, result.valid | result.failed)
        # Filled up to a power of two: programs are compiled for few batch sizes, not for each that a client sends.
        count = len(images)
        index = np.arange(1 << (count - 1).bit_length()) % count
        with self._device:
            result = base.score(
                reward,
                jnp.asarray(images[index]),
                [request.prompts[i] for i in index],
                [request.metadata[i] for i in index],
            )
        values, valid, failed = (column[:count] for column in result)
        return protocol.encode_scores(values, valid, valid | failed)


class _Admission:
    """Holds one of the places for requests in memory."""

    def __init__(self, server: RewardServer):
        self._server = server

    def __enter__(self) -> None:
        if not self._server._admitted.acquire(blocking=False):
            raise ProtocolError(
                503, "server: expected fewer requests at a time; received one too many"
            )
        with self._server._count:
            self._server._busy += 1

    def __exit__(self, *_: Any) -> None:
        with self._server._count:
            self._server._busy -= 1
        self._server._admitted.release()
