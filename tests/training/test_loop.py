"""The loop: what it calls when, how it stops and goes on."""

import dataclasses
import functools
import gzip
import json
import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy
from toy_run import Brightness, encode

import marble_jax  # noqa: F401
from marble_jax.console import Console
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import make_sampler
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.rewards.scorer import Scorer
from marble_jax.trainable import lora
from marble_jax.training import grouped_step, loop
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.profile import Profiler
from marble_jax.training.reward_schedule import Dropout, RewardSchedule, Stage
from marble_jax.training.rollout import Collector
from marble_jax.training.step_schedule import make_steps
from marble_jax.training.stops import Interrupted, stop_requests

PROMPTS = {
    "general": [Prompt(f"a thing {i}", "general") for i in range(5)],
    "ocr": [Prompt(f'the word "{w}"', "ocr") for w in ("go", "stop", "left")],
}


class Redness(Reward):
    """Only of prompts with a quote."""

    def applies(self, prompt, metadata):
        return '"' in prompt

    def score(self, params, images, prompts, metadata):
        return images[..., 0].mean(axis=(1, 2)), jnp.ones(len(prompts), bool)


@functools.cache
def _collector():
    scorer = Scorer(
        [Brightness(name="brightness", kind="device"), Redness(name="redness", kind="device")]
    )
    return Collector(
        sampler=make_sampler(toy.velocity, "euler", sigma_grid(2, 1.0)),
        encode=encode,
        decode=jax.nn.sigmoid,
        scorer=scorer,
        latent_shape=toy.LATENT,
        batch_size=6,
        place=lambda tree: tree,
    )


@functools.cache
def _steps():
    return make_steps(toy.recipe(num_rewards=2), toy.velocity, toy.optimizer(), "amortized", 2)


def _sampling(**schedule):
    return Sampling(
        PROMPTS,
        toy.PROMPTS,
        toy.IMAGES // toy.PROMPTS,
        "global",
        "none",
        (),
        RewardSchedule(**schedule),
    )


class Diary:
    """Hooks that write down what was called; states are copied because the next step overwrites them."""

    def __init__(self, stop_at=None, number=signal.SIGTERM):
        self.events, self.records, self.saved, self._stop_at, self._number = (
            [],
            {},
            {},
            stop_at,
            number,
        )

    def record(self, step, record):
        self.events.append(("record", step))
        self.records[step] = record
        if step == self._stop_at:
            os.kill(os.getpid(), self._number)

    def evaluate(self, state, give_way):
        give_way()
        self.events.append(("evaluate", int(state.step)))
        return state.replace(best_step=state.step + 0)

    def save(self, state):
        self.events.append(("save", int(state.step)))
        self.saved[int(state.step)] = jax.tree.map(lambda x: np.array(x, copy=True), state)

    @property
    def hooks(self):
        return Hooks(self.record, self.evaluate, self.save)


def _iteration(**changes):
    iteration = Iteration(toy.base_params(), _collector(), _sampling(), _steps(), lambda tree: tree)
    return dataclasses.replace(iteration, **changes)


def _train(
    state, diary, num_steps=3, evaluate_every=2, checkpoint_every=2, console=None, **changes
):
    cadence = Cadence(num_steps, evaluate_every, checkpoint_every)
    console = console or Console()
    return train(state, _iteration(**changes), cadence, diary.hooks, console)


def _step_lines(capsys):
    """What was printed about steps."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def _start():
    return toy.new_state(num_rewards=2)


@functools.cache
def _whole():
    diary = Diary()
    return jax.tree.map(lambda x: np.array(x, copy=True), _train(_start(), diary)), diary


def test_what_is_called_when():
    state, diary = _whole()
    assert diary.events == [
        ("evaluate", 0),
        ("record", 0),
        ("record", 1),
        ("evaluate", 2),
        ("save", 2),
        ("record", 2),
        ("evaluate", 3),
        ("save", 3),
    ]
    assert int(state.step) == 3 and int(state.best_step) == 3
    toy.assert_identical(diary.saved[3], state)
    assert [diary.records[s]["harmonize/refreshed"] for s in range(3)] == [1, 0, 1]


def test_records_are_flat_and_complete(capsys):
    _train(_start(), diary := Diary(), num_steps=2)
    record = diary.records[0]
    assert all(isinstance(v, (int, float)) for v in record.values())
    expected = {
        "step",
        "time",
        "time/rollout_s",
        "time/rewards_wait_s",
        "time/train_s",
        "time/step_s",
        "objective/loss",
        "objective/kl",
        "training/grad_norm",
        "training/skipped",
        "rollout/diversity",
        "rollout/brightness",
        "rollout/x0_norm",
        "harmonize/alpha/redness",
        "harmonize/cos_pair/brightness|redness",
        "rollout/score_mean/brightness",
        "rollout/missing_share/redness",
        "advantages/abs_mean/redness",
        "rollout_policy/decay",
        "rollout_policy/is_trained",
    }
    assert expected <= set(record)
    assert "harmonize/cos_pair/redness|brightness" not in record
    # Redness applies to OCR prompts alone: one of 3 prompts or two, by turns with the other source.
    shares = [diary.records[step]["rollout/missing_share/redness"] for step in (0, 1)]
    assert sorted(shares) == pytest.approx([1 / 3, 2 / 3])
    assert record["rollout/missing_share/brightness"] == 0
    lines = _step_lines(capsys)
    assert (
        len(lines) == 2
        and lines[0].startswith("step 1/2  brightness 0.")
        and "worst cos" in lines[0]
    )
    assert "worst cos" not in lines[1]  # the step in between solves knows no cosines


def test_a_slow_step_gives_signs_of_life_in_a_log(capsys, monkeypatch):
    """Where every line is due: from images, from micro-batches, and in the right order."""
    monkeypatch.setattr(grouped_step, "GROUP_SECONDS", 0.0)
    monkeypatch.setattr("marble_jax.console.HEARTBEAT_SECONDS", 0.0)
    _train(_start(), Diary(), num_steps=1)
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(": ", 1)[1] for line in lines if line.startswith("under way for ")]
    rollout, training = "step 1 rollout (compiling), ", "step 1 training (compiling), "
    assert told[0].startswith(rollout) and told[-1] == f"{training}9 of 9 micro-batch"
    assert {f"{training}{done} of 9 micro-batch" for done in range(10)} <= set(told)
    assert f"{rollout}{toy.IMAGES} of {toy.IMAGES} sample" in told


def test_compiling_and_saving_are_told_and_on_record(capsys, monkeypatch):
    laps = iter([0.0, 40.0, 20.0, 0.0, 0.1, 0.0, 0.0, 0.0, 7.0])
    clock = type("Laps", (), {"lap": lambda self: next(laps)})()
    monkeypatch.setattr("marble_jax.training.loop.compile_clock", clock)
    _train(_start(), diary := Diary(), checkpoint_every=1)
    lines = capsys.readouterr().out.splitlines()
    # Which a slow machine has.
    lines = [line for line in lines if not line.startswith("under way")]
    assert lines[:2] == [
        "the first step compiles the programs of rollout and training",
        "compiled for 1m00s in step 1 (rollout 40s, training 20s)",
    ]
    told = [line[:8] for line in lines[2:]]
    assert told == ["step 1/3", "step 2/3", "compiled", "step 3/3"]
    # A tenth of a second is no compiling worth a name; a program of the third step is.
    seconds = [diary.records[step].get("time/compile_s") for step in range(3)]
    assert seconds == [60.0, None, 7.0]
    # A step's record is written before it is saved: the next one has the seconds.
    assert ["time/checkpoint_s" in diary.records[step] for step in range(3)] == [False, True, True]


def test_speed_in_record_and_step_line_and_phases_in_a_trace(tmp_path, capsys):
    class Fast(Diary):
        @property
        def hooks(self):
            speed = {
                "speed/images_per_s": 2.5,
                "speed/train_tflops_per_device": 81.0,
                "speed/train_mfu": 0.41,
            }
            return dataclasses.replace(
                super().hooks,
                speed=lambda record: speed if record["time/step_s"] > 0 else {},
                profiler=Profiler(range(2, 3), tmp_path / "profile"),
            )

    _train(_start(), diary := Fast(), num_steps=2, console=Console(verbose=True))
    assert [diary.records[s]["speed/train_mfu"] for s in range(2)] == [0.41, 0.41]
    lines = _step_lines(capsys)
    assert all("2.5 img/s train 81 TFLOP/s a device (MFU 41%)" in line for line in lines)
    (file,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert [e["args"]["step_num"] for e in events if e.get("name") == "step"] == ["2"]
    assert {"rollout", "rewards", "train"} <= {e.get("name") for e in events}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_under_way_and_the_rest_can_follow(number):
    """Stopped in the first of three steps, off the checkpoint schedule; the continuation equals the whole run."""
    before = signal.getsignal(number)
    diary = Diary(stop_at=0, number=number)
    with pytest.raises(
        Interrupted, match="stopped after step 1; the same command goes on from here"
    ) as stopped:
        _train(_start(), diary)
    assert stopped.value.step == 1
    assert diary.events == [("evaluate", 0), ("record", 0), ("save", 1)]
    assert signal.getsignal(number) == before

    later = Diary()
    state = _train(jax.tree.map(jnp.asarray, diary.saved[1]), later)
    assert later.events == [
        ("record", 1),
        ("evaluate", 2),
        ("save", 2),
        ("record", 2),
        ("evaluate", 3),
        ("save", 3),
    ]
    toy.assert_identical(state, _whole()[0])
    for name, value in _whole()[1].records[2].items():
        assert name.startswith("time") or later.records[2][name] == value or np.isnan(value), name


def test_a_signal_in_a_step_that_is_saved_anyway_saves_once():
    diary = Diary(stop_at=1)
    with pytest.raises(Interrupted, match="after step 2"):
        _train(_start(), diary)
    # The evaluation can wait until the run goes on.
    assert diary.events[-2:] == [("record", 1), ("save", 2)] and list(diary.saved) == [2]


def test_a_signal_while_a_step_is_sampled_gives_that_step_up():
    """It comes in the first of two batches of step 2: the state after step 1 is saved; the rest equals the whole."""
    diary, decoded = Diary(), []

    def decode(latents):
        decoded.append(1)
        if len(decoded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return jax.nn.sigmoid(latents)

    with pytest.raises(
        Interrupted, match="stopped after step 1; the same command goes on from here"
    ):
        train(
            _start(),
            _iteration(collector=dataclasses.replace(_collector(), decode=decode)),
            Cadence(3, 2, 2),
            diary.hooks,
            Console(),
        )
    assert diary.events == [("evaluate", 0), ("record", 0), ("save", 1)] and len(decoded) == 3
    toy.assert_identical(_train(jax.tree.map(jnp.asarray, diary.saved[1]), Diary()), _whole()[0])


class Signalling:
    """Compiled steps that get a signal when a step is watched for the so manieth time."""

    def __init__(self, steps, at_step, at_look):
        self._steps, self._at, self.looks = steps, (at_step, at_look), 0
        self.every, self.keeps = steps.every, steps.keeps

    def due(self, solved, age):
        program = self._steps.due(solved, age)

        def watched(state, params, batch, watch, alive):
            looks = 0

            def look(done, total):
                nonlocal looks
                looks += 1
                if (int(state.step), looks) == self._at:
                    os.kill(os.getpid(), signal.SIGTERM)
                watch(done, total)

            state, metrics = program(state, params, batch, look, alive)
            self.looks = looks
            return state, metrics

        return watched


@pytest.mark.parametrize("look", [1, 3, 5])
def test_a_signal_between_groups_of_micro_batches_gives_the_step_up(monkeypatch, look):
    """It comes in the update of step 2, of 9 micro-batches, before the first or behind a group: as for a rollout."""
    monkeypatch.setattr(grouped_step, "GROUP_SECONDS", 0.0)
    steps = Signalling(_steps(), 1, look)
    diary = Diary()
    with pytest.raises(Interrupted, match="stopped after step 1;"):
        _train(_start(), diary, steps=steps)
    assert diary.events == [("evaluate", 0), ("record", 0), ("save", 1)]
    assert steps.looks > 5
    toy.assert_identical(_train(jax.tree.map(jnp.asarray, diary.saved[1]), Diary()), _whole()[0])


def test_a_step_is_saved_when_the_last_checkpoint_is_old(monkeypatch):
    """Steps of four minutes, and a checkpoint every ten: behind the third step, and behind the last."""
    minutes = iter(range(0, 1000, 4))
    monkeypatch.setattr(loop, "time", FakeTime(minutes))
    diary = Diary()
    cadence = Cadence(4, 0, 100, checkpoint_seconds=600.0)
    train(_start(), _iteration(), cadence, diary.hooks, Console())
    assert list(diary.saved) == [3, 4]


class FakeTime:
    """A clock that goes on by some minutes whenever it is read."""

    def __init__(self, minutes):
        self._minutes = minutes

    def monotonic(self):
        return 60.0 * next(self._minutes)

    def perf_counter(self):
        return 0.0


def test_a_signal_after_the_save_check_is_not_lost():
    """It comes when the loop looks whether another step is due: nothing was saved on schedule, so it is saved now."""

    class Late(Cadence):
        checked = False
        checkpoint_seconds = 0.0

        def __init__(self):
            """Nothing is fixed: how many steps there are depends on when it is asked."""

        def evaluates(self, step):
            return False

        def exports(self, step):
            return False

        def saves(self, step):
            self.checked = True
            return False

        @property
        def num_steps(self):
            if self.checked:
                os.kill(os.getpid(), signal.SIGTERM)
                self.checked = False
            return 9

    diary = Diary()
    with pytest.raises(Interrupted, match="after step 1"):
        train(_start(), _iteration(), Late(), diary.hooks, Console())
    assert diary.events == [("record", 0), ("save", 1)]


def test_a_signal_during_the_first_evaluation_stops_before_any_step():
    diary = Diary()

    def evaluate(state, give_way):
        os.kill(os.getpid(), signal.SIGTERM)
        return diary.evaluate(state, give_way)

    with pytest.raises(Interrupted, match="after step 0"):
        train(
            _start(),
            _iteration(),
            Cadence(2, 0, 1),
            Hooks(diary.record, evaluate, diary.save),
            Console(),
        )
    assert diary.events == []  # given up, to be done when the run goes on


def test_a_signal_in_the_last_evaluation_gives_it_up_and_saves_the_steps():
    """It is made up for by the same command, which saves the best policy that it finds."""
    diary = Diary()

    def evaluate(state, give_way):
        if int(state.step) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return diary.evaluate(state, give_way)

    hooks = dataclasses.replace(diary.hooks, evaluate=evaluate)
    with pytest.raises(Interrupted, match="stopped after step 1"):
        train(_start(), _iteration(), Cadence(1, 0, 1), hooks, Console())
    assert diary.events == [("evaluate", 0), ("record", 0), ("save", 1)]
    saved = jax.tree.map(jnp.asarray, diary.saved[1])
    assert int(saved.best_step) == 0

    replaced, later = [], Diary()
    hooks = dataclasses.replace(later.hooks, replace=lambda state: replaced.append(state.best_step))
    state = train(saved, _iteration(), Cadence(1, 0, 1), hooks, Console())
    assert later.events == [("evaluate", 1)] and int(state.best_step) == 1
    assert [int(step) for step in replaced] == [1]


def test_a_second_signal_is_not_caught():
    # A shell that starts a command in the background has it ignore SIGINT; the test needs Python's own handler.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_requests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_finished_run_does_nothing_more():
    diary = Diary()
    state = _train(jax.tree.map(jnp.asarray, _whole()[0]), diary)
    # The evaluation of its last state is asked for, and whoever evaluates knows that it is on record.
    assert diary.events == [("evaluate", 3)] and int(state.step) == 3


def test_merging_the_adapter_changes_rollouts_by_rounding_only():
    """One step: weights agree, although AdamW makes a step of unit size out of small differences."""
    plain, merged = Diary(), Diary()
    _train(_start(), plain, num_steps=1)
    _train(_start(), merged, num_steps=1, merge=partial(lora.merge, scale=toy.SCALE))
    for name in ("rollout/x0_norm", "rollout/score_mean/redness", "rollout/diversity"):
        assert merged.records[0][name] == pytest.approx(plain.records[0][name], rel=1e-4)
    toy.assert_close(merged.saved[1].current, plain.saved[1].current, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "every, evaluated, num_steps",
    [(0, [0, 7], 7), (3, [0, 3, 6, 7], 7), (7, [0, 7], 7), (2, [0, 2], 2)],
)
def test_when_states_are_evaluated(every, evaluated, num_steps):
    cadence = Cadence(num_steps, every, 1)
    assert [s for s in range(num_steps + 1) if cadence.evaluates(s)] == evaluated


@pytest.mark.parametrize(
    "every, saved", [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (50, [5])]
)
def test_when_states_are_saved(every, saved):
    cadence = Cadence(5, 0, every)
    assert [s for s in range(1, 6) if cadence.saves(s)] == saved


@pytest.mark.parametrize("every, exported", [(0, []), (2, [2, 4, 5]), (50, [5])])
def test_when_states_are_exported(every, exported):
    cadence = Cadence(5, 0, 1, every)
    assert [s for s in range(1, 6) if cadence.exports(s)] == exported


def test_states_are_exported_after_they_are_saved():
    diary = Diary()
    hooks = Hooks(
        diary.record,
        diary.evaluate,
        diary.save,
        lambda s: diary.events.append(("export", int(s.step))),
    )
    train(_start(), _iteration(), Cadence(2, 0, 2, 1), hooks, Console())
    assert diary.events == [
        ("evaluate", 0),
        ("record", 0),
        ("export", 1),
        ("record", 1),
        ("evaluate", 2),
        ("save", 2),
        ("export", 2),
    ]


def test_a_stage_begins_with_a_solve_on_its_own_rewards_and_prompts():
    """Solves are due at steps 0, 2, 4; the second stage begins at step 3 and solves at once, then at 5."""
    stages = (Stage(("brightness",), (), 0), Stage(("redness",), ("ocr",), 3))
    state = _train(_start(), diary := Diary(), num_steps=6, sampling=_sampling(stages=stages))
    records = [diary.records[s] for s in range(6)]
    assert [r["harmonize/refreshed"] for r in records] == [1, 0, 1, 1, 0, 1]
    assert [r["advantages/ignored_share/redness"] for r in records] == [1, 1, 1, 0, 0, 0]
    assert [r["advantages/ignored_share/brightness"] for r in records] == [0, 0, 0, 1, 1, 1]
    shares = [r["rollout/missing_share/redness"] for r in records]
    # Two sources take turns at the third prompt; the second stage has one source.
    assert sorted(shares[:2]) == pytest.approx([1 / 3, 2 / 3]) and shares[3:] == [0, 0, 0]
    assert all(r["training/grad_norm"] > 0 for r in records)
    assert [r["harmonize/cos_update/redness"] for r in records if r["harmonize/refreshed"]] == [
        0,
        0,
        pytest.approx(1, abs=1e-5),
        pytest.approx(1, abs=1e-5),
    ]
    np.testing.assert_allclose(state.alpha.alpha, [0.5, 0.5], rtol=1e-5)


def test_a_dropped_reward_is_trained_on_the_samples_of_no_other():
    dropped = _sampling(dropout=Dropout(("brightness",), 1.0))
    _train(_start(), diary := Diary(), num_steps=1, sampling=dropped)
    record = diary.records[0]
    # The samples that redness applies to.
    others = 1 - record["rollout/missing_share/redness"]
    assert 0 < others < 1
    assert record["advantages/ignored_share/brightness"] == pytest.approx(others)
    assert record["advantages/ignored_share/redness"] == 0
    assert (
        record["harmonize/grad_norm/brightness"] > 0 and record["harmonize/grad_norm/redness"] > 0
    )
