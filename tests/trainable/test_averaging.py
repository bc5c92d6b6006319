"""Decay schedules against hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.config import RolloutPolicySettings
from marble_jax.errors import InputError
from marble_jax.trainable import averaging


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("copy", {}, {0: 0, 10: 0, 10000: 0}),
        ("linear_capped", {}, {0: 0, 1: 0.001, 500: 0.5, 950: 0.95, 5000: 0.95}),
        ("linear_capped", {"cap": 0.5}, {499: 0.499, 501: 0.5}),
        ("linear_capped", {"rate": 0.01, "delay": 10}, {5: 0.05, 20: 0.2}),
        ("delayed_linear", {"rate": 0.01, "delay": 10}, {5: 0, 10: 0, 20: 0.1}),
        ("delayed_linear", {}, {0: 0, 74: 0, 75: 0, 76: 0.0075, 175: 0.75, 1000: 0.999}),
    ],
)
def test_rollout_decay(name, settings, expected):
    decay = averaging.rollout_decay(name, **settings)
    traced = jax.jit(decay)
    for step, value in expected.items():
        assert float(decay(step)) == pytest.approx(value, abs=1e-6)
        assert float(traced(jnp.asarray(step))) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The paper's: min(0.001 s, 0.95).
        ({}, {1: 0.001, 500: 0.5, 5000: 0.95}),
        # The shipped pipelines': DiffusionNFT's cap.
        ({"cap": 0.5}, {499: 0.499, 501: 0.5}),
        ({"rate": 0.01}, {5: 0.05, 5000: 0.95}),
        # DiffusionNFT's: 0 for s < 75, else min(0.0075 (s - 75), 0.999).
        ({"schedule": "delayed_linear"}, {74: 0, 75: 0, 76: 0.0075, 275: 0.999, 5000: 0.999}),
        ({"schedule": "delayed_linear", "delay": 10}, {10: 0, 11: 0.0075}),
        ({"schedule": "delayed_linear", "rate": 0.0075, "cap": 0.5}, {76: 0.0075, 275: 0.5}),
        ({"schedule": "copy"}, {1: 0, 5000: 0}),
    ],
)
def test_a_schedule_of_a_run_is_the_published_one_unless_more_is_said(settings, expected):
    decay = averaging.rollout_decay_of(RolloutPolicySettings(**settings))
    for step, value in expected.items():
        assert float(decay(step)) == pytest.approx(value, abs=1e-6)


def test_a_cap_of_another_schedule_is_not_taken_over():
    """`--config=embedded --config.rollout_policy.schedule=delayed_linear` keeps the preset's cap."""
    mixed = RolloutPolicySettings(schedule="delayed_linear", cap=0.5)
    with pytest.raises(
        InputError, match=r"rollout_policy.cap: expected 0, .*0.999, or a rate .*0.5$"
    ):
        averaging.rollout_decay_of(mixed)


def test_ema_decay_warms_up():
    assert float(averaging.ema_decay(1, 0.9)) == pytest.approx(2 / 11)
    assert float(averaging.ema_decay(79, 0.9)) == pytest.approx(80 / 89)
    assert float(averaging.ema_decay(80, 0.9)) == pytest.approx(0.9)


def test_soft_update_keeps_dtype():
    slow, current = {"a": jnp.array([1.0, 1.0], jnp.bfloat16)}, {"a": jnp.array([3.0, 5.0])}
    got = averaging.soft_update(slow, current, 0.75)
    np.testing.assert_allclose(got["a"].astype(jnp.float32), [1.5, 2.0])
    assert got["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "linear",
            {},
            "rollout decay: expected one of copy, linear_capped, delayed_linear; received 'linear'",
        ),
        (
            "linear_capped",
            {"cap": 1.5},
            r"rollout decay cap: expected a number in \[0, 1\]; received 1.5",
        ),
    ],
)
def test_bad_input(name, settings, message):
    with pytest.raises(InputError, match=message):
        averaging.rollout_decay(name, **settings)


@pytest.mark.parametrize(("name", "cap", "steps"), [("copy", None, 7), ("linear_capped", 0.3, 40)])
def test_lag_is_the_mean_age_of_the_policies_in_the_rollout_policy(name, cap, steps):
    """Each policy's number takes the place of its weights; the average then tells how old it is."""
    decay = averaging.rollout_decay(name, rate=0.02, cap=cap)
    slow = {"number": jnp.zeros(())}
    for step in range(1, steps + 1):
        slow = averaging.soft_update(slow, {"number": jnp.float32(step)}, decay(step))
    lag = averaging.rollout_lag(decay, steps)
    assert lag == pytest.approx(steps - float(slow["number"]), abs=1e-4)
    if name == "copy":
        assert lag == 0 and averaging.rollout_lag(decay, 0) == 0
