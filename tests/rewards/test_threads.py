"""Threads for calls that may not return: order, errors, giving up, closing."""

import threading

import pytest

from marble_jax.rewards.base import RewardError
from marble_jax.rewards.workers import threads
from marble_jax.rewards.workers.threads import Expired, Pool


def named(name):
    return [t for t in threading.enumerate() if t.name == name]


def test_results_and_errors_come_back():
    pool = Pool(2, "returns")
    futures = [pool.submit(lambda a, b: a // b, 6, b) for b in (1, 2, 0)]
    assert [pool.result(f) for f in futures[:2]] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        pool.result(futures[2], 10)
    pool.close()
    assert not named("returns")
    with pytest.raises(RewardError, match="expected an open pool; received a call after closing"):
        pool.submit(print)


def test_a_lost_thread_is_replaced_and_ends_when_its_call_does():
    pool, release = Pool(1, "lost"), threading.Event()
    hung = pool.submit(release.wait, 30)
    with pytest.raises(Expired, match="no answer within 0.05 s"):
        pool.result(hung, 0.05)
    assert pool.lost == 1 and pool.result(pool.submit(lambda: 7), 10) == 7
    stuck = [t for t in named("lost") if t not in pool._threads]
    assert len(stuck) == 1 and stuck[0].daemon
    release.set()
    stuck[0].join(10)
    assert pool.lost == 0 and isinstance(hung.exception(), Expired)
    pool.close()


def test_time_in_the_queue_does_not_count():
    """The second call waits behind the first for longer than a call may run, and is not given up for that."""
    pool, release, begun = Pool(1, "queue"), threading.Event(), threading.Event()
    first = pool.submit(release.wait, 30)
    second = pool.submit(begun.set)
    with pytest.raises(Expired):
        pool.result(first, 0.1)
    pool.result(second, 0.1)
    assert begun.is_set()
    release.set()
    pool.close()


def test_closing_does_not_wait_for_what_hangs():
    pool, release = Pool(1, "closing"), threading.Event()
    pool.submit(release.wait, 30)
    waiting = pool.submit(lambda: 1)
    pool.close(seconds=0.05)
    assert waiting.cancelled()
    release.set()


def test_too_many_lost_threads(monkeypatch):
    monkeypatch.setattr(threads, "MAX_LOST", 1)
    pool, release = Pool(1, "many"), threading.Event()
    calls = [pool.submit(release.wait, 30) for _ in range(2)]
    with pytest.raises(Expired):
        pool.result(calls[0], 0.05)
    with pytest.raises(
        RewardError, match="expected calls to return; received 2 that hang at the same time"
    ):
        pool.result(calls[1], 0.05)
    release.set()
    pool.close()
