"""Balancers by name, and the balancer of a run from its settings."""

import pytest

from marble_jax.config import HarmonizeSettings
from marble_jax.errors import InputError
from marble_jax.harmonize.balancers import Fixed, Marble
from marble_jax.harmonize.registry import balancer_of, make_balancer

NAMES = ("pickscore", "hpsv2", "clipscore", "ocr", "geneval")


def of(**settings):
    return balancer_of(HarmonizeSettings(**settings), NAMES)


def test_balancers_get_their_settings():
    weights = (1.0, 2.0, 1.0, 1.0, 1.0)
    marble = of(reward_weights=weights, alpha_floor=0.1)
    assert isinstance(marble, Marble)
    assert marble.reward_weights == weights and marble.alpha_floor == 0.1
    alpha = (0.2,) * 5
    fixed = of(balancer="fixed", fixed_alpha=alpha)
    assert isinstance(fixed, Fixed) and fixed.alpha == alpha
    for name in ("equal", "upgrad", "pcgrad", "cagrad", "imtl", "nash"):
        assert of(balancer=name)
    with pytest.raises(InputError, match="fixed alpha: expected one share a reward"):
        of(balancer="fixed")
    with pytest.raises(
        InputError, match="reward_weights: expected one number for each of 5 rewards .*; received 2"
    ):
        of(reward_weights=(1.0, 1.0))


def test_groups_are_numbered_by_first_appearance():
    groups = ("taste", "taste", "match", "own", "match")
    assert of(groups=groups).groups == (0, 0, 1, 2, 1)
    assert of().groups == ()
    with pytest.raises(
        InputError, match="harmonize.groups: expected one name for each of 5 rewards .*; received 2"
    ):
        of(groups=("a", "b"))
    with pytest.raises(
        InputError, match="groups: expected none with another balancer than marble; .*with 'equal'"
    ):
        of(groups=groups, balancer="equal")


def test_by_name():
    assert make_balancer("marble", alpha_floor=0.1).alpha_floor == 0.1
    assert make_balancer("equal", normalize=True) == Fixed(normalize=True)
    assert make_balancer("fixed", alpha=(0.5, 0.5)).alpha == (0.5, 0.5)
    names = ("upgrad", "pcgrad", "cagrad", "imtl", "nash", "weighted_sum")
    kinds = ["UPGrad", "PCGrad", "CAGrad", "IMTLG", "NashMTL", "WeightedSum"]
    assert [type(make_balancer(name)).__name__ for name in names] == kinds


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_balancer("mgda"), "balancer: expected one of marble.*received 'mgda'"),
        (
            lambda: make_balancer("marble", floor=0.1),
            "setting of the balancer 'marble': expected one of .*received 'floor'",
        ),
        (lambda: make_balancer("equal", alpha=(1.0,)), "setting of the balancer 'equal'"),
        (lambda: make_balancer("fixed"), "fixed alpha: expected one share a reward"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
