"""Checkpoints leaf by leaf: an ordinary Orbax checkpoint on disk, few leaves in memory, damage in one line."""

from __future__ import annotations

import weakref

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from marble_jax.errors import InputError
from marble_jax.storage.leaves import Leaf, group_counts, leaf_shapes, read_leaves, save_leaves

RNG = np.random.default_rng(0)
ARRAYS = {
    ("run", "attn.to_q", "kernel"): RNG.standard_normal((3, 4, 5)).astype(np.float32),
    ("run", "attn.to_q", "bias"): RNG.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
    ("table",): RNG.standard_normal((2, 7)).astype(np.float16),
    ("ids",): np.arange(4, dtype=np.int32),
}


@pytest.fixture
def saved(tmp_path):
    leaves = {path: Leaf(a.shape, a.dtype, lambda a=a: a.copy()) for path, a in ARRAYS.items()}
    save_leaves(tmp_path / "params", leaves)
    return tmp_path / "params"


def test_every_bit_comes_back(saved):
    shapes = leaf_shapes(saved)
    assert {p: (s.shape, s.dtype) for p, s in shapes.items()} == {
        p: (a.shape, a.dtype) for p, a in ARRAYS.items()
    }
    found = read_leaves(saved, ARRAYS)
    for path, array in ARRAYS.items():
        assert found[path].dtype == array.dtype and found[path].tobytes() == array.tobytes()
    assert set(read_leaves(saved, [("table",)])) == {("table",)}


def test_plain_orbax_opens_it(saved):
    tree = ocp.StandardCheckpointer().restore(saved)
    np.testing.assert_array_equal(
        tree["run"]["attn.to_q"]["kernel"], ARRAYS["run", "attn.to_q", "kernel"]
    )


def test_groups_share_a_limit():
    assert group_counts([]) == []
    assert group_counts([1, 2, 3, 4, 5], limit=5) == [2, 1, 1, 1]
    assert group_counts([9, 1, 1, 9], limit=5) == [1, 2, 1]
    assert group_counts([0, 0, 5], limit=5) == [3]


def test_one_group_of_leaves_is_in_memory_at_a_time(tmp_path):
    alive, most = 0, 0

    def gone(size):
        nonlocal alive
        alive -= size

    def read():
        nonlocal alive, most
        array = np.zeros(40_000_000, np.uint8)  # two of them are above the limit of a group
        weakref.finalize(array, gone, array.nbytes)
        alive += array.nbytes
        most = max(most, alive)
        return array

    save_leaves(
        tmp_path / "params", {(f"leaf{i}",): Leaf((40_000_000,), np.uint8, read) for i in range(4)}
    )
    assert most == 40_000_000


def test_what_a_leaf_raises_comes_through_and_leaves_nothing(tmp_path):
    def read():
        raise InputError("tensor 'x': expected this; received that")

    with pytest.raises(InputError, match="tensor 'x': expected this; received that"):
        save_leaves(tmp_path / "params", {("a",): Leaf((2,), np.float32, read)})
    assert not (tmp_path / "params").exists()


def test_damage(saved, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: expected an Orbax checkpoint; received"):
        leaf_shapes(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"params: expected leaf 'run/other'; received a checkpoint without it"
    ):
        read_leaves(saved, [("run", "other")])
    for file in (saved / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    for file in (saved / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(
        InputError, match=r"params: expected leaf 'table' intact|expected an Orbax checkpoint"
    ):
        read_leaves(saved, [("table",)])
