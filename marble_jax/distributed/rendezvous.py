"""Rendezvous: the processes of a run meet at the coordinator's address before JAX opens its own service there.

Process 0 listens until all others have said which one they are; then each of them has a `Channel`, or all of those that
came have the same line that says who is missing or does not fit.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterable
from typing import Any

from marble_jax.distributed.channel import Channel
from marble_jax.distributed.wire import LOST, VALUE, listen, receive, send
from marble_jax.errors import InputError
from marble_jax.validation import is_digits

RETRY = 0.25
"""Seconds between two attempts to reach process 0."""
ANSWER = 2.0
"""Seconds beyond its own deadline that a process waits for the line of process 0, whose deadline is another."""
HELLO_TIMEOUT = 5.0
"""Seconds for a new connection to say which process it is."""
NAMED = 8
"""Processes that an error names at most."""
_MAGIC = "marble_jax channel 1"
_HELLO_TYPES = (("process", int), ("of", int), ("name", str))


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
    """

    host: str
    port: int
    count: int
    index: int
    name: str
    timeout: float
    deadline: float
    keepalive: float

    def remaining(self) -> float:
        """Returns the seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())


def rendezvous(
    address: str, count: int, index: int, timeout: float, keepalive: float = 60.0, name: str = ""
) -> Channel:
    """Waits until all processes are there, and returns the channel between them.

    Args:
      address: HOST:PORT of process 0.
      count: of processes.
      index: of this one.
      timeout: seconds to wait for the others.
      keepalive: seconds after which a host that answers nothing any more counts as lost.
      name: of this host; its own by default.

    Raises:
      InputError: they did not all come in time, or do not agree on how many they are. Every process that is there
        says so.
    """
    host, port = split_address(address)
    name = name or socket.gethostname()
    deadline = time.monotonic() + timeout
    meeting = _Meeting(host, port, count, index, name, timeout, deadline, keepalive)
    if index == 0:
        return _admit_all(meeting)
    return _join(meeting)


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT or [IPV6]:PORT.

    Raises:
      InputError: another form.
    """
    host, _, port = address.strip().rpartition(":")
    if not host or not is_digits(port) or not 0 < int(port) < 65536:
        raise InputError(
            f"--coordinator: expected HOST:PORT of process 0, such as 10.0.0.2:8476; received {address!r}"
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
    arrived: dict[int, tuple[str, socket.socket]] = {}
    problem = ""
    with _open(meeting) as listener:
        while len(arrived) < meeting.count - 1 and not problem:
            problem = _admit_one(meeting, listener, arrived)
    connections = {index: connection for index, (_, connection) in sorted(arrived.items())}
    if problem:
        _answer(connections.values(), LOST, problem)
        raise InputError(problem)
    names = [meeting.name, *(arrived[index][0] for index in connections)]
    _answer(connections.values(), VALUE, names)
    return Channel(0, names, list(connections.items()), meeting.keepalive)


def _open(meeting: _Meeting) -> socket.socket:
    try:
        return listen(meeting.port)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--coordinator: expected port {meeting.port} to be free on process 0 ({meeting.name}); received "
            f"{reason}; choose another one"
        ) from None


def _admit_one(
    meeting: _Meeting, listener: socket.socket, arrived: dict[int, tuple[str, socket.socket]]
) -> str:
    """Waits for one connection and adds it to `arrived` if it is a process of the run.

    Returns:
      Why the run cannot start; empty while it can.
    """
    listener.settimeout(max(0.01, meeting.remaining()))
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return _who_is_missing(meeting, arrived)
    hello = _read_hello(connection)
    if hello is None:
        # Somebody else's connection, such as a port scan's, takes no place.
        connection.close()
        return ""
    problem = _misfit(meeting, hello, arrived)
    if problem:
        _answer([connection], LOST, problem)
    else:
        arrived[hello["process"]] = (hello["name"], connection)
    return problem


def _who_is_missing(meeting: _Meeting, arrived: dict[int, tuple[str, socket.socket]]) -> str:
    missing = [str(index) for index in range(1, meeting.count) if index not in arrived]
    listed = ", ".join(missing[:NAMED])
    if len(missing) > NAMED:
        listed += " and more"
    return (
        f"distributed: expected {meeting.count} processes at port {meeting.port} of process 0 ({meeting.name}) "
        f"within {meeting.timeout:g} s; received none from process {listed}: are they running, with this address "
        f"and --num_processes={meeting.count}?"
    )


def _misfit(
    meeting: _Meeting, hello: dict[str, Any], arrived: dict[int, tuple[str, socket.socket]]
) -> str:
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
        return f"{expected} and from {arrived[index][0]}"
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
    seconds = max(0.1, min(meeting.remaining(), 10.0))
    connection = socket.create_connection((meeting.host, meeting.port), timeout=seconds)
    kind, value = None, None
    try:
        kind, value = _say_hello(meeting, connection)
    finally:
        if kind != VALUE:
            connection.close()
    if kind == LOST:
        raise InputError(value)
    return Channel(meeting.index, value, [(0, connection)], meeting.keepalive)


def _say_hello(meeting: _Meeting, connection: socket.socket) -> tuple[bytes, Any]:
    """Says which process this is, and returns the answer of process 0.

    Raises:
      OSError: the connection broke, or ended without an answer.
    """
    hello = {
        "magic": _MAGIC,
        "process": meeting.index,
        "of": meeting.count,
        "name": meeting.name,
    }
    send(connection, VALUE, hello)
    # Process 0 gives up at a deadline of its own, and says so.
    connection.settimeout(meeting.remaining() + ANSWER)
    answer = receive(connection)
    if answer is None:
        raise OSError("another program, or a process 0 that stopped, at that port")
    return answer


def _read_hello(connection: socket.socket) -> dict[str, Any] | None:
    """What a process says when it arrives; None for a stranger."""
    connection.settimeout(HELLO_TIMEOUT)
    try:
        message = receive(connection)
    except OSError:
        return None
    if message is None:
        return None
    return message[1] if _is_hello(message[1]) else None


def _is_hello(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("magic") != _MAGIC:
        return False
    return all(isinstance(value.get(key), kind) for key, kind in _HELLO_TYPES)


def _answer(connections: Iterable[socket.socket], kind: bytes, value: Any) -> None:
    for connection in connections:
        try:
            send(connection, kind, value)
            if kind == LOST:
                connection.close()
        except OSError:
            # A process that went away in the meantime is missed at the first exchange.
            continue
