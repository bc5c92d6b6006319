"""Batches of one size: every index once, then the last one again."""

import numpy as np
import pytest

from marble_jax.batches import batch_indices, batches_of, pack_groups
from marble_jax.errors import InputError


@pytest.mark.parametrize(
    "count, size, expected",
    [
        (6, 3, [[0, 1, 2], [3, 4, 5]]),
        (5, 3, [[0, 1, 2], [3, 4, 4]]),
        (1, 4, [[0, 0, 0, 0]]),
        (4, 1, [[0], [1], [2], [3]]),
        (0, 3, []),
    ],
)
def test_batches_cover_every_index_and_are_all_of_one_size(count, size, expected):
    assert [b.tolist() for b in batch_indices(count, size)] == expected


def test_batches_of_a_tree_repeat_the_last_sample_of_every_leaf():
    tree = {"x": np.arange(5), "y": [np.arange(10).reshape(5, 2)]}
    first, last = batches_of(tree, 5, 3)
    assert first["x"].tolist() == [0, 1, 2] and last["x"].tolist() == [3, 4, 4]
    assert last["y"][0].tolist() == [[6, 7], [8, 9], [8, 9]]


def test_a_batch_without_samples_is_refused():
    with pytest.raises(InputError, match="batch: expected 1 or more; received 0"):
        batch_indices(3, 0)


@pytest.mark.parametrize(
    "labels, size, expected",
    [
        ("aabbcc", 4, [[0, 1, 2, 3], [4, 5]]),
        # Wherever they stand; in the order of their first ones.
        ("abcabc", 2, [[0, 3], [1, 4], [2, 5]]),
        ("abbbc", 2, [[0], [1, 2, 3], [4]]),
        ("", 2, []),
    ],
)
def test_packed_groups_stay_together(labels, size, expected):
    assert pack_groups(labels, size) == expected
