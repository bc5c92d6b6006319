"""Rewards over two, four and eight devices: each scores its own images, and the scores are those of one device."""

from __future__ import annotations

import fake_devices
import pytest

MESHES = {"2x1x1": 2, "1x4x1": 4, "8x1x1": 8, "2x2x2": 8}
ON_DEVICES = ("alignment", "preference", "aesthetic", "judge")
ON_HOSTS = ("ocr", "geneval")


def scores() -> dict[str, dict[str, object]]:
    """Runs in a process with eight devices: by mesh, gaps to one device and what the devices hold of the images."""
    import jax
    import numpy as np
    from loaded_pipeline import load_pipeline

    from marble_jax import distributed
    from marble_jax.distributed import device_mesh
    from marble_jax.programs.locations import read_prompts, resolve_path
    from marble_jax.programs.open_model import decode_size
    from marble_jax.rewards.placement import place_rewards
    from marble_jax.rewards.registry import load_rewards
    from marble_jax.rewards.scorer import Scorer

    pipeline = load_pipeline(resolve_path("embedded", "pipeline"), text_encoders=False)
    prompts = [p for part in read_prompts("embedded", "test").values() for p in part[:8]][:16]
    latents = jax.random.normal(jax.random.key(0), (16, *pipeline.latent_shape(64, 64)))

    def scored(mesh, names):
        sharding = device_mesh.image_sharding(mesh, 16)
        images = pipeline.decode(
            latents,
            decode_size(16, mesh),
            lambda part: distributed.device_put_global(part, sharding),
        )
        images = distributed.device_put_global(images, sharding)
        rewards = load_rewards(resolve_path("embedded", "rewards"), names)
        place_rewards(mesh, rewards)
        scorer = Scorer(rewards)
        try:
            return images, scorer.submit(images, prompts).result()
        finally:
            scorer.close()

    everything = (*ON_DEVICES, *ON_HOSTS)
    expected_images, expected = scored(device_mesh.make_mesh(devices=jax.devices()[:1]), everything)
    found = {}
    for name, count in MESHES.items():
        # Rewards on hosts are handed the whole images, however they lie: once is enough.
        names = everything if name == "2x2x2" else ON_DEVICES
        mesh = device_mesh.make_mesh(*map(int, name.split("x")), jax.devices()[:count])
        images, got = scored(mesh, names)
        values, valid = (array[:, : len(names)] for array in (expected.values, expected.valid))
        gaps = np.abs(got.values - values).max(axis=0, where=valid, initial=0)
        found[name] = {
            "images": float(np.abs(np.asarray(images) - np.asarray(expected_images)).max()),
            "gaps": dict(zip(names, map(float, gaps), strict=True)),
            "valid": bool((got.valid == valid).all()),
            "spread": float(np.ptp(values[:, 0])),
            "rows": sorted(shard.data.shape[0] for shard in images.addressable_shards),
        }
    return found


@pytest.fixture(scope="module")
def found():
    return fake_devices.call(scores)


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_are_those_of_one_device(found, mesh):
    got = found[mesh]
    assert got["valid"] and got["images"] < 1e-5 and got["spread"] > 1e-3
    assert all(gap < 1e-4 for gap in got["gaps"].values()), got["gaps"]
    assert got["rows"] == [16 // MESHES[mesh]] * MESHES[mesh]  # along tensor too
