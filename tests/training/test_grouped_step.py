"""Steps in groups of micro-batches: the numbers of one program, stopped at any moment, alike on all hosts."""

import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

from marble_jax import tree
from marble_jax.distributed import device_mesh, waiting
from marble_jax.harmonize.balancers import Fixed, Marble
from marble_jax.training import grouped_step
from marble_jax.training.amortized_step import amortized_step
from marble_jax.training.grouped_step import GroupedStep, GroupSize
from marble_jax.training.several_updates import before_last, several_updates
from marble_jax.training.staged_step import StagedStep, SumLoop
from marble_jax.training.train_step import exact_step
from marble_jax.training.upstream_step import upstream_step

ONE = device_mesh.SINGLE_DEVICE


class GivenUp(Exception):
    """What a watch raises here."""


def _exact(**changes):
    def make(recipe):
        return exact_step(recipe, toy.velocity, toy.optimizer())

    # A fixed alpha compiles in a fraction of the time of a solver.
    return toy.recipe(balancer=Fixed(), **changes), make


def _amortized(recipe):
    return amortized_step(recipe, toy.velocity, toy.optimizer())


def _upstream(solved):
    return lambda recipe: upstream_step(recipe, toy.velocity, toy.optimizer(), solved)


def _state(adaptive=False):
    state = toy.new_state()
    if adaptive:
        return state.replace(anchor_spread=jnp.asarray(1e-3, jnp.float32))
    return state


CASES = {
    "adaptive": (*_exact(anchor_every=4, anchor_error=0.3), 1),
    "amortized": (toy.recipe(anchor_every=4), _amortized, 1),
    # Its second loop needs what the first has come to.
    "upstream": (toy.recipe(balancer=Marble()), _upstream("first"), 1),
    # A step of one such update is in "skipping".
    "two updates": (*_exact(micro_batch=2, anchor_every=4), 2),
    "skipping": (*_exact(anchor_every=4, alike_below=1e-3), 1),
}


@functools.cache
def _grouped(case):
    recipe, make, updates = CASES[case]
    return GroupedStep(make(recipe), make(before_last(recipe)), updates, ONE)


@pytest.mark.parametrize("case", CASES)
def test_groups_of_any_size_give_the_numbers_of_one_program(monkeypatch, case):
    recipe, make, updates = CASES[case]
    last, before = make(recipe), make(before_last(recipe))
    params, batch = toy.base_params(), toy.new_batch()
    whole = jax.jit(several_updates(last, before, updates))
    state = _state(case == "adaptive")
    if recipe.alike_below > 0:
        state = toy.new_state(skips_alike=True)
    expected, figures = whole(state, params, batch)
    monkeypatch.setattr(grouped_step, "GROUP_SECONDS", 0.0)
    grouped = _grouped(case)
    seen, numbers = [], []
    for _ in range(2):
        # The second time in the largest groups, which earlier times allow.
        found, metrics = grouped(
            jax.tree.map(jnp.copy, state), params, batch, lambda *look: seen.append(look)
        )
        assert set(metrics) == set(figures)
        # Other programs, which the compiler may round otherwise in the last digit.
        toy.assert_close((found, metrics), (expected, figures), rtol=2e-6, atol=2e-8)
        numbers.append((found, metrics))
        monkeypatch.setattr(grouped_step, "GROUP_SECONDS", 1e6)
    # The same programs, however many micro-batches a call of theirs takes.
    toy.assert_identical(*numbers)
    total = 9 if updates == 1 else 18
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert {done for done, _ in seen} == set(range(total + 1))


@functools.cache
def _plain():
    recipe, make = _exact()
    return GroupedStep(make(recipe), make(recipe), 1, ONE)


@pytest.mark.parametrize("as_one_program", [True, False])
def test_alpha_ages_by_steps_however_many_updates_they_have(as_one_program):
    """A solve every third step, in both of its updates; five steps in one program each or in groups."""
    recipe, make = _exact(micro_batch=2)
    solve, between = ((made(recipe), made(before_last(recipe))) for made in (make, _amortized))
    if as_one_program:
        solve, between = (jax.jit(several_updates(*updates, 2)) for updates in (solve, between))
    else:
        solve, between = (GroupedStep(*updates, 2, ONE) for updates in (solve, between))
    state, ages, solved = toy.new_state(), [], []
    for number in range(5):
        due = not bool(state.alpha.solved) or int(state.alpha.age) >= 3
        if due:
            solved.append(number)
        run = solve if due else between
        state, metrics = run(state, toy.base_params(), toy.new_batch())
        ages.append(int(metrics["harmonize/alpha_age"]))
    assert solved == [0, 3]
    assert ages == [0, 1, 2, 0, 1] and int(state.step) == 5


def test_a_step_that_is_given_up_leaves_the_state_as_it_was(monkeypatch):
    monkeypatch.setattr(grouped_step, "GROUP_SECONDS", 0.0)
    state, params, batch = toy.new_state(), toy.base_params(), toy.new_batch()
    kept = jax.tree.map(np.array, state)

    def stop(done, total):
        if done == 5:
            raise GivenUp

    with pytest.raises(GivenUp):
        _plain()(state, params, batch, stop)
    toy.assert_identical(state, kept)
    after, _ = _plain()(state, params, batch)
    assert int(after.step) == 1 and state.current["first"]["a"].is_deleted()


def test_the_update_before_the_last_leaves_the_state_as_it_was(monkeypatch):
    monkeypatch.setattr(grouped_step, "GROUP_SECONDS", 0.0)
    state = toy.new_state()
    kept = jax.tree.map(np.array, state)

    def stop(done, total):
        if done == 12:
            raise GivenUp

    with pytest.raises(GivenUp):
        _grouped("two updates")(state, toy.base_params(), toy.new_batch(), stop)
    toy.assert_identical(state, kept)


def _slow_step(seconds):
    """A step of 9 micro-batches that take `seconds[0]` each and change nothing."""

    def sleep(index):
        time.sleep(seconds[0])
        return np.float32(1.0)

    def part(context, earlier):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return lambda index: jax.pure_callback(sleep, shape, index)

    loop = SumLoop(lambda _: jnp.arange(9, dtype=jnp.int32), lambda _: (0, 9), part)
    return StagedStep(
        open=lambda state, params, batch: state,
        count=lambda batch: 9,
        loops=lambda num: (loop,),
        finish=lambda state, carries: (state, {"objective/loss": carries[0]}),
    )


def test_a_group_under_way_can_be_given_up(monkeypatch):
    """All micro-batches in one group of nine seconds: what the watch raises after a fifth of one ends the waiting."""
    seconds = [0.0]
    step = _slow_step(seconds)
    grouped = GroupedStep(step, step, 1, ONE)
    monkeypatch.setattr(GroupSize, "next", lambda self, left: 9)
    state, _ = grouped(toy.new_state(), toy.base_params(), toy.new_batch())
    seconds[0] = 1.0
    start = time.perf_counter()

    def stop(done, total):
        if time.perf_counter() - start > 0.2:
            raise GivenUp

    with pytest.raises(GivenUp):
        grouped(state, toy.base_params(), toy.new_batch(), stop)
    assert time.perf_counter() - start < 6.0
    seconds[0] = 0.0


def test_the_last_call_gives_signs_of_life():
    """The update alone takes a second, in which nobody asks whether to give up but somebody hears that it goes on."""

    def sleep(value):
        time.sleep(1.0)
        return value

    def finish(state, carries):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return state, {"objective/loss": jax.pure_callback(sleep, shape, carries[0])}

    step = dataclasses.replace(_slow_step([0.0]), finish=finish)
    grouped = GroupedStep(step, step, 1, ONE)
    signs = []
    asked_at_the_end = []

    def watch(done, total):
        if signs:
            asked_at_the_end.append((done, total))

    _, metrics = grouped(
        toy.new_state(),
        toy.base_params(),
        toy.new_batch(),
        watch,
        functools.partial(signs.append, None),
    )
    assert metrics["objective/loss"] == 9.0
    assert len(signs) >= 2 and not asked_at_the_end


def test_groups_grow_with_the_time_that_micro_batches_take(monkeypatch):
    monkeypatch.setattr(grouped_step, "GROUP_SECONDS", 6.0)
    size = GroupSize()
    assert size.next(100) == 1
    size.took(1, 300.0)  # compiled
    assert size.next(100) == 1
    size.took(1, 0.5)
    assert size.next(100) == 12 and size.next(5) == 5
    size.took(12, 24.0)
    assert size.next(100) == 3
    size.took(3, 30.0)
    assert size.next(100) == 1


def test_hosts_take_the_group_size_of_the_first(monkeypatch):
    asked = []
    size = GroupSize()
    size.took(1, 9.0)
    size.took(1, 1.0)
    monkeypatch.setattr(grouped_step.distributed, "is_single_process", lambda: False)

    def of_the_first(label, call):
        asked.append(call())
        return 3

    monkeypatch.setattr(grouped_step.distributed, "broadcast_from_first", of_the_first)
    assert size.next(100) == 3 and asked == [5]


class Slow:
    """Stands for an array that is there after some looks."""

    def __init__(self, looks):
        self.looks = looks

    def is_ready(self):
        self.looks -= 1
        return self.looks < 0


def test_processes_that_wait_ask_each_other(monkeypatch):
    """The others are ready at the third round; this process polls between rounds alone, as all do."""
    rounds, polls = [], []
    monkeypatch.setattr(waiting.processes, "is_single_process", lambda: False)
    monkeypatch.setattr(waiting, "ROUND_SECONDS", 0.0)

    def exchange(label, ready):
        rounds.append(ready)
        return [ready, len(rounds) >= 3]

    monkeypatch.setattr(waiting.processes, "exchange", exchange)
    waiting._wait(Slow(2).is_ready, lambda: polls.append(len(rounds)))
    assert rounds == [False, False, True] and polls == [1, 2]


def test_a_call_beside_gives_its_result_or_its_failure():
    assert waiting.call_beside(lambda: 7, lambda: None) == 7

    def fail():
        raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        waiting.call_beside(fail, lambda: None)
    released = threading.Event()

    def stop():
        raise GivenUp

    with pytest.raises(GivenUp):
        waiting.call_beside(released.wait, stop)
    assert waiting.is_left_behind()
    released.set()
    deadline = time.monotonic() + 10.0
    while waiting.is_left_behind() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not waiting.is_left_behind()


def test_the_parts_of_two_updates_are_all_images():
    from marble_jax.training.several_updates import update_part

    state, batch = toy.new_state(), toy.new_batch()
    parts = [update_part(batch, state.key, state.step, update, 2) for update in range(2)]
    rows = np.concatenate([np.asarray(part.kept).reshape(6, -1) for part in parts])
    whole = np.asarray(batch.kept).reshape(12, -1)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, whole))
    norms = [float(tree.norm(part.kept)) for part in parts]
    assert norms[0] != norms[1]
    assert dataclasses.replace(parts[0]).prompt.shape == (6,)
