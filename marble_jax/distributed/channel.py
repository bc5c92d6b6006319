"""How the processes of one run find each other and agree: small values over TCP, with process 0 in the middle.

Beside JAX's own runtime for three reasons. JAX has no way to say who is missing: where nobody listens its client tries
for ever, and where somebody does not come it aborts. Agreement must not ride on the devices: a host that failed before
it launched a program would leave the others waiting in a collective. And a socket tells within milliseconds that a
process was killed, whatever the main thread is waiting for.

The processes meet at the coordinator's address before JAX opens its service there; the connections stay open next to
it. Whoever leaves without a farewell is lost, and everyone else ends with one line: at once where the main thread asks,
after `GRACE` seconds where it hangs in a collective.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from marble_jax.distributed.wire import BYE, LOST, VALUE, Peer, keep_alive, listen, receive, send
from marble_jax.errors import InputError

GRACE = 10.0
"""Seconds between the loss of a process and the end of one that does not notice by itself."""
LINGER = GRACE + 2.0
"""Seconds process 0 stays for the others at most when the run failed."""
NOTICE = 5.0
"""Seconds for the loss of a process to show here, where a collective that broke may be the first sign of it."""
PATIENCE = 3600.0
"""Seconds a process that is alive may keep the others waiting."""
LOST_STATUS = 75
"""Exit status when another process was lost: the same command may be tried again. Source: EX_TEMPFAIL of sysexits.h."""
_RETRY, _ANSWER = 0.25, 2.0
_MAGIC = "marble_jax channel 1"


class HostLost(Exception):
    """Another process ended or failed, so this one cannot go on; the message is one line."""


class Refused(Exception):
    """Some processes found that the run cannot go on; all of them learn it at the same exchange.

    Attributes:
      lines: why, by process; empty for those that found nothing.
    """

    def __init__(self, lines: Sequence[str]):
        super().__init__(next(line for line in lines if line))
        self.lines = list(lines)


class Channel:
    """The open connections of one process; from `meet`.

    Attributes:
      index: of this process.
      count: of all processes.
      names: host names by process.
      lost: the line that says who is lost; empty while nobody is.
    """

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        connections: Sequence[tuple[int, socket.socket]],
        keepalive: float,
    ):
        self.index, self.count, self.names, self.lost = index, len(names), tuple(names), ""
        self._closed, self._lock, self._noticed = False, threading.Lock(), threading.Event()
        self._peers = []
        for other, connection in sorted(connections, key=lambda pair: pair[0]):
            connection.settimeout(None)
            keep_alive(connection, keepalive)
            self._peers.append(Peer(other, names[other], connection))
        self._readers = [
            threading.Thread(target=peer.read, args=(self._give_up,), name=f"{peer}", daemon=True)
            for peer in self._peers
        ]
        for reader in self._readers:
            reader.start()

    def exchange(self, label: str, value: Any, refusal: str = "") -> list[Any]:
        """Every process's value, in their order.

        All processes have to call it in the same order, but for one that refuses to go on: it may be anywhere.

        Args:
          label: what this is about; the same everywhere.
          value: anything JSON knows.
          refusal: why this process cannot go on.

        Raises:
          Refused: on every process, if one of them does.
          HostLost: a process ended, did something else, or kept the others waiting too long.
        """
        mine = {"label": label, "value": value, "refusal": refusal}
        if self.index:
            self._peers[0].send(VALUE, mine)
            answer = self._next(self._peers[0])
        else:
            found = [mine] + [self._next(peer) for peer in self._peers]
            refusals = [one["refusal"] for one in found]
            strays = (
                [] if any(refusals) else [i for i, one in enumerate(found) if one["label"] != label]
            )
            if strays:
                self.fail(
                    f"expected every process at {label!r}; received process {strays[0]} at "
                    f"{found[strays[0]]['label']!r}"
                )
            answer = {"refusals": refusals, "values": [one["value"] for one in found]}
            for peer in self._peers:
                peer.send(VALUE, answer)
        if any(answer["refusals"]):
            raise Refused(answer["refusals"])
        return answer["values"]

    def loss(self) -> str:
        """`lost`, after up to `NOTICE` seconds if need be: for a failure that another process's end may have caused."""
        self._noticed.wait(NOTICE)
        return self.lost

    def fail(self, line: str) -> None:
        """Tells the others that this process cannot go on, and why.

        Raises:
          HostLost: always, with that line.
        """
        line = f"process {self.index} ({self.names[self.index]}): {line}"
        self.leave(line)
        raise HostLost(line)

    def leave(self, line: str) -> None:
        """As `fail`, for a process that ends by itself.

        Process 0 comes back when the others have gone, or should have: JAX aborts them when its service ends.
        """
        with self._lock:
            self._closed, self.lost = True, self.lost or line
        self._noticed.set()
        for peer in self._peers:
            peer.send(LOST, line)
        end = time.monotonic() + LINGER
        for reader in self._readers if not self.index else ():
            reader.join(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Says farewell; nobody is missed after that."""
        with self._lock:
            self._closed = True
        for peer in self._peers:
            peer.send(BYE, None)
        for peer in self._peers:
            peer.close()

    def _next(self, peer: Peer) -> Any:
        try:  # what came before the loss counts
            kind, value = peer.messages.get(timeout=0 if self.lost else PATIENCE)
        except queue.Empty:
            if self.lost:
                raise HostLost(self.lost) from None
            self.fail(f"expected {peer} within {PATIENCE:g} s; received nothing")
        if kind == BYE:
            self.fail(f"expected {peer} to go on; received its farewell")
        if kind == LOST:
            raise HostLost(self.lost)
        return value

    def _give_up(self, peer: Peer, line: str) -> None:
        """In the reading thread: notes who is lost, wakes the main thread, and ends the process if that does not."""
        with self._lock:
            if self._closed or self.lost:
                return
            self.lost = line
        self._noticed.set()
        for other in self._peers:
            if other is not peer and not self.index:
                other.send(LOST, line)
            other.messages.put((LOST, line))
        timer = threading.Timer(GRACE, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        if not self._closed:
            sys.stderr.write(f"marble-jax: process {self.index}: {self.lost}\n")
            sys.stderr.flush()
            os._exit(LOST_STATUS)


def meet(
    address: str, count: int, index: int, timeout: float, keepalive: float = 60.0, name: str = ""
) -> Channel:
    """Waits until all processes are there.

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
    if index:
        return _join(host, port, count, index, timeout, deadline, keepalive, name)
    return _gather(port, count, timeout, deadline, keepalive, name)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT.

    Raises:
      InputError: another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            f"--coordinator: expected HOST:PORT of process 0, such as 10.0.0.2:8476; received {address!r}"
        )
    return host.strip("[]"), int(port)


def _gather(
    port: int, count: int, timeout: float, deadline: float, keepalive: float, name: str
) -> Channel:
    """Process 0: takes the others in, and tells all of them how it went."""
    try:
        listener = listen(port)
    except OSError as error:
        raise InputError(
            f"--coordinator: expected port {port} to be free on process 0 ({name}); received "
            f"{error.strerror or error}; choose another one"
        ) from None
    arrived: dict[int, tuple[str, socket.socket]] = {}
    problem = ""
    with listener:
        while len(arrived) < count - 1 and not problem:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, count) if i not in arrived]
                problem = (
                    f"distributed: expected {count} processes at port {port} of process 0 ({name}) within "
                    f"{timeout:g} s; received none from process {', '.join(missing[:8])}"
                    f"{' and more' if len(missing) > 8 else ''}: are they running, with this address and "
                    f"--num_processes={count}?"
                )
                break
            hello = _hello(connection)
            if hello is None:  # somebody else's
                connection.close()
                continue
            other = hello["process"]
            if hello["of"] != count:
                problem = (
                    f"--num_processes: expected the same on every host; received {count} on process 0 ({name}) "
                    f"and {hello['of']} on process {other} ({hello['name']})"
                )
            elif other in arrived or not 0 < other < count:
                problem = (
                    f"--process_id: expected 0 to {count - 1}, each once; received {other} from "
                    f"{hello['name']}"
                    + (f" and from {arrived[other][0]}" if other in arrived else "")
                )
            if problem:
                _answer([connection], LOST, problem)
            else:
                arrived[other] = (hello["name"], connection)
    connections = [connection for _, connection in arrived.values()]
    if problem:
        _answer(connections, LOST, problem)
        raise InputError(problem)
    names = [name] + [arrived[i][0] for i in range(1, count)]
    _answer(connections, VALUE, names)
    return Channel(0, names, [(i, arrived[i][1]) for i in arrived], keepalive)


def _join(
    host: str,
    port: int,
    count: int,
    index: int,
    timeout: float,
    deadline: float,
    keepalive: float,
    name: str,
) -> Channel:
    """Another process: knocks until process 0 opens, then waits until it says that all are there."""
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, min(left, 10.0)))
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            time.sleep(min(_RETRY, max(0.0, left)))
            continue
        try:
            send(connection, VALUE, {"magic": _MAGIC, "process": index, "of": count, "name": name})
            # Process 0 gives up at a time of its own, and says so.
            connection.settimeout(max(0.0, deadline - time.monotonic()) + _ANSWER)
            answer = receive(connection)
        except OSError as error:
            answer, reason = None, str(error) or type(error).__name__
        if answer is not None and answer[0] == VALUE:
            return Channel(index, answer[1], [(0, connection)], keepalive)
        connection.close()
        if answer is not None and answer[0] == LOST:
            raise InputError(answer[1])
        reason = reason or "another program, or a process 0 that stopped, at that port"
        time.sleep(_RETRY)
    raise InputError(
        f"--coordinator: expected process 0 at {host}:{port} within {timeout:g} s; received none "
        f"({reason}): is process 0 running there, and is the port open between the hosts?"
    )


def _hello(connection: socket.socket) -> dict[str, Any] | None:
    """What a process says when it arrives; None for a stranger."""
    connection.settimeout(5.0)
    try:
        message = receive(connection)
    except OSError:
        return None
    hello = message[1] if message else None
    if not isinstance(hello, dict) or hello.get("magic") != _MAGIC:
        return None
    return (
        hello
        if all(
            isinstance(hello.get(k), kind)
            for k, kind in (("process", int), ("of", int), ("name", str))
        )
        else None
    )


def _answer(connections: Sequence[socket.socket], kind: bytes, value: Any) -> None:
    for connection in connections:
        try:
            send(connection, kind, value)
            if kind == LOST:
                connection.close()
        except OSError:
            continue
