"""Seconds of compiling, and time left without them."""

import time

import jax
import jax.numpy as jnp
import pytest

from marble_jax import console as module
from marble_jax.compiling import compile_clock, union_seconds
from marble_jax.console import Clock


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([], 0), ([(0, 2), (0.5, 1)], 2), ([(3, 4), (0, 1)], 2), ([(0, 2), (1, 3)], 3), ([(1, 1)], 0)],
)
def test_what_runs_inside_or_beside_counts_once(spans, seconds):
    assert union_seconds(spans) == seconds


def test_a_new_program_is_heard_and_a_known_one_is_not():
    jump = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))
    x = jnp.ones((7, 7))
    compile_clock.lap()
    start = time.perf_counter()
    jump(x).block_until_ready()
    passed = time.perf_counter() - start
    assert 0 < compile_clock.lap() <= passed
    jump(x).block_until_ready()
    assert compile_clock.lap() == 0


def test_time_left_is_without_what_is_left_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    clock = Clock(0, 10)
    now[0] += 63.0
    clock.leave_out(60.0)
    assert clock.left(1) == "27s"
    now[0] += 3.0
    assert clock.left(2) == "24s"
    clock.leave_out(1000.0)
    assert clock.left(2) == "0s"
