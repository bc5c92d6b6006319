"""Several processes as one run: how they are started and how they agree.

Every process runs the same program over arrays that span all of them. What only one process does (writing) or what
can fail on one of them (files, signals, rewards on the host) goes through `broadcast_from_first`, `run_on_all` and
`any_process`, so that all go on or all stop. With one process each of these is a plain call.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from marble_jax.distributed.channel import LOST_STATUS, Channel, HostLost, Refused, meet
from marble_jax.distributed.cluster import Cluster
from marble_jax.errors import InputError

Value = TypeVar("Value")
_channel: Channel | None = None


@contextmanager
def process_group(
    cluster: Cluster | None,
    verb: str,
    init_timeout: float = 300.0,
    heartbeat_timeout: float = 100.0,
) -> Iterator[None]:
    """Runs the body as one process of `cluster`; `start_jax` in it, before anything touches a device.

    Of several processes, one that fails tells the others why and ends here with its line on standard error: nothing is
    left that Python's way out could wait for. With one process it is a plain context.

    Args:
      cluster: from `cluster.find_cluster`.
      verb: for messages.
      init_timeout: seconds to wait for the other processes.
      heartbeat_timeout: seconds after which a process that does not answer counts as dead.

    Raises:
      InputError: the processes did not find each other.
    """
    global _channel
    if cluster is None:
        yield
        return
    _channel = meet(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        init_timeout,
        heartbeat_timeout,
    )
    try:
        yield
    except BaseException as error:
        _end(_channel, verb, error)
    _channel.close()
    _channel = None
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def exit_unless_agreed(agreed: tuple[type[BaseException], ...], error: BaseException) -> None:
    """Ends this process here and now if it is one of several and failed on its own: tidying up would wait for others.

    Bad input is made known first, and then all processes tidy up.

    Args:
      agreed: what all processes raise together.
      error: what was raised.
    """
    if _channel is None or isinstance(error, (AgreedError, *agreed)):
        return
    if isinstance(error, InputError):
        try:
            exchange("end", None, str(error))
        except AgreedError:
            return
        except HostLost as lost:
            error = lost
    _end(_channel, "", error)


def _end(channel: Channel, verb: str, error: BaseException) -> None:
    """Says what happened and ends this process, whatever other threads wait for."""
    said = str(error) or type(error).__name__
    status = {HostLost: LOST_STATUS, KeyboardInterrupt: 130}.get(
        type(error), 2 if isinstance(error, InputError) else 1
    )
    if status == 1 and channel.loss():  # a collective that broke because another process is gone
        said, status = channel.lost, LOST_STATUS
    if status == 1:
        traceback.print_exception(error)
        said = f"{type(error).__name__}: {said.splitlines()[0]}"
    try:
        sys.stdout.flush()
        sys.stderr.write(f"marble-jax{' ' * bool(verb)}{verb}: process {channel.index}: {said}\n")
        sys.stderr.flush()
        channel.leave(
            said
            if status in (2, LOST_STATUS)
            else f"process {channel.index} ({channel.names[channel.index]}): {said}"
        )
    finally:
        os._exit(status)


def start_jax(
    cluster: Cluster | None, init_timeout: float = 300.0, heartbeat_timeout: float = 100.0
) -> None:
    """Starts JAX's distributed runtime; all processes have met, so nobody is waited for in vain.

    Raises:
      InputError: it does not start.
    """
    if cluster is None:
        return
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # SIGTERM is handled, and agreed on, by the loop
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            None if cluster.local_devices is None else list(cluster.local_devices),
            initialization_timeout=int(init_timeout),
            heartbeat_timeout_seconds=int(heartbeat_timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"distributed: expected JAX's runtime to start at {cluster.coordinator}; received "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def is_single_process() -> bool:
    """Whether this process is the whole run."""
    return _channel is None


def is_first() -> bool:
    """Whether this process writes and speaks."""
    return _channel is None or _channel.index == 0


def index() -> int:
    """Of this process, from 0."""
    return 0 if _channel is None else _channel.index


def count() -> int:
    """Of all processes."""
    return 1 if _channel is None else _channel.count


class AgreedError(InputError):
    """Bad input that one process found and all of them raise."""


def exchange(label: str, value: Any, refusal: str = "") -> list[Any]:
    """Every process's value (anything JSON knows), in their order; a list of one for a process on its own.

    Args:
      label: what it is about.
      value: of this process.
      refusal: why this process cannot go on, if it cannot; the others may then be at any other exchange.

    Raises:
      AgreedError: on every process, with the refusal of the first one that has one; it is named unless all say the same.
    """
    if _channel is None:
        return [value]
    try:
        return _channel.exchange(label, value, refusal)
    except Refused as error:
        raise AgreedError(
            error.lines[0] if len(set(error.lines)) == 1 else first_reason(error.lines)
        ) from None


def run_on_all(label: str, call: Callable[[], Value]) -> Value:
    """Calls on every process; if it finds bad input on one of them, all raise.

    Raises:
      InputError: with the line of the first process that failed, named where not all of them did.
    """
    if _channel is None:
        return call()
    result, refusal = None, ""
    try:
        result = call()
    except AgreedError:
        raise
    except (InputError, OSError) as error:
        refusal = _line(error)
    exchange(label, None, refusal)
    return result


def broadcast_from_first(label: str, call: Callable[[], Value]) -> Value:
    """The value of a call that only process 0 makes (anything JSON knows).

    Raises:
      InputError: everywhere, if it fails there.
    """
    if _channel is None:
        return call()
    result, refusal = None, ""
    if is_first():
        try:
            result = call()
        except (InputError, OSError) as error:
            refusal = _line(error)
    found = exchange(label, result, refusal)
    return result if is_first() else found[0]


def any_process(label: str, reason: str) -> str:
    """The first process's reason that is not empty, with its name where there are several; empty if there is none."""
    return reason if _channel is None else first_reason(exchange(label, reason))


def first_reason(reasons: list[str]) -> str:
    """The first of all processes' reasons that is not empty, with the process's name."""
    return next(
        (f"process {i} ({_named(i)}): {reason}" for i, reason in enumerate(reasons) if reason), ""
    )


def assert_equal(what: str, settings: Mapping[str, Any]) -> None:
    """Makes sure that all processes mean the same run.

    Args:
      what: in front of the name of what differs.
      settings: by name, anything JSON knows.

    Raises:
      InputError: everywhere, naming the first setting that differs, and where.
    """
    mine = {name: repr(value) for name, value in settings.items()}
    first, *others = exchange(f"same {what}", mine)
    for index, other in enumerate(others, 1):
        for name in sorted(set(first) | set(other)):
            if first.get(name) != other.get(name):
                received = [
                    f"{values.get(name, 'none')} on process {i} ({_named(i)})"
                    for i, values in ((0, first), (index, other))
                ]
                raise InputError(
                    f"{what}{name}: expected the same on every host; received {' and '.join(received)}"
                )


def _named(index: int) -> str:
    return _channel.names[index]


def _line(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return str(error)
