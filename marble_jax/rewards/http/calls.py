"""HTTP calls to one of several replicas: time-outs, retries with growing and jittered pauses, few calls at a time.

Plain `http.client`: no redirects and no proxies, so a token goes where the configuration says and nowhere else.
"""

from __future__ import annotations

import dataclasses
import http.client
import ipaddress
import json
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from marble_jax.errors import InputError
from marble_jax.rewards.base import RewardError
from marble_jax.rewards.workers.host_scorer import line
from marble_jax.rewards.workers.threads import Pool

log = logging.getLogger(__name__)

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same call may succeed."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts at most, whatever a server asks for."""


class CallError(Exception):
    """A call failed; the message is one line.

    Attributes:
      passing: whether the same call may succeed later.
      pause: seconds the server asks to wait.
    """

    def __init__(self, message: str, passing: bool, pause: float = 0.0):
        super().__init__(message)
        self.passing, self.pause = passing, pause


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long and how often.

    Attributes:
      connect: seconds for a connection.
      answer: seconds for a whole call, from connecting to the last byte.
      retries: further attempts after the first.
      pause: seconds before the first of them; doubles with each, and varies by half.
      in_flight: calls at the same time, over all replicas.
      answer_bytes: largest answer.
    """

    connect: float = 5.0
    answer: float = 60.0
    retries: int = 3
    pause: float = 0.5
    in_flight: int = 4
    answer_bytes: int = 16 * 2**20


def secret(reward: str, variable: str, file: str) -> str:
    """A token from an environment variable or a file; empty when neither is named.

    Raises:
      InputError: both are named, or the one that is holds nothing usable.
    """
    if variable and file:
        raise InputError(f"reward {reward}: expected token_env or token_file; received both")
    if variable:
        token, where = (
            os.environ.get(variable, ""),
            f"the environment variable {variable} to hold a token",
        )
    elif file:
        where = f"a token in {file}"
        try:
            token = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(
                f"reward {reward}: expected {where}; received {type(error).__name__}"
            ) from None
    else:
        return ""
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"reward {reward}: expected {where}; received {'nothing' if not token else 'other text'}"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


@dataclasses.dataclass
class _Replica:
    """One server: calls under way, and until when it counts as down."""

    url: str
    busy: int = 0
    down_until: float = 0.0


class Replicas:
    """Servers that answer alike."""

    def __init__(
        self,
        reward: str,
        urls: Sequence[str],
        path: str,
        token: str = "",
        patience: Patience = Patience(),
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Checks the addresses; calls nobody.

        Args:
          reward: whose calls these are, for messages.
          urls: http or https addresses; `path` is appended.
          path: of every call.
          token: sent as a bearer token; empty for none.
          patience: how long and how often.
          sleep: how to pause.

        Raises:
          InputError: no address, or one that is none.
        """
        if not urls or isinstance(urls, str) or any(not isinstance(url, str) for url in urls):
            raise InputError(
                f"reward {reward}: expected urls as a list of addresses; received {urls!r}"
            )
        for url in urls:
            try:
                parts = urlsplit(url)
                usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:
                usable = False
            if not usable or parts.query or parts.fragment or parts.username:
                raise InputError(
                    f"reward {reward}: expected an address such as http://127.0.0.1:8810; received "
                    f"{url!r}"
                )
            if token and parts.scheme == "http" and not is_loopback(parts.hostname):
                log.warning(
                    "reward %s: the token goes to %s unencrypted; https or a tunnel would hide it",
                    reward,
                    url,
                )
        self.reward, self._token, self.patience, self._sleep = reward, token, patience, sleep
        self._replicas = [_Replica(url.rstrip("/") + path) for url in urls]
        self._lock, self._slots = threading.Lock(), threading.BoundedSemaphore(patience.in_flight)

    def call(self, body: bytes, content_type: str) -> bytes:
        """Sends `body` to the least busy replica, and again, to another if there is one, while that may help.

        Raises:
          RewardError: every attempt failed, or one in a way that will not pass.
        """
        headers = {"Content-Type": content_type, "Connection": "close"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        for attempt in range(self.patience.retries + 1):
            with self._chosen() as replica:
                try:
                    return post(replica.url, body, headers, self.patience)
                except CallError as error:
                    problem = error
                    if error.passing:
                        replica.down_until = time.monotonic() + max(
                            error.pause, self._pause(attempt)
                        )
            if not problem.passing or attempt == self.patience.retries:
                break
            others = any(r.down_until <= time.monotonic() for r in self._replicas)
            if not others:
                self._sleep(min(LONGEST_PAUSE, max(problem.pause, self._pause(attempt))))
        raise RewardError(
            f"{problem} (attempt {attempt + 1} of {self.patience.retries + 1})"
        ) from problem

    def each(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`function` of every item, several at a time; an exception in place of a value where one was raised."""

        def guarded(item: Any) -> Any:
            try:
                return function(item)
            except Exception as error:  # told apart by whoever asked
                return error

        if len(items) < 2:
            return [guarded(item) for item in items]
        pool = Pool(min(len(items), self.patience.in_flight), f"calls of {self.reward}")
        try:
            return [
                pool.result(future) for future in [pool.submit(guarded, item) for item in items]
            ]
        finally:
            pool.close()

    def _pause(self, attempt: int) -> float:
        return min(LONGEST_PAUSE, self.patience.pause * 2**attempt) * random.uniform(0.5, 1.5)

    @contextmanager
    def _chosen(self) -> Iterator[_Replica]:
        """The replica to ask: one that is not down, else the first to come up; the least busy among equals."""
        with self._slots:
            with self._lock:
                now = time.monotonic()
                replica = min(self._replicas, key=lambda r: (max(r.down_until, now), r.busy))
                replica.busy += 1
            try:
                yield replica
            finally:
                with self._lock:
                    replica.busy -= 1


def post(url: str, body: bytes, headers: Mapping[str, str], patience: Patience) -> bytes:
    """One POST.

    Raises:
      CallError: no connection, no time left, an answer that is too long, or a status other than 200.
    """
    parts, end = urlsplit(url), time.monotonic() + patience.answer
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.hostname,
            parts.port,
            timeout=patience.connect,
            context=ssl.create_default_context(),
        )
    else:
        connection = http.client.HTTPConnection(
            parts.hostname, parts.port, timeout=patience.connect
        )
    try:
        connection.connect()
        connection.sock.settimeout(patience.answer)
        socket = connection.sock
        connection.request("POST", parts.path or "/", body, dict(headers))
        socket.settimeout(max(0.01, end - time.monotonic()))
        answer = connection.getresponse()
        received = bytearray()
        while chunk := answer.read1(65536):
            received += chunk
            if len(received) > patience.answer_bytes:
                raise CallError(
                    f"{url}: expected an answer of at most {patience.answer_bytes} bytes; received more",
                    False,
                )
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            socket.settimeout(left)
        missing = answer.length or 0
    except TimeoutError:
        raise CallError(
            f"{url}: expected an answer within {patience.answer:g} s; received none", True
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise CallError(f"{url}: {line(error)}", True) from None
    finally:
        connection.close()
    if missing:
        raise CallError(f"{url}: expected {missing} bytes more; received a broken connection", True)
    if answer.status != 200:
        raise CallError(
            f"{url}: {answer.status} {reason(bytes(received), answer.reason)}",
            answer.status in PASSING,
            _seconds(answer.getheader("Retry-After")),
        )
    return bytes(received)


def reason(body: bytes, fallback: str) -> str:
    """What an error answer says, in one line: `{"error": ...}`, `{"error": {"message": ...}}`, or its first line."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body.decode("utf-8", "replace").strip().partition("\n")[0]
    return " ".join(str(text).split())[:200] or fallback


def _seconds(text: str | None) -> float:
    """The pause that a Retry-After header asks for; 0 for none or a date."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(text or 0)))
    except ValueError:
        return 0.0
