"""Several processes as one run: how they are started and how they agree.

Every process runs the same program over arrays that span all of them. What only one process does (writing) or what
can fail on one of them (files, signals, rewards on the host) goes through `broadcast_from_first`, `run_on_all` and
`any_process`, so that all go on or all stop. With one process each of these is a plain call.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

import jax

from marble_jax.distributed.channel import LOST_STATUS, Channel, HostLost, Refused, SingleProcess
from marble_jax.distributed.cluster_detection import Cluster
from marble_jax.distributed.rendezvous import rendezvous
from marble_jax.distributed.secret import Secret
from marble_jax.errors import InputError, one_line
from marble_jax.process_end import end_process

Value = TypeVar("Value")
_STATUSES: tuple[tuple[type[BaseException], int], ...] = (
    (HostLost, LOST_STATUS),
    (KeyboardInterrupt, 130),  # 128 + SIGINT, as shells have it
    (InputError, 2),
)
_channel: Channel | SingleProcess = SingleProcess()


@contextmanager
def process_group(
    cluster: Cluster | None,
    verb: str,
    init_timeout: float = 300.0,
    heartbeat_timeout: float = 100.0,
    secret: Secret | None = None,
) -> Iterator[None]:
    """Runs the body as one process of `cluster`; `start_jax` in it, before anything touches a device.

    Of several processes, one that fails tells the others why and ends here with its line on standard error: nothing is
    left that Python's way out could wait for. With one process it is a plain context.

    Args:
      cluster: from `cluster.find_cluster`.
      verb: for messages.
      init_timeout: seconds to wait for the other processes.
      heartbeat_timeout: seconds after which a process that does not answer counts as dead.
      secret: of the run, which keeps others out.

    Raises:
      InputError: the processes did not find each other.
    """
    global _channel
    if cluster is None:
        yield
        return
    _channel = rendezvous(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        init_timeout,
        heartbeat_timeout,
        secret=secret,
    )
    try:
        yield
    except BaseException as error:
        _end(_channel, verb, error)
    _channel.close()
    _channel = SingleProcess()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def exit_unless_agreed(agreed: tuple[type[BaseException], ...], error: BaseException) -> None:
    """Ends this process here and now if it is one of several and failed on its own: tidying up would wait for others.

    Bad input is made known first, and then all processes tidy up.

    Args:
      agreed: exceptions that all processes raise together.
      error: the exception that was raised.
    """
    if isinstance(_channel, SingleProcess) or isinstance(error, (AgreedError, *agreed)):
        return
    if isinstance(error, InputError):
        try:
            exchange("end", None, str(error))
        except AgreedError:
            return
        except HostLost as lost:
            error = lost
    _end(_channel, "", error)


def _end(channel: Channel, verb: str, error: BaseException) -> NoReturn:
    """Says what happened and ends this process, whatever other threads wait for."""
    status, message = _diagnose(channel, error)
    try:
        sys.stdout.flush()
        program = " ".join(("marble-jax", verb)).strip()
        sys.stderr.write(f"{program}: process {channel.index}: {message}\n")
        sys.stderr.flush()
        # Bad input and losses name their process already, or concern all of them.
        if status not in (2, LOST_STATUS):
            message = f"process {channel.index} ({channel.names[channel.index]}): {message}"
        channel.leave(message)
    finally:
        # Python's own way out would wait for threads that wait for processes that are gone. The others have left by
        # now: nobody writes to what this process lets go of.
        end_process(status)


def _diagnose(channel: Channel, error: BaseException) -> tuple[int, str]:
    """Exit status and line for an error; the traceback is printed where nothing else explains it."""
    status = _exit_status(error)
    if status != 1:
        return status, str(error) or type(error).__name__
    if channel.loss():
        # A collective breaks here when another process is gone, which is then the cause.
        return LOST_STATUS, channel.lost
    traceback.print_exception(error)
    return status, one_line(error, 200)


def _exit_status(error: BaseException) -> int:
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return 1


def start_jax(
    cluster: Cluster | None, init_timeout: float = 300.0, heartbeat_timeout: float = 100.0
) -> None:
    """Starts JAX's distributed runtime; all processes have met, so nobody is waited for in vain.

    Args:
      cluster: from `cluster.find_cluster`; None starts nothing.
      init_timeout: seconds the runtime may take to connect.
      heartbeat_timeout: seconds after which a process that does not answer counts as dead.

    Raises:
      InputError: the runtime does not start.
    """
    if cluster is None:
        return
    # SIGTERM is handled, and agreed on, by the training loop; JAX's service would take it away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            cluster.local_devices,
            initialization_timeout=int(init_timeout),
            heartbeat_timeout_seconds=int(heartbeat_timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"distributed: expected JAX's runtime to start at {cluster.coordinator}; received "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def is_single_process() -> bool:
    """Returns whether this process is the whole run."""
    return isinstance(_channel, SingleProcess)


def is_first() -> bool:
    """Returns whether this process is the one that writes and speaks."""
    return index() == 0


def index() -> int:
    """Returns the number of this process, from 0."""
    return _channel.index


def count() -> int:
    """Returns the number of all processes."""
    return _channel.count


class AgreedError(InputError):
    """Bad input that one process found and all of them raise."""


def exchange(label: str, value: Any, refusal: str = "") -> list[Any]:
    """Returns every process's value, in their order; a list of one for a process on its own.

    Args:
      label: what the exchange is about; the same everywhere.
      value: of this process; anything JSON knows.
      refusal: why this process cannot go on, if it cannot; the others may then be at any other exchange.

    Raises:
      AgreedError: on every process, with the refusal of the first one that has one; that process is named unless all
        say the same.
    """
    try:
        return _channel.exchange(label, value, refusal)
    except Refused as error:
        raise AgreedError(_agreed_line(error.lines)) from None


def _agreed_line(lines: list[str]) -> str:
    # Where every process says the same, no process is the cause.
    if len(set(lines)) == 1:
        return lines[0]
    return first_reason(lines)


def run_on_all(label: str, call: Callable[[], Value]) -> Value:
    """Returns the value of a call that every process makes; if one of them finds bad input, all raise.

    Args:
      label: what the call is about; the same everywhere.
      call: without collectives over devices, as another process may have failed before them.

    Raises:
      InputError: with the line of the first process that failed, named where not all of them did.
    """
    if is_single_process():
        return call()
    value, refusal = _attempt(call)
    exchange(label, None, refusal)
    # A refusal was raised by the exchange, so that there is a value here.
    return cast(Value, value)


def broadcast_from_first(label: str, call: Callable[[], Value]) -> Value:
    """Returns, on every process, the value of a call that only process 0 makes.

    Args:
      label: what the call is about; the same everywhere.
      call: its value is anything JSON knows.

    Raises:
      InputError: on every process, if the call fails.
    """
    if is_single_process():
        return call()
    if not is_first():
        return exchange(label, None)[0]
    value, refusal = _attempt(call)
    exchange(label, value, refusal)
    # Process 0 keeps its own value, which JSON has not changed; a refusal was raised by the exchange.
    return cast(Value, value)


def _attempt(call: Callable[[], Value]) -> tuple[Value | None, str]:
    """The value of a call, and why this process cannot go on where the call finds bad input."""
    try:
        return call(), ""
    except AgreedError:
        # The others raise it as well, and are at no exchange that could be answered.
        raise
    except (InputError, OSError) as error:
        return None, _line(error)


def any_process(label: str, reason: str) -> str:
    """Returns the first process's reason that is not empty, with its name where there are several processes.

    Args:
      label: what the reasons are about; the same everywhere.
      reason: of this process; empty for none.
    """
    if is_single_process():
        return reason
    return first_reason(exchange(label, reason))


def first_reason(reasons: list[str]) -> str:
    """Returns the first of all processes' reasons that is not empty, with the process's name; empty without any."""
    for process, reason in enumerate(reasons):
        if reason:
            return f"process {process} ({_host_name(process)}): {reason}"
    return ""


def assert_equal(what: str, settings: Mapping[str, Any]) -> None:
    """Makes sure that all processes mean the same run.

    Args:
      what: in front of the name of a setting that differs.
      settings: by name, anything JSON knows.

    Raises:
      InputError: everywhere, naming the first setting that differs, and where.
    """
    texts = {name: repr(value) for name, value in settings.items()}
    reference, *others = exchange(f"same {what}", texts)
    for process, received in enumerate(others, 1):
        name = _first_difference(reference, received)
        if name is not None:
            raise InputError(
                f"{what}{name}: expected the same on every host; received "
                f"{reference.get(name, 'none')} on process 0 ({_host_name(0)}) and "
                f"{received.get(name, 'none')} on process {process} ({_host_name(process)})"
            )


def _first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    for name in sorted(set(one) | set(other)):
        if one.get(name) != other.get(name):
            return name
    return None


def _host_name(process: int) -> str:
    return _channel.names[process]


def _line(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return str(error)
