"""Evaluations of a run: which policy is the best one, and records that survive a kill."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marble_jax.config import (
    EvaluationSettings,
    RewardSettings,
    RolloutSettings,
    Settings,
    flatten,
)
from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.programs import train
from marble_jax.programs.base_scores import check_base_scores
from marble_jax.programs.run_evaluations import RunEvaluations
from marble_jax.prompts.files import Prompt
from marble_jax.storage.workdir import Workdir
from marble_jax.training.state import initial_state
from marble_jax.types import Scores
from marble_jax.weights import hub

PROMPTS = [Prompt(f"a thing {i}", "things", {"tag": "thing", "number": i}) for i in range(4)]
NAMES = ("large", "small", "heldout")
# Standard deviations 100, 0.1 and 1.
BASE = np.array([[-100, -0.1, -1], [100, 0.1, 1], [-100, -0.1, -1], [100, 0.1, 1]], np.float32)


class Nothing:
    def write(self, step, record):
        pass

    def write_evaluation(self, step, record, samples, rewards):
        pass


def scores_of(values):
    return Scores(NAMES, values, np.ones(values.shape, bool), np.zeros(values.shape, bool))


@pytest.fixture
def make(tmp_path):
    """make(gains): evaluations whose step i gains gains[i] over the base model, and how often it was asked."""

    def call(gains, best="train", heldout=("heldout",), best_by="standardised_gain"):
        asked = []

        def evaluate(params, adapter, progress):
            step = None if adapter is None else int(adapter["step"])
            asked.append(step)
            progress(1)
            gain = np.zeros(3) if step is None else np.asarray(gains[step])
            return scores_of((BASE + gain).astype(np.float32)), np.zeros((1, 2, 2, 3))

        evaluate.groups, evaluate.kept = np.arange(4), [0]
        evaluate.prompts = PROMPTS
        settings = Settings(
            rewards=RewardSettings(train=("large", "small"), heldout=heldout),
            evaluation=EvaluationSettings(best=best, best_by=best_by),
            rollout=RolloutSettings(merge_adapter=False),
        )
        run = SimpleNamespace(
            settings=settings,
            evaluator=evaluate,
            spec=SimpleNamespace(scale=1.0),
            networks=SimpleNamespace(params={}),
            family=SimpleNamespace(frames_per_second=None),
        )
        return RunEvaluations(run, Workdir(str(tmp_path)), Console(), Nothing()), asked

    return call


OPTIMIZER = optax.identity()


def after(step, state=None):
    state = state or initial_state({"step": jnp.zeros((), jnp.int32)}, OPTIMIZER, 2, (), 0)
    return state.replace(
        step=jnp.asarray(step, jnp.int32), ema={"step": jnp.asarray(step, jnp.int32)}
    )


@pytest.mark.parametrize(
    ("best", "heldout", "step", "gain"),
    [
        ("train", ("heldout",), 1, (-5 / 100 + 0.2 / 0.1) / 2),
        ("heldout", ("heldout",), 3, 0.9),
        ("all", ("heldout",), 1, (-5 / 100 + 0.2 / 0.1) / 3),
        ("heldout", (), 1, (-5 / 100 + 0.2 / 0.1) / 2),
    ],
)
def test_the_best_policy_has_the_largest_standardised_gain(make, best, heldout, step, gain):
    """Step 2 has the largest mean of raw scores (by 10 of the reward on the scale of 100), step 3 the largest of the
    reward that is not trained on; step 1 gains two standard deviations where they are small."""
    evaluations, _ = make(
        {1: (-5.0, 0.2, 0.0), 2: (20.0, 0.0, 0.0), 3: (0.0, 0.0, 0.9)}, best, heldout
    )
    state = evaluations(after(0))
    assert float(state.best_score) == -np.inf
    for number in (1, 2, 3):
        state = evaluations(after(number, state))
    assert int(state.best_step) == step and int(state.best["step"]) == step
    assert float(state.best_score) == pytest.approx(gain, rel=1e-5)


def test_by_raw_means_the_largest_scale_decides_and_the_base_model_takes_part(make):
    """Base scores have the mean 0: step 1 loses 5 of the reward on the scale of 100 for two deviations of the other,
    step 2 gains 20 of it. The unweighted mean of two rewards is -2.4 and 10."""
    evaluations, _ = make({1: (-5.0, 0.2, 0.0), 2: (20.0, 0.0, 0.0)}, best_by="raw_mean")
    state = evaluations(after(0))
    assert (int(state.best_step), float(state.best_score)) == (0, 0.0)
    state = evaluations(after(1, state))
    assert (int(state.best_step), int(state.best["step"])) == (0, 0)
    state = evaluations(after(2, state))
    assert (int(state.best_step), float(state.best_score)) == (2, 10.0)


def test_the_base_model_is_evaluated_once_and_what_a_kill_left_is_completed(make, tmp_path):
    gains = {1: (1.0, 0.1, 0.0), 2: (2.0, 0.2, 0.0)}
    evaluations, asked = make(gains)
    evaluations(after(1, evaluations(after(0))))
    assert asked == [None, 1]
    evaluations, asked = make(gains)  # another process
    evaluations(after(1))
    assert asked == []
    evaluations(after(2))
    assert asked == [2]
    by_reward = b'{"names": ["a", "b"], "values": [[1, 2, 3, 4]], "valid": [], "failed": []}'
    for damage in (b"", b'{"names": ["lar', by_reward, None):
        file = tmp_path / "base_scores.json"
        file.unlink() if damage is None else file.write_bytes(damage)
        evaluations, asked = make(gains)
        evaluations(after(2))
        assert asked == [None]  # anew, but not on record twice
    records = Workdir(str(tmp_path)).read(tmp_path / "evaluation.jsonl")
    assert "joint" not in records[0] and set(records[1]["joint"]) <= {"all", "trained"}
    # No reward falls on any image, and two gain.
    assert records[1]["joint"]["all"]["domination"]["mean"] == 1.0
    assert [(r["step"], r["policy"]) for r in records] == [(0, "base"), (1, "ema"), (2, "ema")]


def test_an_evaluation_that_gives_way_is_not_on_record(make, tmp_path):
    evaluations, asked = make({1: (1.0, 0.1, 0.0)})
    state = after(1, evaluations(after(0)))

    class Stop(Exception):
        pass

    def give_way():
        raise Stop

    with pytest.raises(Stop):
        evaluations(state, give_way)
    assert [r["step"] for r in Workdir(str(tmp_path)).read(tmp_path / "evaluation.jsonl")] == [0]
    assert int(evaluations(state).best_step) == 1 and asked == [None, 1, 1]


def test_the_best_policy_that_a_kill_kept_from_being_saved_is_known_from_the_record(make):
    """The evaluation of step 2 is on record, the state that was saved knows nothing of it."""
    gains = {1: (1.0, 0.1, 0.0), 2: (2.0, 0.2, 0.0)}
    evaluations, _ = make(gains)
    saved = evaluations(after(1, evaluations(after(0))))
    expected = evaluations(after(2, saved))
    evaluations, asked = make(gains)  # another process
    found = evaluations(after(2, saved))
    assert asked == [] and int(found.best_step) == int(found.best["step"]) == 2
    assert float(found.best_score) == float(expected.best_score)
    # What the state knows already is left alone.
    assert evaluations(found) is found


def test_a_restart_shares_compiled_programs_before_it_builds(monkeypatch, tmp_path):
    """A new run that is refused leaves nothing behind, compiled programs included."""
    calls = []
    monkeypatch.setattr(train, "is_remote", lambda path: True)
    monkeypatch.setattr(train.platform, "keep_compilations", lambda *where: calls.append(where))

    def build(settings, done, shared):
        calls.append("build")
        raise InputError("model.path: expected one; received none")

    monkeypatch.setattr(train, "build", build)
    place, settings = tmp_path / "run", Settings()
    with pytest.raises(InputError):
        train.train_run(settings, str(place), "train")
    assert calls == [(), "build"] and not place.exists()
    workdir = Workdir(str(place))
    workdir.claim(flatten(settings))
    workdir.let_go()
    calls.clear()
    with pytest.raises(InputError):
        train.train_run(settings, str(place), "train")
    assert calls == [(), (str(place / "compiled"),), "build"]


@pytest.mark.parametrize("restored", [None, 7])
def test_a_restart_prepares_the_steps_that_are_left(monkeypatch, tmp_path, restored):
    """Another machine in the place of a lost one encodes no prompts of steps that are done."""
    place, settings, asked = tmp_path / "run", Settings(), []

    def build(settings, done, shared):
        asked.append((done, shared))
        raise InputError("model.path: expected one; received none")

    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(train.Checkpoints, "latest", lambda checkpoints: restored)
    if restored is not None:
        workdir = Workdir(str(place))
        workdir.claim(flatten(settings))
        workdir.let_go()
    with pytest.raises(InputError):
        train.train_run(settings, str(place), "train")
    assert asked == [(restored or 0, str(place / "embeddings"))]


@pytest.fixture
def scored(make, tmp_path):
    """A run whose base model was scored, and check(prompts, names) of its prompts as they are later; what is said."""
    evaluations, _ = make({})
    evaluations(after(0))
    workdir, said = Workdir(str(tmp_path)), []

    def check(prompts=PROMPTS, names=NAMES):
        check_base_scores(workdir, prompts, 1, names, said.append)
        return said

    return check


def test_the_base_model_s_scores_are_of_the_prompts_that_they_were_taken_on(scored):
    assert scored() == []
    for changes in ({"text": "another"}, {"source": "other"}, {"metadata": {"tag": "thing"}}):
        edited = [*PROMPTS[:2], dataclasses.replace(PROMPTS[2], **changes), PROMPTS[3]]
        with pytest.raises(InputError, match="base_scores.json: expected the held-out prompts .*"):
            scored(edited)
    with pytest.raises(InputError, match="expected the held-out prompts"):
        scored(PROMPTS[::-1])
    with pytest.raises(InputError, match="expected the 4 held-out images .*; received 3 by"):
        scored(PROMPTS[:3])
    with pytest.raises(
        InputError, match="expected scores of large, small; received large, small, heldout"
    ):
        scored(names=NAMES[:2])


def test_scores_of_an_older_run_are_told_by_their_number_and_the_images_kept(scored, tmp_path):
    """The record has no hash then; image 0 is the one that is kept."""
    file = tmp_path / "base_scores.json"
    record = json.loads(file.read_text())
    del record["prompts"]
    file.write_text(json.dumps(record))
    edited = [*PROMPTS[:3], Prompt("another", "things")]
    assert len(scored(edited)) == 1 and "older" in scored()[0]
    with pytest.raises(InputError, match="expected the 4 held-out images"):
        scored([*PROMPTS, PROMPTS[0]])
    with pytest.raises(InputError, match="expected the held-out prompts"):
        scored([Prompt("another", "things"), *PROMPTS[1:]])
    (tmp_path / "samples" / "prompts.json").write_text("[[")
    scored([Prompt("another", "things"), *PROMPTS[1:]])


@pytest.mark.parametrize("changed", ["prompts", "commit"])
def test_a_resume_on_other_inputs_is_refused_before_anything_is_written(
    scored, changed, tmp_path, monkeypatch
):
    workdir, settings = Workdir(str(tmp_path)), Settings()
    workdir.write_json("config.json", flatten(settings))
    workdir.write_json("run.json", {"downloads": {"owner/model": "old", "owner/gone": "any"}})
    prompts = PROMPTS[::-1] if changed == "prompts" else PROMPTS
    scorer = SimpleNamespace(rewards=[SimpleNamespace(name=name) for name in NAMES])
    evaluator = SimpleNamespace(prompts=prompts, images_per_prompt=1, scorer=scorer)
    held = []

    def build(settings, done, shared):
        held.append(dict(hub._held))
        return SimpleNamespace(evaluator=evaluator, settings=settings)

    monkeypatch.setattr(train.platform, "keep_compilations", lambda *where: None)
    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(hub, "_commits", {"owner/model": "old", "owner/new": "first"})
    line = "expected the held-out prompts"
    if changed == "commit":
        hub._commits["owner/model"] = "new"
        line = "owner/model: expected commit old, which the run began with; received new"
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(InputError, match=line) as caught:
        train.train_run(settings, str(tmp_path), "train")
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    # The run's own commits are what its names without a revision mean, and no longer than it lasts.
    assert held == [{"owner/model": "old", "owner/gone": "any"}] and hub._held == {}
