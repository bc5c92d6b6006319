"""Seconds of compiling, and time left without them."""

import time

import jax
import jax.numpy as jnp
import pytest

from marble_jax import console as module
from marble_jax.compiling import compile_clock, union_seconds
from marble_jax.console import Clock, Console


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


@pytest.fixture
def now(monkeypatch):
    """A clock of one's own, in a list, and no terminal."""
    clock = [100.0]
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    return clock


def test_without_a_terminal_a_line_comes_every_twenty_seconds(now, capsys):
    """Polled every second, with a micro-batch done every ten: a step of 65 seconds."""
    with Console().watched(0, "step 3 training", "micro-batch") as bar:
        bar.total = 12
        for second in range(1, 66):
            now[0] += 1
            bar.update(int(second % 10 == 0))
    assert capsys.readouterr().out.splitlines() == [
        "under way for 20s: step 3 training, 2 of 12 micro-batch",
        "under way for 40s: step 3 training, 4 of 12 micro-batch",
        "under way for 1m00s: step 3 training, 6 of 12 micro-batch",
    ]


def test_work_of_less_than_twenty_seconds_has_no_line(now, capsys):
    for _ in range(9):
        with Console().watched(4, "step 1 rollout", "img") as bar:
            now[0] += 19
            bar.update(4)
    assert capsys.readouterr().out == ""


def test_only_the_first_process_has_a_heartbeat_and_a_terminal_has_bars(monkeypatch):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False)
    assert isinstance(Console().watched(4, "rollout", "img"), module.Heartbeat)
    console = Console()
    console.speaks = False
    silent = console.watched(4, "rollout", "img")
    assert isinstance(silent, module.tqdm) and silent.disable
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    with Console().watched(4, "rollout", "img") as bar:
        assert isinstance(bar, module.tqdm) and not bar.disable
