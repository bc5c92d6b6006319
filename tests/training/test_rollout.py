"""Rollouts of a step: order of scores and latents, conditioning, health by hand."""

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax import batches
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.groups import Draw
from marble_jax.rewards.base import Reward
from marble_jax.rewards.scorer import Scorer
from marble_jax.training import rollout as rollout_module
from marble_jax.training.rollout import Collector, sample_health


class Brightness(Reward):
    """Device reward: mean pixel."""

    def score(self, params, images, prompts, metadata):
        return images.mean(axis=(1, 2, 3)), jnp.ones(len(prompts), bool)


class Length(Reward):
    """Host reward: characters of the prompt plus the first pixel; only for prompts with a quote."""

    def applies(self, prompt, metadata):
        return '"' in prompt

    def score(self, params, images, prompts, metadata):
        assert isinstance(images, np.ndarray)
        applies = np.array([self.applies(p, None) for p in prompts])
        return np.array([len(p) for p in prompts], np.float32) + images[:, 0, 0, 0], applies


@pytest.fixture
def scorer():
    made = Scorer(
        [Length(name="length", kind="host"), Brightness(name="brightness", kind="device")],
        num_workers=2,
    )
    yield made
    made.close()


def _encode(texts):
    numbers = jnp.asarray([[len(t), sum(map(ord, t)) % 97] for t in texts], jnp.float32)
    return {"embeds": jnp.repeat(numbers[:, None], 3, axis=1), "pooled": numbers}


def _draw(texts, images_per_prompt):
    prompts = tuple(Prompt(t, "general") for t in texts for _ in range(images_per_prompt))
    groups = np.repeat(np.arange(len(texts), dtype=np.int32), images_per_prompt)
    return Draw(prompts, groups, ("general",) * len(prompts))


def _collector(scorer, batch_size, sampler, encode=_encode, placed=None):
    def place(tree):
        if placed is not None:
            placed.append(tree)
        return tree

    return Collector(
        sampler=sampler,
        encode=encode,
        decode=lambda x: x,
        scorer=scorer,
        latent_shape=(1, 2, 3),
        batch_size=batch_size,
        place=place,
        spread=place,
    )


def _noisy(params, adapter, cond, noise):
    """Latents that tell which prompt they are of: its length, plus a little of the noise."""
    return cond["pooled"][:, :1, None, None] / 100 + 0.01 * noise


TEXTS = ("a cat", 'a sign "go"', "two dogs and a bird", 'the word "stop" in red', "a cat")


@pytest.mark.parametrize("batch_size", [2, 5, 10, 4])
def test_scores_and_latents_come_back_in_the_order_of_the_draw(scorer, batch_size):
    """4 leaves a rest: the last batch of the 10 images is filled up, and the filling is cut off again."""
    draw, done = _draw(TEXTS, 2), []
    rollout = _collector(scorer, batch_size, _noisy)(
        None, None, draw, jax.random.key(0), done.append
    )
    assert rollout.kept.shape == (10, 1, 2, 3) and sum(done) == 10
    x0, lengths = np.asarray(rollout.kept), np.array([len(p.text) for p in draw.prompts])
    np.testing.assert_allclose(x0.mean(axis=(1, 2, 3)), lengths / 100, atol=0.02)
    assert rollout.scores.names == ("length", "brightness")
    np.testing.assert_allclose(rollout.scores.values[:, 1], x0.mean(axis=(1, 2, 3)), rtol=1e-6)
    quoted = np.array(['"' in p.text for p in draw.prompts])
    np.testing.assert_array_equal(rollout.scores.valid.T, [quoted, np.ones(10, bool)])
    np.testing.assert_allclose(
        rollout.scores.values[quoted, 0], (lengths + x0[:, 0, 0, 0])[quoted], rtol=1e-6
    )
    assert not rollout.scores.failed.any()
    assert set(rollout.seconds) == {"rollout", "rewards_wait"} and all(
        s >= 0 for s in rollout.seconds.values()
    )


def test_every_draw_is_encoded_once_and_conditions_its_images(scorer):
    calls, placed = [], []

    def encode(texts):
        calls.append(list(texts))
        return _encode(texts)

    rollout = _collector(scorer, 5, _noisy, encode, placed)(
        None, None, _draw(TEXTS, 2), jax.random.key(0)
    )
    assert calls == [list(TEXTS)]  # equal texts of two draws are two groups
    np.testing.assert_array_equal(rollout.prompt, np.repeat(np.arange(5), 2))
    np.testing.assert_array_equal(rollout.cond["pooled"], _encode(TEXTS)["pooled"])
    conds = [x for x in placed if isinstance(x, dict)]
    seen = np.concatenate([np.asarray(c["pooled"]) for c in conds])
    np.testing.assert_array_equal(seen, np.asarray(_encode(TEXTS)["pooled"])[rollout.prompt])
    assert len(placed) == 6  # conditioning, noise and latents of two batches


def test_noise_is_a_function_of_the_key_and_differs_between_images(scorer):
    collect = _collector(scorer, 5, _noisy)
    one, same, other = (
        np.asarray(collect(None, None, _draw(TEXTS, 2), jax.random.key(k)).kept) for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.all(one != other)
    noise = one - np.array([len(t) for t in TEXTS]).repeat(2)[:, None, None, None] / 100
    assert len({tuple(row) for row in np.round(noise.reshape(10, -1), 5)}) == 10


def test_policy_and_weights_reach_the_sampler(scorer):
    def sampler(params, adapter, cond, noise):
        return jnp.zeros_like(noise) + params + adapter

    rollout = _collector(scorer, 2, sampler)(0.25, 0.5, _draw(TEXTS[:1], 2), jax.random.key(0))
    assert np.all(np.asarray(rollout.kept) == 0.75)


@pytest.mark.parametrize(
    "batch_size, x0_norm, diversity",
    [
        (8, 0.5315072906367325, 0.175),
        (4, (0.4795831523312719 + 0.5787918451395113) / 2, 0.175),
        (2, (0.31622776601683794 + 0.6 + 0.7071067811865476 + 0.4123105625617661) / 4, 0.175),
    ],
)
def test_health_by_hand(scorer, batch_size, x0_norm, diversity):
    """Grey images of four prompts: .2 .4 | .6 .6 | 0 1 | .3 .5, so the spreads are .1 0 .5 .1 and the mean is .45."""
    grey = iter(
        np.array([0.2, 0.4, 0.6, 0.6, 0.0, 1.0, 0.3, 0.5], np.float32).reshape(-1, batch_size)
    )

    def sampler(params, adapter, cond, noise):
        return jnp.zeros_like(noise) + jnp.asarray(next(grey))[:, None, None, None]

    health = _collector(scorer, batch_size, sampler)(
        None, None, _draw(TEXTS[:4], 2), jax.random.key(0)
    ).health
    assert health["brightness"] == pytest.approx(0.45, abs=1e-6)
    assert health["x0_norm"] == pytest.approx(x0_norm, abs=1e-6)
    assert health["diversity"] == pytest.approx(diversity, abs=1e-6)


def test_diversity_leaves_out_groups_of_which_a_batch_holds_one_image(scorer):
    """Three images a prompt, two a batch: of each prompt one pair lies in a batch, or none."""
    grey = iter(np.array([0.1, 0.3, 0.9, 0.4, 0.2, 0.8], np.float32).reshape(-1, 2))

    def sampler(params, adapter, cond, noise):
        return jnp.zeros_like(noise) + jnp.asarray(next(grey))[:, None, None, None]

    health = _collector(scorer, 2, sampler)(
        None, None, _draw(TEXTS[:2], 3), jax.random.key(0)
    ).health
    assert health["diversity"] == pytest.approx((0.1 + 0.0 + 0.3) / 3, abs=1e-6)


def test_health_of_clips():
    """Against NumPy in float64: diversity over all pixels of all frames, motion between neighbours."""
    rng = np.random.default_rng(0)
    clips = rng.random((6, 5, 4, 3, 3))
    group = np.array([0, 0, 0, 1, 1, 2])
    found = sample_health(
        jnp.asarray(clips, jnp.float32), jnp.asarray(clips, jnp.float32), jnp.asarray(group), 3
    )
    spreads = [clips[group == label].std(axis=0).mean() for label in (0, 1)]
    assert found["diversity"] == pytest.approx(np.mean(spreads), rel=1e-5)
    motion = np.abs(np.diff(clips, axis=1)).mean()
    assert found["motion"] == pytest.approx(motion, rel=1e-5)
    assert found["brightness"] == pytest.approx(clips.mean(), rel=1e-5)
    images = sample_health(
        jnp.asarray(clips[:, 0], jnp.float32),
        jnp.asarray(clips[:, 0], jnp.float32),
        jnp.asarray(group),
        4,  # one of which the batch does not have
    )
    assert "motion" not in images
    of_first = [clips[group == label, 0].std(axis=0).mean() for label in (0, 1)]
    assert images["diversity"] == pytest.approx(np.mean(of_first), rel=1e-5)


def health_on_devices():
    """Runs in the process with four devices: images of 192 numbers that each device holds, and their diversity."""
    import re

    from marble_jax.distributed import device_mesh

    mesh = device_mesh.make_mesh()
    images = np.random.default_rng(0).random((16, 8, 8, 3)).astype(np.float32)
    group = np.repeat(np.arange(3, dtype=np.int32), 6)[1:17]
    latents, split = device_mesh.shard_batch(mesh, (images[..., 0], images))
    compiled = sample_health.lower(latents, split, group, 3).compile()
    exchanged = [
        int(np.prod([int(n) for n in shape.split(",") if n])) / 192
        for line in compiled.as_text().splitlines()
        if re.search(r"= .*(all-reduce|all-gather)\(", line)
        for shape in re.findall(r"f32\[([\d,]*)\]", line.split("= ")[1].split("all-")[0])
    ]
    spreads = [images[group == label].std(axis=0).mean() for label in range(3)]
    found = compiled(latents, split, group)["diversity"]
    return {"exchanged": max(exchanged), "off": float(found / np.mean(spreads) - 1)}


def test_devices_exchange_one_image_for_each_group():
    """Sixteen images of three prompts on four devices: three sums of images each, and not the batch."""
    found = fake_devices.call(health_on_devices, devices=4)
    assert abs(found["off"]) < 1e-5
    assert found["exchanged"] == 3


@pytest.mark.parametrize("batch_size, num_groups", [(6, 2), (8, 2), (4, 1), (12, 3)])
def test_groups_are_counted_over_all_batches(scorer, monkeypatch, batch_size, num_groups):
    """Three prompts of four images: 0000 11|11 2222, 0000 1111|2222, 0000|1111|2222, all at once."""
    seen = []

    def told(x0, samples, group, num_groups):
        seen.append((num_groups, int(group.max())))
        return {}

    monkeypatch.setattr(rollout_module, "sample_health", told)
    _collector(scorer, batch_size, _noisy)(None, None, _draw(TEXTS[:3], 4), jax.random.key(0))
    assert {number for number, _ in seen} == {num_groups}
    assert max(label for _, label in seen) == num_groups - 1


def test_no_more_batches_wait_for_scores_than_a_host_may_hold(scorer, monkeypatch):
    """Ten samples of 24 bytes in five batches, of which two fit: the third one waits for the first."""
    events = []
    submit = scorer.submit

    class Told:
        def __init__(self, number, pending):
            self.number, self.pending = number, pending

        def result(self, poll):
            events.append(f"collected {self.number}")
            return self.pending.result(poll)

    def told(samples, prompts):
        number = sum(event.startswith("drawn") for event in events)
        events.append(f"drawn {number}")
        return Told(number, submit(samples, prompts))

    monkeypatch.setattr(scorer, "submit", told)
    collect = _collector(scorer, 2, _noisy)
    plain = collect(None, None, _draw(TEXTS, 2), jax.random.key(0)).scores
    assert events == [f"drawn {i}" for i in range(5)] + [f"collected {i}" for i in range(5)]
    events.clear()
    monkeypatch.setattr(batches, "MAX_WAITING_BYTES", 2 * 2 * 24)
    scores = collect(None, None, _draw(TEXTS, 2), jax.random.key(0)).scores
    assert events[:5] == ["drawn 0", "drawn 1", "drawn 2", "collected 0", "drawn 3"]
    np.testing.assert_array_equal(scores.values, plain.values)
