"""Sizes of a mesh, and samples dealt out to devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((4, 2, 1), (4, 2, 1)),
    ],
)
def test_one_size_follows_from_the_others(given, expected):
    assert device_mesh.mesh_sizes(8, *given) == expected
    mesh = device_mesh.abstract_mesh(8, *given)
    assert (
        tuple(mesh.shape.values()) == expected
        and device_mesh.batch_shards(mesh) == expected[0] * expected[1]
    )


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        ((8, 1, 1), 16, 8),
        ((2, 2, 2), 16, 8),
        ((1, 1, 8), 24, 8),
        ((2, 2, 2), 12, 4),
        ((1, 1, 8), 12, 1),
    ],
)
def test_images_are_split_over_all_devices_that_come_out_even(given, count, expected):
    assert device_mesh.image_shards(device_mesh.abstract_mesh(8, *given), count) == expected


@pytest.mark.parametrize(
    ("count", "given", "nearest"),
    [
        (8, (3, 1, 1), "8 x 1 x 1"),
        (16, (-1, 5, 1), "4 x 4 x 1"),
        (8, (-1, -1, 2), "4 x 1 x 2|2 x 2 x 2|1 x 4 x 2"),
        (8, (8, 0, 1), "8 x 1 x 1"),
        (6, (1, 2, 4), "1 x 2 x 3"),
        (1, (-2, 1, 1), "1 x 1 x 1"),
        (12, (2, 2, 2), "3 x 2 x 2|2 x 3 x 2|2 x 2 x 3"),
    ],
)
def test_sizes_that_do_not_multiply_out(count, given, nearest):
    with pytest.raises(
        InputError,
        match=f"data x fsdp x tensor = {count} .*received {given[0]} x {given[1]} x "
        rf"{given[2]} \(nearest valid ({nearest})\)",
    ):
        device_mesh.mesh_sizes(count, *given)


def test_a_single_device_keeps_its_samples():
    batch = {"x": jnp.arange(6.0)}
    found = device_mesh.SINGLE_DEVICE.map_shards(
        lambda tree: jnp.sum(tree["x"]), device_mesh.SINGLE_DEVICE.split(batch)
    )
    assert found.shape == () and float(device_mesh.SINGLE_DEVICE.all_reduce(found)) == 15


def test_an_array_is_read_in_parts():
    mesh, asked = device_mesh.make_mesh(), []

    class Stored:
        shape = (4, 2)

        def __getitem__(self, index):
            asked.append(index)
            return np.arange(8.0, dtype=np.float32).reshape(4, 2)[index]

    found = device_mesh.read_sharded(device_mesh.NamedSharding(mesh, device_mesh.BATCH), Stored())
    np.testing.assert_array_equal(found, np.arange(8.0).reshape(4, 2))
    assert len(asked) == mesh.size
