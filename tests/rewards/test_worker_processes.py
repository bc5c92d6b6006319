"""Processes that answer, raise, hang and die."""

import functools
import os

import numpy as np
import pytest
from engines import Obedient, Reads

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.ocr import EngineReader, OCRReward
from marble_jax.rewards.workers.processes import ProcessPool


@pytest.fixture(scope="module")
def pool():
    pool = ProcessPool(Obedient, workers=2, timeout=3)
    yield pool
    pool.close()


def test_answers_in_order_from_other_processes(pool):
    assert pool.map(list(range(20))) == list(range(20))
    assert os.getpid() not in pool.map(["pid"] * 4)


def test_what_raises_hangs_or_dies_has_no_answer(pool, caplog):
    before = set(pool.map(["pid"] * 8))
    assert pool.map([1, "raise", 2, "die", 3, "hang", 4]) == [1, None, 2, None, 3, None, 4]
    assert pool.map([5, 6, 7]) == [5, 6, 7]
    after = set(pool.map(["pid"] * 8))
    assert after and after != before
    for what in ("ValueError: no", "the process ended", "no answer within 3 s"):
        assert what in caplog.text


def test_an_engine_that_cannot_be_made_is_named():
    with pytest.raises(InputError, match="ValueError: no"):
        ProcessPool(functools.partial(Obedient, "raise"), workers=1)
    with pytest.raises(InputError, match="no answer within 2 s"):
        ProcessPool(functools.partial(Obedient, "hang"), workers=1, start_timeout=2)
    with pytest.raises(InputError, match="workers: expected at least 1; received 0"):
        ProcessPool(Obedient, workers=0)


def test_closing_ends_the_processes():
    pool = ProcessPool(Obedient, workers=1)
    (pid,) = pool.map(["pid"])
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_hung_or_dead_reader_makes_samples_missing_not_zero():
    reader = EngineReader(Reads, workers=1, processes=True, timeout=3)
    images = np.zeros((5, 2, 2, 3), np.uint8)
    images[1:4, 0, 0, 0] = [1, 2, 3]
    result = base.score(
        OCRReward("ocr", reader), images.astype(np.float32) / 255, ['"AB"'] * 5, [{}] * 5
    )
    reader.close()
    np.testing.assert_array_equal(result.valid, [True, False, False, False, True])
    np.testing.assert_array_equal(result.failed, [False, True, True, True, False])
    assert result.values[0] == result.values[4] == 1
