"""Planted signal and noise with every cosine known, tables by hand, and a folder of steps that a kill leaves behind."""

import json

import numpy as np
import pytest

from marble_jax.config import HarmonizeSettings
from marble_jax.errors import InputError
from marble_jax.harmonize.balancers import Marble
from marble_jax.harmonize.registry import BALANCERS
from marble_jax.storage.workdir import Workdir
from tools.harmony import batch_sizes, bootstrap, out_of_sample, results, rows, signal, table
from tools.harmony.__main__ import main
from tools.harmony.cleaned import cleaned_weights
from tools.harmony.collect import DESCRIPTION, claim, measured, save, step_file
from tools.harmony.policy import SUMS, one_over_std
from tools.harmony.steps import products, read_steps, steps_of
from tools.harmony.units import StepGradients, Units, unit_sizes

REWARDS = ("a", "b", "c")
NUM_STEPS, HALF = 12, 6
# Signals of a, b, c and the three sums; b and c oppose each other.
SIGNAL = np.array(
    [
        [1.0, 0.0, 0.0],
        [0.6, 0.8, 0.0],
        [0.3, -0.4, 0.0],
        [1.0, 1.0, 0.0],
        [0.0, -1.0, 0.5],
        [0.2, 0.1, 0.1],
    ]
)
# Errors, which objectives share: those of a and b are alike.
ERROR = np.array(
    [
        [3.0, 0.0, 0.0, 0.0],
        [2.5, 1.0, 0.0, 0.0],
        [0.0, 0.0, 4.0, 0.0],
        [1.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 2.0],
        [0.0, 1.0, 0.0, 1.0],
    ]
)
S, N = SIGNAL @ SIGNAL.T, ERROR @ ERROR.T
UPPER = np.triu_indices(3, 1)


def planted(num_steps=NUM_STEPS, rewards=REWARDS):
    """Steps whose errors are orthogonal to the signals and to each other's, so that nothing is left to chance."""
    width = ERROR.shape[1]
    gradients = np.zeros((num_steps, len(SIGNAL), 3 + width * num_steps), np.float32)
    gradients[:, :, :3] = SIGNAL
    for t in range(num_steps):
        gradients[t, :, 3 + width * t : 3 + width * (t + 1)] = ERROR
    return steps_of(rewards, gradients)


def cosines(gram):
    norm = np.sqrt(np.diagonal(gram))
    return gram / np.outer(norm, norm)


@pytest.fixture(scope="module")
def steps():
    return planted()


def test_the_signal_is_found_under_the_noise(steps):
    np.testing.assert_allclose(signal.signal_gram(steps), S, atol=1e-6)
    np.testing.assert_allclose(signal.pair_cosines(steps)[UPPER], cosines(S)[UPPER], atol=1e-6)
    own = np.diagonal(S) / np.diagonal(S + N)
    np.testing.assert_allclose(signal.own_cosines(steps), own, atol=1e-6)
    np.testing.assert_allclose(signal.in_sample_cosines(steps), cosines(S + N), atol=1e-6)
    # In sample a and b look more alike than they are, and c looks apart from b, which it opposes.
    assert signal.in_sample_cosines(steps)[0, 1] > 0.8 > cosines(S)[0, 1]
    assert signal.in_sample_cosines(steps)[1, 2] > -0.05 > -0.2 > cosines(S)[1, 2]


def test_a_step_that_is_drawn_twice_makes_no_pair_with_itself(steps):
    drawn = np.array([2] * 3 + [0] * 3 + [1] * 6)
    np.testing.assert_allclose(signal.signal_gram(steps, drawn), S, atol=1e-6)
    expected = np.diagonal(S) / np.diagonal(S + N)
    np.testing.assert_allclose(signal.own_cosines(steps, drawn), expected, atol=1e-6)


def test_a_reward_that_is_missing_from_some_steps_is_estimated_from_the_others(steps):
    gradients_gone = np.array(steps.active)
    gradients_gone[::2, 2] = False
    partly = type(steps)(steps.rewards, steps.cross, gradients_gone, steps.advantages, {})
    np.testing.assert_allclose(signal.signal_gram(partly), S, atol=1e-6)
    gradients_gone[1:, 2] = False
    assert np.isnan(signal.signal_gram(partly)[2, 2])


def test_noise_alone_gives_the_correlation_of_the_advantages():
    """Without a signal and with one gradient a sample, in-sample cosines are the advantages' correlations."""
    rng = np.random.default_rng(0)
    advantages = rng.normal(size=(4, 60, 5)).astype(np.float32)
    advantages[:, :, 1] += advantages[:, :, 0]
    advantages[:, 30:, 3] = 0
    # Samples whose gradients are orthogonal and of length 1.
    gradients = advantages.transpose(0, 2, 1)
    steps = steps_of(("a", "b"), gradients, advantages=advantages)
    expected = signal.in_sample_cosines(steps)
    np.testing.assert_allclose(signal.advantage_correlations(steps), expected, atol=1e-6)
    assert 0.6 < expected[0, 1] < 0.8


def test_directions_are_judged_by_the_other_half(steps):
    made = {row.name: row for row in rows.rows()}
    weights = {"mean": np.array([1, 1, 1, 0, 0, 0]) / 3, "raw_sum": np.eye(6)[3]}
    for name, w in weights.items():
        judged = {
            length: out_of_sample.described(judgement, judgement, REWARDS)
            for length, judgement in out_of_sample.judge(made[name], steps, (1, 4, 99)).items()
        }
        assert set(judged) == {1, 4}
        for length in (1, 4):
            norm = np.sqrt(w @ S @ w + w @ N @ w / length)
            truth = np.sqrt(np.diagonal(S + N / HALF))
            expected = (S @ w / norm / truth)[:3]
            found = [judged[length]["cosines"][reward]["mean"] for reward in REWARDS]
            np.testing.assert_allclose(found, expected, atol=1e-6)
            worst = judged[length]["worst_cosine"]
            assert worst["mean"] == pytest.approx(expected.min(), abs=1e-6)
            assert judged[length]["opposing"]["mean"] == float(expected.min() < 0)
            # Against itself there is nothing to gain, in any draw.
            gain = judged[length]["worst_cosine_gain"]
            assert gain == {"mean": 0.0, "low": 0.0, "high": 0.0}
    truth = out_of_sample.truth_cosines(steps.halves()[1])
    np.testing.assert_allclose(truth, np.sqrt(np.diagonal(S) / np.diagonal(S + N / HALF))[:3])


def test_halves_share_no_step(steps):
    """What a half says is judged by nothing that it holds: the own noise of a direction never meets itself."""
    for split in out_of_sample.splits(steps):
        np.testing.assert_allclose(
            split.between, np.broadcast_to(S[None, :, None], split.between.shape), atol=1e-6
        )


def test_windows():
    rng = np.random.default_rng(0)
    sets = out_of_sample.windows(4, np.array([3, 0, 1, 1, 2, 1]), rng)
    assert set(sets.sum(axis=1)) == {4.0} and set(np.unique(sets)) == {0.0, 1.0}
    assert not sets[:, 1].any() and sets[:, 0].mean() > sets[:, 2].mean()
    # Fewer different steps than asked for: all of them.
    assert out_of_sample.windows(4, np.array([5, 1, 0, 0, 0, 0]), rng).sum(axis=1).max() == 2
    np.testing.assert_array_equal(
        out_of_sample.windows(1, np.array([2, 0, 1]), rng), [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    )


def test_every_balancer_has_a_row():
    made = {row.name: row for row in rows.rows()}
    covered = {name for name, _, _ in rows.BALANCER_ROWS.values()}
    assert covered | set(rows.SAME_DIRECTION) == set(BALANCERS)
    assert set(rows.SAME_DIRECTION.values()) <= set(made) and set(SUMS) <= set(made)
    assert set(batch_sizes.ROWS) <= set(made)
    assert "marble_weighted" not in made
    assert "marble_weighted" in {row.name for row in rows.rows((1.0, 2.0, 1.0))}


def test_the_oracle_balances_the_signal_and_the_solve_in_sample_the_noise():
    """a and b want the same, c something else; their errors are apart, so in sample all three seem to."""
    gradients = np.zeros((8, 6, 2 + 3 * 8), np.float32)
    gradients[:, 0:2, 0] = 1.0
    gradients[:, 2, 1] = 1.0
    for t in range(8):
        gradients[t, :3, 2 + 3 * t : 5 + 3 * t] = 5 * np.eye(3)
    gradients[:, 3:, 0] = 1.0
    first, second = steps_of(REWARDS, gradients).halves()
    made = {row.name: row for row in rows.rows()}
    for name, share in (
        ("marble", 1 / 3),
        ("marble_averaged", 1 / 3),
        ("oracle", 1 / 2),
    ):
        weights = made[name].weights(first, second)
        assert weights.shape == (4, 6) and not weights[:, 3:].any()
        np.testing.assert_allclose(weights[:, 2], share, atol=0.01, err_msg=name)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    # All gradients are of one length and one share of signal, 1 / 26 of the square.
    scaled = made["oracle_scaled"].weights(first, second)
    np.testing.assert_allclose(scaled[:, 2], 26**0.5 / 2, rtol=1e-3)


def test_the_cleaned_solve_finds_what_the_oracle_knows():
    """The same rewards: steps after the first few tell that a and b are one."""
    gradients = np.zeros((16, 6, 2 + 3 * 16), np.float32)
    gradients[:, 0:2, 0] = 1.0
    gradients[:, 2, 1] = 1.0
    for t in range(16):
        gradients[t, :3, 2 + 3 * t : 5 + 3 * t] = 5 * np.eye(3)
    steps = steps_of(REWARDS, gradients)
    settings = HarmonizeSettings(shrinkage=0.0)
    weights = cleaned_weights(steps, Marble(), settings)
    np.testing.assert_allclose(weights[0, 2], 1 / 3, atol=0.01)
    np.testing.assert_allclose(weights[4:, 2], 1 / 2, atol=0.01)
    in_sample = cleaned_weights(steps, Marble(), HarmonizeSettings(shrinkage=1.0))
    np.testing.assert_allclose(in_sample[:, 2], 1 / 3, atol=0.01)
    averaged = cleaned_weights(
        steps, Marble(), HarmonizeSettings(shrinkage=0.0, smooth_exact=True, rho=0.9)
    )
    assert np.all(np.diff(averaged[3:, 2]) > 0) and 1 / 3 < averaged[-1, 2] < 1 / 2


def test_conflict_by_batch_size_by_hand():
    """One unit whose mean opposes b (cosines 2/3 and -1/3 of an update of length 3/2), one that has no b at all."""
    gram = np.zeros((2, 5, 5))
    gram[:, :2, :2] = [[16.0, -4.0], [-4.0, 1.0]]
    gram[0, 1, 1] = 4.0
    gram[:, 2, 2] = 1.0
    counts = np.ones((2, 5))
    counts[1, 1] = 0
    made = {row.name: row for row in rows.rows()}
    worst, conflict = batch_sizes.update_cosines(made["mean"], gram, counts, 2)
    # (a + b) / 2: along a 16 - 4, along b -4 + 4.
    square = 16 - 8 + 4
    np.testing.assert_allclose(worst, [0 / 2 / np.sqrt(square), 1.0], atol=1e-6)
    gram[0, 1, 1] = 1.44
    worst, conflict = batch_sizes.update_cosines(made["mean"], gram, counts, 2)
    expected = (-4 + 1.44) / 1.2 / np.sqrt(16 - 8 + 1.44)
    np.testing.assert_allclose(worst, [expected, 1.0], atol=1e-6)
    np.testing.assert_array_equal(conflict, [1.0, 0.0])
    worst, conflict = batch_sizes.update_cosines(made["marble"], gram, counts, 2)
    assert worst.min() >= 0 and not conflict.any()
    # The single advantage has no inner product with a reward here; where it is missing there is no update.
    counts[0, 2] = 0
    worst, _ = batch_sizes.update_cosines(made["raw_sum"], gram, counts, 2)
    assert np.isnan(worst[0]) and worst[1] == 0


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(60):
        values = rng.normal(size=(20, 3)) + 0.5
        found = batch_sizes._over_steps(values, -9.0, 9.0)
        hits += found["low"] < 0.5 < found["high"]
    assert 50 <= hits <= 60
    assert bootstrap.interval(0.99, 0.1, -1.0, 1.0)["high"] == 1.0
    assert bootstrap.interval(float("nan"), 0.1)["mean"] is None


def test_products_match_numpy():
    gradients = np.random.default_rng(0).normal(size=(3, 2, 70_000)).astype(np.float32)
    wide = gradients.astype(np.float64)
    expected = np.einsum("tip,ujp->tiuj", wide, wide)
    np.testing.assert_allclose(products(gradients), expected, rtol=1e-9, atol=1e-9)


def test_short_vectors_have_the_inner_products_of_the_gradients(steps):
    np.testing.assert_allclose(products(steps.vectors()), steps.cross, atol=1e-6)


def test_unit_sizes():
    assert unit_sizes(9, 72, 432) == (9, 18, 36, 72, 144, 432)
    assert unit_sizes(72, 72, 72) == (72,)
    assert unit_sizes(4, 12, 24) == (4, 12, 24)
    with pytest.raises(InputError, match="divisor of the 72 samples.*received 10 .*choice 9"):
        unit_sizes(10, 72, 432)


def test_one_over_the_standard_deviation():
    values = np.array([[1.0, 5.0, 0.0], [3.0, 5.0, 9.0]])
    valid = np.array([[True, True, False], [True, True, True]])
    np.testing.assert_allclose(one_over_std(values, valid), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(one_over_std(values[:1], valid[:1]), [1.0, 1.0, 1.0])


def folder_of(path, steps=6):
    """A folder of planted steps, as collecting leaves it."""
    claim(
        path,
        {
            "workdir": "runs/x",
            "policy": "base",
            "step": 0,
            "anchors": False,
            "rewards": list(REWARDS),
            "objectives": [*REWARDS, *SUMS],
            "reward_weights": [],
            "samples": 8,
            "units": [4, 8],
        },
    )
    whole = planted(steps)
    width = 3 + ERROR.shape[1] * steps
    for t in range(steps):
        gradients = np.zeros((6, width), np.float32)
        gradients[:, :3] = SIGNAL
        gradients[:, 3 + 4 * t : 7 + 4 * t] = ERROR
        gram = whole.grams[t]
        units = {
            4: Units(np.stack([gram, gram]), np.full((2, 6), 4.0)),
            8: Units(gram[None], np.full((1, 6), 8.0)),
        }
        save(
            step_file(path, t),
            StepGradients(gradients, np.full(6, 8.0), units),
            np.ones((4, 6), np.float32),
            np.ones((4, 6), bool),
        )
    return path


def test_a_folder_is_read_back_and_told_as_text_and_json(tmp_path):
    folder = folder_of(tmp_path / "base")
    (folder / ".step_00006.npz.partial").write_bytes(b"cut")
    assert measured(folder) == list(range(6))
    steps = read_steps(folder)
    np.testing.assert_allclose(signal.signal_gram(steps), S, atol=1e-6)
    assert len(read_steps(folder, 4)) == 4
    found = results.analyse(steps, json.loads((folder / DESCRIPTION).read_text()))
    json.dumps(found, allow_nan=False)
    written = table.text(found)
    assert "the base model" in written and "±" in written and "8 (step)" in written
    assert [row["name"] for row in found["batch_sizes"]] == list(batch_sizes.ROWS)
    # Only whole halves hold a window: of three steps there is no mean of eight.
    assert set(found["out_of_sample"][0]["windows"]) == {"1"}


def test_a_folder_of_another_measurement_is_refused(tmp_path, capsys):
    folder = folder_of(tmp_path / "base")
    recorded = json.loads((folder / DESCRIPTION).read_text())
    claim(folder, recorded)
    with pytest.raises(InputError, match="same measurement .policy 'current'.*with policy 'base'"):
        claim(folder, recorded | {"policy": "current"})
    with pytest.raises(InputError, match="at least 4 measured steps; received 0"):
        read_steps(tmp_path)
    assert main(["--workdir=nowhere", f"--out={tmp_path}"]) == 2
    assert main(["--workdir=nowhere", "--out=x", "--policy=ema"]) == 2
    assert main(["--workdir=nowhere", "--out=x", "--steps=2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("harmony: ") for line in lines)
    assert "expected one of current, rollout, base" in lines[1] and "--steps" in lines[2]


def test_a_workdir_holds_one_measurement_a_policy(tmp_path):
    workdir = Workdir(tmp_path)
    base = {"policy": "base", "step": 0, "anchors": False, "rewards": ["a"], "figure": float("nan")}
    for entry in (base, base | {"policy": "current", "step": 60}, base | {"figure": 2.0}):
        results.add_to_workdir(workdir, entry)
    recorded = json.loads((tmp_path / results.FILE).read_text())
    assert [(m["policy"], m["figure"]) for m in recorded["measurements"]] == [
        ("current", None),
        ("base", 2.0),
    ]
    (tmp_path / results.FILE).write_text('{"version": 99}')
    with pytest.raises(InputError, match="expected version 1; received 99"):
        results.add_to_workdir(workdir, base)
