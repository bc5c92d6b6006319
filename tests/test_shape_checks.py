"""The run-time check of shapes sees what it is for, and leaves structures of arrays alone."""

import dataclasses

import numpy as np
import pytest
import shape_checks
from jaxtyping import Float, TypeCheckError, jaxtyped


@jaxtyped(typechecker=shape_checks.check)
def scaled(
    values: Float[np.ndarray, "n k"], weights: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "n k"]:
    return values * weights if len(values) > 1 else values[0]


@jaxtyped(typechecker=shape_checks.check)
@dataclasses.dataclass
class Pair:
    left: Float[np.ndarray, " k"]


def test_arguments_and_results_are_held_to_their_shapes():
    assert scaled(np.ones((4, 2)), np.ones(2)).shape == (4, 2)
    with pytest.raises(TypeCheckError, match="weights"):
        scaled(np.ones((4, 2)), np.ones(4))
    with pytest.raises(TypeCheckError, match="return"):
        scaled(np.ones((1, 2)), np.ones(2))
    with pytest.raises(TypeCheckError, match="values"):
        scaled(np.ones((4, 2), int), np.ones(2))


def test_a_structure_may_hold_what_stands_for_an_array():
    assert Pair(None).left is None


def length(values: np.ndarray) -> int:
    return len(values)


def test_inner_functions_are_decorated_where_they_state_a_shape():
    decorate = shape_checks.but_inner_functions(jaxtyped)(typechecker=shape_checks.check)

    def plain(values: np.ndarray) -> int:
        return len(values)

    def shaped(values: "Float[np.ndarray, ' k']") -> int:
        return len(values)

    assert decorate(plain) is plain and decorate(length) is not length
    assert decorate(shaped)(np.ones(3)) == 3
    with pytest.raises(TypeCheckError, match="values"):
        decorate(shaped)(np.ones((3, 2)))


def test_the_flag_covers_the_mathematics(request):
    """With the flag on, a function of the package refuses samples last."""
    if not request.config.getoption("--check-shapes"):
        pytest.skip("without --check-shapes")
    from marble_jax.objectives.advantages import per_reward

    with pytest.raises(TypeCheckError, match="valid"):
        per_reward(np.zeros((3, 2)), np.ones((2, 3), bool), np.zeros(3))
