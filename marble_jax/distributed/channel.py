"""Channel between the processes of one run: small values over TCP, with process 0 in the middle.

The channel is beside JAX's own runtime for three reasons. JAX has no way to say who is missing: where nobody listens
its client tries for ever, and where somebody does not come it aborts. Agreement must not ride on the devices: a host
that failed before it launched a program would leave the others waiting in a collective. And a socket tells within
milliseconds that a process was killed, whatever the main thread is waiting for.

The connections come from `rendezvous` and stay open next to JAX's service. A process that leaves without a farewell is
lost, and every other one ends with one line: at once where its main thread asks, after `GRACE` seconds where its main
thread hangs in a collective.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from marble_jax.distributed.wire import BYE, LOST, VALUE, Peer, keep_alive
from marble_jax.process_end import end_process
from marble_jax.validation import short

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
    """The open connections of one process, made by `rendezvous`.

    Args:
      index: of this process.
      names: host names by process.
      connections: (index, socket) of the processes that this one talks to: all others for process 0, that one for them.
      keepalive: seconds after which a host that answers nothing any more counts as lost.

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
        self.index = index
        self.count = len(names)
        self.names = tuple(names)
        self.lost = ""
        self._closed = False
        self._lock = threading.Lock()
        self._noticed = threading.Event()
        self._peers: list[Peer] = []
        for peer_index, connection in sorted(connections, key=lambda pair: pair[0]):
            connection.settimeout(None)
            keep_alive(connection, keepalive)
            self._peers.append(Peer(peer_index, names[peer_index], connection))
        self._readers: list[threading.Thread] = []
        # Readers start when all peers are known: the loss of one is told to the others.
        for peer in self._peers:
            reader = threading.Thread(
                target=peer.read, args=(self._note_loss,), name=f"{peer}", daemon=True
            )
            self._readers.append(reader)
        for reader in self._readers:
            reader.start()

    def exchange(self, label: str, value: Any, refusal: str = "") -> list[Any]:
        """Returns every process's value, in their order.

        All processes have to call it in the same order, but for one that refuses to go on, which may be anywhere.

        Args:
          label: what the exchange is about; the same everywhere.
          value: anything JSON knows.
          refusal: why this process cannot go on.

        Raises:
          Refused: on every process, if one of them refuses.
          HostLost: a process ended, was at another exchange, or kept the others waiting too long.
        """
        contribution = {"label": label, "value": value, "refusal": refusal}
        if self.index == 0:
            answer = self._collect(contribution)
        else:
            self._peers[0].send(VALUE, contribution)
            answer = self._next_object(self._peers[0], {"refusals": list, "values": list})
        if any(answer["refusals"]):
            raise Refused(answer["refusals"])
        return answer["values"]

    def _collect(self, contribution: dict[str, Any]) -> dict[str, Any]:
        """On process 0: what all processes contribute, sent back to each of them."""
        contributions = [contribution]
        for peer in self._peers:
            contributions.append(self._next_object(peer, {"label": str, "refusal": str}))
        refusals = [one["refusal"] for one in contributions]
        # A process that refuses may be at any exchange, so labels have to agree only where none does.
        if not any(refusals):
            self._check_labels([one["label"] for one in contributions])
        answer = {"refusals": refusals, "values": [one.get("value") for one in contributions]}
        self._send_all(VALUE, answer)
        return answer

    def _send_all(self, kind: bytes, value: Any) -> None:
        for peer in self._peers:
            peer.send(kind, value)

    def _check_labels(self, labels: list[str]) -> None:
        for index, label in enumerate(labels):
            if label != labels[0]:
                self.fail(
                    f"expected every process at {labels[0]!r}; received process {index} at {label!r}"
                )

    def loss(self) -> str:
        """Returns `lost`, after up to `NOTICE` seconds if nobody is lost yet.

        A process that ended may be the cause of a failure here, and its end show a moment later.
        """
        self._noticed.wait(NOTICE)
        return self.lost

    def fail(self, line: str) -> NoReturn:
        """Tells the others that this process cannot go on, and why.

        Raises:
          HostLost: always, with that line.
        """
        line = f"process {self.index} ({self.names[self.index]}): {line}"
        self.leave(line)
        raise HostLost(line)

    def leave(self, line: str) -> None:
        """Tells the others that this process ends, and why.

        Process 0 comes back when the others have gone, or should have: JAX aborts them when its service ends.

        Args:
          line: the reason, with the process that is its cause.
        """
        with self._lock:
            self._closed = True
            self.lost = self.lost or line
        self._noticed.set()
        self._send_all(LOST, line)
        if self.index == 0:
            self._linger()

    def _linger(self) -> None:
        """Waits until the others have closed their connections, `LINGER` seconds at most."""
        deadline = time.monotonic() + LINGER
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Says farewell; nobody is missed after that."""
        with self._lock:
            self._closed = True
        # All farewells before the first end of a connection, which could be taken for a loss.
        self._send_all(BYE, None)
        for peer in self._peers:
            peer.close()

    def _next_object(self, peer: Peer, fields: dict[str, type]) -> dict[str, Any]:
        """The next value of a process, an object with these fields.

        Raises:
          HostLost: as `_next`, or the value is something else.
        """
        value = self._next(peer)
        for name, kind in fields.items():
            if not isinstance(value, dict) or not isinstance(value.get(name), kind):
                self.fail(f"expected {name} from {peer}; received {short(value)}")
        return value

    def _next(self, peer: Peer) -> Any:
        """The next value of a process, waiting for it.

        Raises:
          HostLost: a process is lost, or that one said farewell or nothing.
        """
        # Values that came before a loss count, so that all processes stop at the same exchange.
        patience = 0 if self.lost else PATIENCE
        try:
            kind, value = peer.messages.get(timeout=patience)
        except queue.Empty:
            if self.lost:
                raise HostLost(self.lost) from None
            self.fail(f"expected {peer} within {PATIENCE:g} s; received nothing")
        if kind == BYE:
            self.fail(f"expected {peer} to go on; received its farewell")
        if kind == LOST:
            raise HostLost(self.lost)
        return value

    def _note_loss(self, lost_peer: Peer, line: str) -> None:
        """In a reading thread: notes who is lost, wakes the main thread, and ends the process if that does not."""
        with self._lock:
            if self._closed or self.lost:
                return
            self.lost = line
        self._noticed.set()
        if self.index == 0:
            self._pass_on(lost_peer, line)
        for peer in self._peers:
            # Wakes the main thread, whichever process it is waiting for.
            peer.messages.put((LOST, line))
        timer = threading.Timer(GRACE, self._end)
        timer.daemon = True
        timer.start()

    def _pass_on(self, lost_peer: Peer, line: str) -> None:
        for peer in self._peers:
            if peer is not lost_peer:
                peer.send(LOST, line)

    def _end(self) -> None:
        if self._closed:
            return
        sys.stderr.write(f"marble-jax: process {self.index}: {self.lost}\n")
        # The main thread may hang in a collective, which no exception of Python reaches.
        end_process(LOST_STATUS)


class SingleProcess:
    """In place of a channel where this process is the whole run: what it exchanges comes straight back.

    Attributes:
      index: of this process.
      count: of all processes.
      names: host names by process.
    """

    index = 0
    count = 1
    names = ("this host",)

    def exchange(self, label: str, value: Any, refusal: str = "") -> list[Any]:
        """Returns a list of the value; arguments as those of a channel."""
        return [value]
