"""Decoding in parts: the same samples in the same order, and every device decodes those that it is to hold."""

from __future__ import annotations

from types import SimpleNamespace

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.distributed import device_mesh
from marble_jax.families.decoding import Decoder, as_samples


def decoder():
    """A decoder of clips of two frames, which adds the weight and doubles the first frame."""

    def decode_latents(weight, latents):
        return jnp.stack([2 * latents + weight, latents + weight], axis=1)

    return Decoder(SimpleNamespace(decoder_params=jnp.float32(0.5), decode_latents=decode_latents))


def latents(count):
    return jnp.arange(count * 2 * 2 * 3, dtype=jnp.float32).reshape(count, 2, 2, 3)


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_the_last_part_is_filled_up_and_cut(batch):
    clips = decoder()(latents(7), batch)
    want = np.stack([2 * latents(7) + 0.5, latents(7) + 0.5], axis=1)
    np.testing.assert_array_equal(clips, want)


def test_clips_of_one_frame_are_images():
    clips = jnp.zeros((2, 1, 4, 4, 3))
    assert as_samples(clips).shape == (2, 4, 4, 3)
    assert as_samples(jnp.zeros((2, 5, 4, 4, 3))).shape == (2, 5, 4, 4, 3)


def parts_on_devices() -> dict[str, object]:
    """Runs in the process with four devices: twelve clips in parts of four, one on each device."""
    mesh = device_mesh.make_mesh()
    layout = device_mesh.image_sharding(mesh, 12)
    seen = []

    def place(part):
        seen.append(part[:, 0, 0, 0])
        return jax.device_put(part, layout)

    clips = decoder()(device_mesh.shard_batch(mesh, latents(12)), 4, place, shards=4)
    want = np.stack([2 * latents(12) + 0.5, latents(12) + 0.5], axis=1)
    return {
        "same": bool((np.asarray(clips) == want).all()),
        "parts": [(np.asarray(part) / 12).astype(int).tolist() for part in seen],
        "rows": sorted(shard.index[0].start or 0 for shard in clips.addressable_shards),
    }


def test_devices_decode_the_clips_that_they_hold():
    found = fake_devices.call(parts_on_devices, devices=4)
    assert found["same"]
    # A device holds three neighbours; each part takes one of every device's.
    assert found["parts"] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert found["rows"] == [0, 3, 6, 9]
