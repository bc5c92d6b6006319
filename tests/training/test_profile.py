"""Which steps are traced, and what a trace holds."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from marble_jax.errors import InputError
from marble_jax.training.profile import Profiler, parse_steps, phase


def test_steps():
    assert (
        parse_steps("") == range(0)
        and parse_steps("3-5") == range(3, 6)
        and parse_steps(" 4 ") == range(4, 5)
    )


@pytest.mark.parametrize("text", ["0-2", "5-3", "3-", "three", "1,2"])
def test_steps_that_are_none(text):
    with pytest.raises(
        InputError, match="logging.profile_steps: expected steps such as 3-5 or 4.*received"
    ):
        parse_steps(text)


def test_a_trace_holds_the_chosen_steps_with_their_phases(tmp_path):
    def train(x):
        with jax.named_scope("train"):
            return jnp.sin(x).sum()

    train, profiler = jax.jit(train), Profiler(range(2, 4), tmp_path / "profile")
    for number in range(1, 6):
        with profiler.step(number), phase("train"):
            train(jnp.ones(8)).block_until_ready()
        assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (number >= 3)
    (file,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "step"}
    assert steps == {"2", "3"} and sum(e.get("name") == "train" for e in events) == 2


def test_a_failing_step_keeps_the_trace(tmp_path):
    profiler = Profiler(range(1, 4), tmp_path)
    with pytest.raises(RuntimeError, match="broken"), profiler.step(1):
        raise RuntimeError("broken")
    assert list(tmp_path.rglob("*.xplane.pb"))
    profiler.stop()  # nothing is under way any more
