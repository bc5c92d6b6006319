"""Rendezvous: the processes of a run meet at the coordinator's address before JAX opens its own service there.

Process 0 listens until all others have said which one they are; then each of them has a `Channel`, or all of those that
came have the same line that says who is missing or does not fit. Who does not have the run's secret is no process of
it, on either side.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from marble_jax.distributed.channel import Channel
from marble_jax.distributed.secret import VARIABLE, GivenSecret, Secret, challenge, is_proof, proof
from marble_jax.distributed.waiting_room import MAGIC, WaitingRoom
from marble_jax.distributed.wire import LOST, VALUE, listen, receive, send
from marble_jax.errors import InputError
from marble_jax.validation import is_digits, is_host, short

RETRY = 0.25
"""Seconds between two attempts to reach process 0."""
ANSWER = 2.0
"""Seconds beyond its own deadline that a process waits for the line of process 0, whose deadline is another."""
MOST_ANSWER = 1 << 22
"""Bytes of what process 0 answers: the names of all hosts."""
_STRANGER = "another program, another run's secret, or a process 0 that stopped, at that port"
NAMED = 8
"""Processes that an error names at most."""
_Arrived = dict[int, tuple[dict[str, Any], socket.socket]]
"""What each process said of itself, and its connection."""


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """What a process knows before it has met the others.

    Attributes:
      host: of process 0.
      port: of process 0.
      count: of processes.
      index: of this process.
      name: of this host.
      timeout: seconds to wait for the others.
      deadline: `time.monotonic()` at the end of that time.
      keepalive: seconds after which a host that answers nothing counts as lost.
      secret: of the run.
    """

    host: str
    port: int
    count: int
    index: int
    name: str
    timeout: float
    deadline: float
    keepalive: float
    secret: Secret

    def remaining(self) -> float:
        """Returns the seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())


def rendezvous(
    address: str,
    count: int,
    index: int,
    timeout: float,
    keepalive: float = 60.0,
    name: str = "",
    secret: Secret | None = None,
) -> Channel:
    """Waits until all processes are there, and returns the channel between them.

    Args:
      address: HOST:PORT of process 0.
      count: of processes.
      index: of this one.
      timeout: seconds to wait for the others.
      keepalive: seconds after which a host that answers nothing any more counts as lost.
      name: of this host; its own by default.
      secret: of the run; without one anybody who speaks as a process is taken for one.

    Raises:
      InputError: they did not all come in time, or do not agree on how many they are. Every process that is there
        says so.
    """
    host, port = split_address(address)
    name = name or socket.gethostname()
    deadline = time.monotonic() + timeout
    secret = secret or GivenSecret()
    meeting = _Meeting(host, port, count, index, name, timeout, deadline, keepalive, secret)
    if index != 0:
        return _join(meeting)
    secret.make()
    try:
        return _admit_all(meeting)
    finally:
        secret.forget()


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT or [IPV6]:PORT.

    Raises:
      InputError: another form.
    """
    host, _, port = address.strip().rpartition(":")
    if not is_host(host) or not is_digits(port) or not 0 < int(port) < 65536:
        raise InputError(
            f"--coordinator: expected HOST:PORT of process 0, such as 10.0.0.2:8476; received {short(address)}"
        )
    is_bracketed = host.startswith("[") and host.endswith("]")
    # Without brackets the last part of an IPv6 address would be taken for the port.
    if ":" in host and not is_bracketed:
        raise InputError(
            f"--coordinator: expected [ADDRESS]:PORT for an IPv6 address, such as [fd00::2]:8476; received "
            f"{address!r}"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def with_brackets(host: str) -> str:
    """Returns a host as it stands in front of a port: an IPv6 address in brackets."""
    if ":" in host and not host.startswith("["):
        return f"[{host}]"
    return host


def _admit_all(meeting: _Meeting) -> Channel:
    """On process 0: takes the others in, and tells all of them how it went."""
    secret = meeting.secret.read() or ""
    arrived: _Arrived = {}
    problem = ""
    with _open(meeting) as listener, closing(WaitingRoom(listener, secret)) as room:
        while len(arrived) < meeting.count - 1 and not problem:
            for hello, connection in room.wait(meeting.remaining()):
                # All that came learn of a problem, also the one that is its cause.
                problem = problem or _take_in(meeting, hello, connection, arrived)
            if not problem and len(arrived) < meeting.count - 1 and not meeting.remaining():
                problem = _who_is_missing(meeting, arrived, room.num_refused)
    in_order = sorted(arrived.items())
    if problem:
        for _, (hello, connection) in in_order:
            _answer(secret, hello, connection, LOST, problem)
        raise InputError(problem)
    names = [meeting.name, *(hello["name"] for _, (hello, _) in in_order)]
    for _, (hello, connection) in in_order:
        _answer(secret, hello, connection, VALUE, names)
    connections = [(index, connection) for index, (_, connection) in in_order]
    return Channel(0, names, connections, meeting.keepalive)


def _open(meeting: _Meeting) -> socket.socket:
    try:
        return listen(meeting.port)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--coordinator: expected port {meeting.port} to be free on process 0 ({meeting.name}); received "
            f"{reason}; choose another one"
        ) from None


def _take_in(
    meeting: _Meeting, hello: dict[str, Any], connection: socket.socket, arrived: _Arrived
) -> str:
    """Adds a process to `arrived`; returns why the run cannot start, an empty text while it can."""
    problem = _misfit(meeting, hello, arrived)
    if problem:
        _answer(meeting.secret.read() or "", hello, connection, LOST, problem)
    else:
        arrived[hello["process"]] = (hello, connection)
    return problem


def _who_is_missing(meeting: _Meeting, arrived: _Arrived, num_refused: int) -> str:
    missing = [str(index) for index in range(1, meeting.count) if index not in arrived]
    listed = ", ".join(missing[:NAMED])
    if len(missing) > NAMED:
        listed += " and more"
    refused = ""
    if num_refused:
        refused = f" ({num_refused} connections had another secret and were refused)"
    return (
        f"distributed: expected {meeting.count} processes at port {meeting.port} of process 0 ({meeting.name}) "
        f"within {meeting.timeout:g} s; received none from process {listed}: are they running, with this address "
        f"and --num_processes={meeting.count}?{refused}"
    )


def _misfit(meeting: _Meeting, hello: dict[str, Any], arrived: _Arrived) -> str:
    """Why a process that arrived cannot be one of this run; empty if it can."""
    index, count = hello["process"], meeting.count
    if hello["of"] != count:
        return (
            f"--num_processes: expected the same on every host; received {count} on process 0 ({meeting.name}) "
            f"and {hello['of']} on process {index} ({hello['name']})"
        )
    expected = (
        f"--process_id: expected 0 to {count - 1}, each once; received {index} from {hello['name']}"
    )
    if index in arrived:
        return f"{expected} and from {arrived[index][0]['name']}"
    if not 0 < index < count:
        return expected
    return ""


def _join(meeting: _Meeting) -> Channel:
    """On another process: knocks until process 0 opens, then waits until it says that all are there."""
    reason = ""
    while meeting.remaining() > 0:
        try:
            return _knock(meeting)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        time.sleep(min(RETRY, meeting.remaining()))
    raise InputError(
        f"--coordinator: expected process 0 at {meeting.host}:{meeting.port} within {meeting.timeout:g} s; received "
        f"none ({reason}): is process 0 running there, and is the port open between the hosts?"
    )


def _knock(meeting: _Meeting) -> Channel:
    """Tries once to reach process 0, and waits for all others if it is there.

    Raises:
      OSError: process 0 does not listen yet, or somebody else does.
      InputError: process 0 says why the run cannot start.
    """
    # Read anew each time: the file may be an earlier run's until process 0 has made its own.
    secret = meeting.secret.read()
    if secret is None:
        raise OSError(
            f"no secret in {meeting.secret}: all hosts have to share the workdir, or {VARIABLE}"
        )
    seconds = max(0.1, min(meeting.remaining(), 10.0))
    connection = socket.create_connection((meeting.host, meeting.port), timeout=seconds)
    kind, value = None, None
    try:
        kind, value = _say_hello(meeting, connection, secret)
    finally:
        if kind != VALUE:
            connection.close()
    if kind == LOST:
        raise InputError(value)
    return Channel(meeting.index, value, [(0, connection)], meeting.keepalive)


def _say_hello(meeting: _Meeting, connection: socket.socket, secret: str) -> tuple[bytes, Any]:
    """Says which process this is, and returns the answer of process 0.

    Raises:
      OSError: the connection broke, or what is there is no process 0 with the secret.
    """
    # Process 0 gives up at a deadline of its own, and says so.
    deadline = meeting.deadline + ANSWER
    _, greeting = _next_message(connection, deadline)
    if not isinstance(greeting, dict) or greeting.get("magic") != MAGIC:
        raise OSError(_STRANGER)
    nonce = challenge()
    said = (meeting.index, meeting.count, meeting.name, nonce)
    hello = {
        "magic": MAGIC,
        "process": meeting.index,
        "of": meeting.count,
        "name": meeting.name,
        "nonce": nonce,
        "proof": proof(secret, greeting.get("challenge"), *said),
    }
    send(connection, VALUE, hello)
    kind, answer = _next_message(connection, deadline)
    if not isinstance(answer, dict):
        raise OSError(_STRANGER)
    value = answer.get("value")
    # Somebody else at that port cannot send this process away, either.
    if not is_proof(answer.get("proof"), secret, nonce, kind, value):
        raise OSError(_STRANGER)
    names_all = isinstance(value, list) and len(value) == meeting.count
    if not (names_all if kind == VALUE else isinstance(value, str)):
        raise OSError(_STRANGER)
    return kind, value


def _next_message(connection: socket.socket, deadline: float) -> tuple[bytes, Any]:
    """A message of process 0. Raises OSError unless one comes in time."""
    message = receive(connection, MOST_ANSWER, deadline)
    if message is None:
        raise OSError(_STRANGER)
    return message


def _answer(
    secret: str, hello: Mapping[str, Any], connection: socket.socket, kind: bytes, value: Any
) -> None:
    """Answers a process that said hello, with the proof that it asked for."""
    content = {"value": value, "proof": proof(secret, hello["nonce"], kind, value)}
    try:
        send(connection, kind, content)
        if kind == LOST:
            connection.close()
    except OSError:
        # A process that went away in the meantime is missed at the first exchange.
        pass
