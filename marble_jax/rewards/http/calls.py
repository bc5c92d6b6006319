"""Calls to one of several replicas of a server: retries with growing and jittered pauses, few calls at a time."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from marble_jax.errors import InputError, one_line
from marble_jax.rewards.base import RewardError
from marble_jax.rewards.http.access import is_loopback
from marble_jax.rewards.http.post import (
    DEFAULT_POLICY,
    MAX_PAUSE_SECONDS,
    CallError,
    CallPolicy,
    get,
    post,
)
from marble_jax.rewards.workers.threads import Pool
from marble_jax.validation import is_host

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclasses.dataclass
class _Replica:
    """One server: calls under way, and until when (on the monotonic clock) it counts as down."""

    origin: str
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
        policy: CallPolicy = DEFAULT_POLICY,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Checks the addresses; calls nobody.

        Args:
          reward: whose calls these are, for messages.
          urls: http or https addresses; `path` is appended.
          path: of every call.
          token: sent as a bearer token; empty for none.
          policy: how long calls may take and how often they are made.
          sleep: how to pause.

        Raises:
          InputError: no address, or one that is none.
        """
        _check_addresses(reward, urls)
        if token:
            _warn_of_open_tokens(reward, urls)
        self.reward = reward
        self.policy = policy
        self._token = token
        self._sleep = sleep
        self._path = path
        self._replicas = [_Replica(url.rstrip("/")) for url in urls]
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(policy.max_in_flight)

    def call(self, body: bytes, content_type: str) -> bytes:
        """Sends `body` to the least busy replica, and again, to another if there is one, while that may help.

        Returns:
          The body of the answer.

        Raises:
          RewardError: every attempt failed, or one in a way that will not pass.
        """
        headers = {"Content-Type": content_type} | self._headers()
        return self._persist(lambda origin: post(origin + self._path, body, headers, self.policy))

    def get(self, path: str) -> bytes:
        """Asks the least busy replica for what is at `path`, as often as `call` does.

        Returns:
          The body of the answer; empty where the server refuses, as one without such a path does.

        Raises:
          RewardError: every attempt failed.
        """
        try:
            return self._persist(lambda origin: get(origin + path, self._headers(), self.policy))
        except RewardError as error:
            if isinstance(error.__cause__, CallError) and not error.__cause__.transient:
                return b""
            raise

    def _headers(self) -> dict[str, str]:
        # One call a connection: a server that restarts leaves no half-open connection behind.
        headers = {"Connection": "close"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _persist(self, send: Callable[[str], bytes]) -> bytes:
        """What `send` returns for the origin of a replica, tried again while that may help.

        Raises:
          RewardError: see `call`.
        """
        patience = self.policy.patience_seconds
        patient_until = time.monotonic() + patience
        failures, attempt = 0, 0
        while True:
            try:
                return self._try(attempt, send)
            except CallError as error:
                problem = error
            attempt += 1
            # A server that is busy is well, and loses no score; attempts count against one that is not.
            failures += not problem.is_busy
            has_patience = patience > 0 and time.monotonic() < patient_until
            if failures > self.policy.retries or not problem.transient:
                break
            if attempt > self.policy.retries and not has_patience:
                break
            patience -= self._wait_for_replica(attempt - 1, problem)
        raise RewardError(
            f"{problem} (attempt {attempt} of {max(attempt, self.policy.retries + 1)})"
        ) from problem

    def map(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> list[Answer | Exception]:
        """`function` of every item, several at a time; an exception in place of a value where one was raised."""

        def guarded(item: Item) -> Answer | Exception:
            try:
                return function(item)
            # Told apart by the caller, who may do with some of the answers.
            except Exception as error:
                return error

        # A thread would gain nothing for a single call.
        if len(items) < 2:
            return [guarded(item) for item in items]
        pool = Pool(min(len(items), self.policy.max_in_flight), f"calls of {self.reward}")
        try:
            futures = [pool.submit(guarded, item) for item in items]
            return [pool.result(future) for future in futures]
        finally:
            pool.close()

    def _try(self, attempt: int, send: Callable[[str], bytes]) -> bytes:
        """One attempt; a replica that may recover counts as down for a while after a failure."""
        with self._chosen() as replica:
            try:
                return send(replica.origin)
            except CallError as error:
                if error.transient:
                    pause = max(error.pause_seconds, self._pause(attempt))
                    replica.down_until = time.monotonic() + pause
                raise

    def _wait_for_replica(self, attempt: int, problem: CallError) -> float:
        """Pauses before another attempt, unless a replica is up; returns the seconds."""
        now = time.monotonic()
        if any(replica.down_until <= now for replica in self._replicas):
            return 0.0
        pause = min(MAX_PAUSE_SECONDS, max(problem.pause_seconds, self._pause(attempt)))
        self._sleep(pause)
        return pause

    def _pause(self, attempt: int) -> float:
        # Bounded before it is a power: a patient client may come to a thousand attempts.
        growing = min(MAX_PAUSE_SECONDS, self.policy.pause_seconds * 2 ** min(attempt, 16))
        # Clients that failed together should not come back together.
        return growing * random.uniform(0.5, 1.5)

    @contextmanager
    def _chosen(self) -> Iterator[_Replica]:
        """The replica to ask: one that is not down, else the first to come up; the least busy among equals."""
        with self._slots:
            with self._lock:
                now = time.monotonic()

                def rank(replica: _Replica) -> tuple[float, int]:
                    # Since when a replica is up does not matter, so all that are up are equal here.
                    return max(replica.down_until, now), replica.busy

                replica = min(self._replicas, key=rank)
                replica.busy += 1
            try:
                yield replica
            finally:
                with self._lock:
                    replica.busy -= 1


def require_an_answer(reward: str, answers: Sequence[Any], where: str) -> None:
    """Checks that not every call failed; some that did are logged.

    Args:
      reward: whose calls these were.
      answers: from `Replicas.map`.
      where: format of the log for the number of failures and of all, such as "in %d of %d calls".

    Raises:
      Exception: the last error, if there is nothing but errors.
    """
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    if not errors:
        return
    if len(errors) == len(answers):
        raise errors[-1]
    counts = where % (len(errors), len(answers))
    log.warning("reward %s failed %s: %s", reward, counts, one_line(errors[-1]))


def _check_addresses(reward: str, urls: Sequence[str]) -> None:
    # A single text is a sequence of texts as well, one a letter.
    listed = bool(urls) and not isinstance(urls, str)
    if not listed or any(not isinstance(url, str) for url in urls):
        raise InputError(
            f"reward {reward}: expected urls as a list of addresses; received {urls!r}"
        )
    for url in urls:
        if not _is_address(url):
            raise InputError(
                f"reward {reward}: expected an address such as http://127.0.0.1:8810; received "
                f"{url!r}"
            )


def _is_address(url: str) -> bool:
    # Ends of lines are left out without a word where an address is taken apart.
    if not url.isprintable():
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    # A port that is no number or too large, or brackets that do not close.
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not is_host(parts.hostname or "") or port == 0:
        return False
    # The path is appended, so nothing may come after it; and a user name would not be sent.
    return not (parts.query or parts.fragment or parts.username)


def _warn_of_open_tokens(reward: str, urls: Sequence[str]) -> None:
    for url in urls:
        if _can_be_overheard(url):
            log.warning(
                "reward %s: the token goes to %s unencrypted; https or a tunnel would hide it",
                reward,
                url,
            )


def _can_be_overheard(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")
