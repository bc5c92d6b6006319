"""One POST or GET over HTTP, bounded in time and size, whose failures say whether the same call may succeed later.

Plain `http.client`: no redirects and no proxies, so a token goes where the configuration says and nowhere else.
"""

from __future__ import annotations

import dataclasses
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from marble_jax.errors import InputError, one_line
from marble_jax.validation import parse_json_object

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same call may succeed."""
MAX_PAUSE_SECONDS = 30.0
"""Seconds between two attempts at most, whatever a server asks for."""
_CHUNK = 65536
"""Bytes read at a time: the clock is looked at in between."""


class CallError(Exception):
    """A call failed; the message is one line.

    Attributes:
      transient: whether the same call may succeed later.
      pause_seconds: how long the server asks to wait.
      is_busy: whether the server is well and has too much to do.
    """

    def __init__(
        self, message: str, transient: bool, pause_seconds: float = 0.0, is_busy: bool = False
    ):
        super().__init__(message)
        self.transient = transient
        self.pause_seconds = pause_seconds
        self.is_busy = is_busy


@dataclasses.dataclass(frozen=True)
class CallPolicy:
    """Times, sizes and repetitions of a call.

    Attributes:
      connect_seconds: for a connection.
      answer_seconds: for a whole call, from connecting to the last byte.
      retries: further attempts after the first.
      pause_seconds: before the first of them; doubles with each, and varies by half.
      max_in_flight: calls at the same time, over all replicas.
      max_answer_bytes: size of an answer.
      patience_seconds: for a server that is busy (429, 503), however many attempts that takes; a run waits for a
        reward's scores for `rewards.timeout`, of which this leaves some for the answer.
      ca_file: certificates of authorities to trust besides the system's; empty for none.
    """

    connect_seconds: float = 5.0
    answer_seconds: float = 60.0
    retries: int = 3
    pause_seconds: float = 0.5
    max_in_flight: int = 4
    max_answer_bytes: int = 16 * 2**20
    patience_seconds: float = 100.0
    ca_file: str = ""


DEFAULT_POLICY = CallPolicy()


def get(url: str, headers: Mapping[str, str], policy: CallPolicy) -> bytes:
    """The body of the answer to one GET; arguments and errors as of `post`."""
    return _send("GET", url, None, headers, policy)


def post(url: str, body: bytes, headers: Mapping[str, str], policy: CallPolicy) -> bytes:
    """The body of the answer to one POST.

    Args:
      url: http or https address with the path.
      body: what is sent.
      headers: besides those that `http.client` adds.
      policy: its times and sizes; nothing is tried again here.

    Raises:
      CallError: no connection, no time left, an answer that is too long, or a status other than 200.
    """
    return _send("POST", url, body, headers, policy)


def _send(
    method: str, url: str, body: bytes | None, headers: Mapping[str, str], policy: CallPolicy
) -> bytes:
    """The body of the answer to one request. Raises CallError, see `post`."""
    deadline = time.monotonic() + policy.answer_seconds
    path = urlsplit(url).path or "/"
    connection = _connection(url, policy)
    watch = threading.Timer(policy.answer_seconds, _cut, [connection])
    watch.daemon = True
    try:
        connection.connect()
        # Times of a socket begin anew with every byte: a server that drips its headers would outlast them all.
        watch.start()
        # Kept, since `connection` lets go of its socket when the answer says that it will be
        # closed.
        wire = connection.sock
        wire.settimeout(policy.answer_seconds)
        connection.request(method, path, body, dict(headers))
        # A time of 0 would make the socket one that never waits, so a deadline that has passed is a
        # short time.
        wire.settimeout(max(0.01, deadline - time.monotonic()))
        answer = connection.getresponse()
        received = _read(url, answer, wire, deadline, policy.max_answer_bytes)
        missing = answer.length or 0
    except TimeoutError:
        raise CallError(
            f"{url}: expected an answer within {policy.answer_seconds:g} s; received none", True
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= deadline:
            raise CallError(
                f"{url}: expected an answer within {policy.answer_seconds:g} s; received none",
                True,
            ) from None
        raise CallError(f"{url}: {one_line(error)}", True) from None
    finally:
        watch.cancel()
        connection.close()
    if missing:
        raise CallError(f"{url}: expected {missing} bytes more; received a broken connection", True)
    if answer.status != 200:
        raise CallError(
            f"{url}: {answer.status} {reason(received, answer.reason)}",
            answer.status in TRANSIENT_STATUSES,
            _retry_after(answer),
            answer.status in (429, 503),
        )
    return received


def _cut(connection: http.client.HTTPConnection) -> None:
    """Ends a connection from another thread, whatever is being waited for."""
    wire = connection.sock
    if wire is not None:
        try:
            wire.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It has ended by itself.
            pass


def _connection(url: str, policy: CallPolicy) -> http.client.HTTPConnection:
    """A connection to the server of an address, not yet open."""
    seconds = policy.connect_seconds
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        context = ssl.create_default_context()
        if policy.ca_file:
            context.load_verify_locations(policy.ca_file)
        return http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=context)
    return http.client.HTTPConnection(host, parts.port, timeout=seconds)


def _read(
    url: str,
    answer: http.client.HTTPResponse,
    wire: socket.socket,
    deadline: float,
    max_bytes: int,
) -> bytes:
    """The body of an answer, all of which has to arrive by `deadline` (on the monotonic clock).

    Raises:
      CallError: it is longer than `max_bytes`.
      TimeoutError: there is no time left.
    """
    received = bytearray()
    # `read1` gives what has arrived; `read` would wait for the whole body, each byte of which
    # renews the time-out.
    while chunk := answer.read1(_CHUNK):
        received += chunk
        if len(received) > max_bytes:
            raise CallError(
                f"{url}: expected an answer of at most {max_bytes} bytes; received more", False
            )
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        wire.settimeout(left)
    return bytes(received)


def reason(body: bytes, fallback: str) -> str:
    """The message of an error answer, in one line.

    Args:
      body: of the answer: `{"error": ...}`, `{"error": {"message": ...}}`, or text, whose first line counts.
      fallback: for a body that says nothing.
    """
    try:
        text = parse_json_object(body, "answer")["error"]
        if isinstance(text, dict):
            text = text["message"]
    except (InputError, KeyError):
        text = body.decode("utf-8", "replace").strip().partition("\n")[0]
    line = " ".join(str(text).split())
    return line[:200] or fallback


def _retry_after(answer: http.client.HTTPResponse) -> float:
    """Seconds of pause that a Retry-After header asks for; 0 for none or a date."""
    text = answer.getheader("Retry-After")
    if not text:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    # With 0 first, so that NaN, which is not larger than anything, becomes 0.
    return min(MAX_PAUSE_SECONDS, max(0.0, seconds))
