"""Evaluations: the same noise for the same prompt whatever the batch size, nothing dropped, kept images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import marble_jax  # noqa: F401
from marble_jax.errors import InputError
from marble_jax.evaluation.evaluate import Evaluator
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import image_noise, make_sampler
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.rewards.scorer import Scorer

TEXTS = ("a cat", 'a sign "go"', "two dogs", "a bird", 'the word "no"', "fog", "a cat")
PROMPTS = [Prompt(text, "general") for text in TEXTS]


def _velocity(params, adapter, xt, sigma, cond):
    shift = 0.0 if adapter is None else adapter
    return (
        jnp.tanh(params * xt + sigma[:, None, None, None])
        + cond["pooled"][:, :, None, None]
        + shift
    )


class Brightness(Reward):
    def score(self, params, images, prompts, metadata):
        return images.mean(axis=(1, 2, 3)), jnp.ones(len(prompts), bool)


class Length(Reward):
    """Characters of the prompt, only where there is a quote."""

    def applies(self, prompt, metadata):
        return '"' in prompt

    def score(self, params, images, prompts, metadata):
        return np.array([len(p) for p in prompts], np.float32), np.array(
            ['"' in p for p in prompts]
        )


def _encode(texts):
    numbers = jnp.asarray([[sum(map(ord, t)) % 11] for t in texts], jnp.float32) / 10
    return {"embeds": numbers[:, None], "pooled": numbers}


@functools.cache
def _sampler():
    return make_sampler(_velocity, "dpm2", sigma_grid(3, 1.0))


@pytest.fixture(scope="module")
def scorer():
    made = Scorer(
        [Brightness(name="brightness", kind="device"), Length(name="length", kind="host")]
    )
    yield made
    made.close()


def _evaluator(scorer, batch_size, seed=0, num_images=3, prompts=PROMPTS):
    return Evaluator(
        prompts=prompts,
        sampler=_sampler(),
        encode=_encode,
        decode=jax.nn.sigmoid,
        scorer=scorer,
        latent_shape=(2, 2, 3),
        batch_size=batch_size,
        seed=seed,
        num_images=num_images,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
def test_results_do_not_depend_on_the_batch_size_and_no_prompt_is_dropped(scorer, batch_size):
    """Against a loop over single prompts with noise from (seed, index)."""
    done = []
    scores, kept_images = _evaluator(scorer, batch_size)(0.5, None, done.append)
    assert sum(done) == len(PROMPTS) and scores.values.shape == (7, 2)
    images = []
    for i, prompt in enumerate(PROMPTS):
        noise = image_noise(jax.random.key(0), [i], (2, 2, 3))
        images.append(
            np.asarray(jax.nn.sigmoid(_sampler()(0.5, None, _encode([prompt.text]), noise)))[0]
        )
    np.testing.assert_allclose(scores.values[:, 0], [image.mean() for image in images], rtol=1e-5)
    quoted = np.array(['"' in p.text for p in PROMPTS])
    np.testing.assert_array_equal(scores.valid.T, [np.ones(7, bool), quoted])
    np.testing.assert_array_equal(
        scores.values[quoted, 1], [len(p.text) for p in PROMPTS if '"' in p.text]
    )
    assert not scores.failed.any()
    kept_images = np.stack(kept_images)
    assert kept_images.dtype == np.uint8 and kept_images.shape == (3, 2, 2, 3)
    expected = np.stack([images[i] for i in (0, 3, 6)]) * 255
    assert np.abs(kept_images - expected).max() <= 0.5 + 1e-3


def test_equal_prompts_start_from_different_noise(scorer):
    """The first and the last prompt have the same text."""
    scores, _ = _evaluator(scorer, 4)(0.5, None)
    assert scores.values[0, 0] != scores.values[6, 0]


def test_the_same_noise_every_time_and_another_one_for_another_seed(scorer):
    evaluator = _evaluator(scorer, 4)
    once, again, other = (
        evaluator(0.5, None)[0],
        evaluator(0.5, None)[0],
        _evaluator(scorer, 4, seed=1)(0.5, None)[0],
    )
    np.testing.assert_array_equal(once.values, again.values)
    assert np.all(once.values[:, 0] != other.values[:, 0])


def test_several_images_of_a_prompt_are_a_group(scorer):
    """The first pass over the prompts is what one image each gives; the second differs by its noise alone."""
    once, images = _evaluator(scorer, 4)(0.5, None)
    evaluator = dataclasses.replace(_evaluator(scorer, 4), images_per_prompt=2)
    twice, same_images = evaluator(0.5, None)
    np.testing.assert_array_equal(evaluator.groups, [*range(7), *range(7)])
    np.testing.assert_allclose(twice.values[:7], once.values, rtol=1e-6)
    np.testing.assert_array_equal(same_images, images)
    np.testing.assert_array_equal(twice.valid[7:], once.valid)
    assert np.all(twice.values[7:, 0] != once.values[:, 0])
    applies = once.valid[:, 1]
    np.testing.assert_array_equal(twice.values[7:, 1][applies], once.values[applies, 1])


def test_policies_differ_by_their_weights_alone(scorer):
    """A velocity that is lower by 0.3 everywhere ends 0.3 higher everywhere, up to what tanh makes of it: all gain."""
    evaluator = _evaluator(scorer, 4)
    base, raised = (
        evaluator(jnp.float32(0.0), None)[0],
        evaluator(jnp.float32(0.0), jnp.float32(-0.3))[0],
    )
    assert np.all(raised.values[:, 0] > base.values[:, 0])
    spread = (raised.values[:, 0] - base.values[:, 0]).std()
    assert spread < 0.5 * base.values[:, 0].std()


@pytest.mark.parametrize(
    "num_images, kept",
    [(0, []), (1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (7, list(range(7))), (50, list(range(7)))],
)
def test_kept_images_are_spread_over_the_prompts(scorer, num_images, kept):
    evaluator = _evaluator(scorer, 4, num_images=num_images)
    assert evaluator.kept == kept
    if num_images in (0, 50):
        assert len(evaluator(0.5, None)[1]) == len(kept)


def test_of_an_image_that_is_not_finite_nothing_is_kept(scorer):
    """In 8 bits it would be black; its scores have failed."""

    def decode(latents):
        return jnp.where(jnp.mean(latents) > -9, jax.nn.sigmoid(latents), 0).at[-1].set(jnp.nan)

    evaluator = dataclasses.replace(_evaluator(scorer, 7), decode=decode)
    scores, kept_images = evaluator(0.5, None)
    assert [image is None for image in kept_images] == [False, False, True]
    assert scores.failed[-1, 0] and not scores.failed[:-1].any()


class Motion(Reward):
    def score(self, params, images, prompts, metadata):
        return jnp.abs(images[:, 1:] - images[:, :-1]).mean((1, 2, 3, 4)), jnp.ones(len(prompts))


def test_clips_are_scored_and_kept_as_clips():
    scorer = Scorer([Motion(name="motion", kind="device", takes="clips")])

    def decode(latents):
        frames = jax.nn.sigmoid(latents)[:, None]
        return jnp.concatenate([frames, 0.5 * frames], axis=1)

    evaluator = dataclasses.replace(_evaluator(scorer, 4), decode=decode)
    scores, kept_clips = evaluator(0.5, None)
    assert len(kept_clips) == 3 and kept_clips[0].shape == (2, 2, 2, 3)
    assert kept_clips[0].dtype == np.uint8
    # Each frame is rounded to 8 bits.
    assert np.abs(kept_clips[0][0] / 2 - kept_clips[0][1]).max() <= 1
    assert scores.values[0, 0] == pytest.approx(kept_clips[0][0].mean() / 255 / 2, abs=2e-3)


class Places(Reward):
    """Of every image, how many of its prompt's are darker."""

    def score(self, params, images, prompts, metadata):
        means = np.asarray(images).mean(axis=(1, 2, 3))
        values = np.zeros(len(prompts), np.float32)
        for i, prompt in enumerate(prompts):
            same = np.array([text == prompt for text in prompts])
            values[i] = (means[same] < means[i]).sum()
        return values, np.ones(len(prompts), bool)


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("batch_size, together", [(8, 0), (24, 0), (32, 0), (12, 6), (16, 8)])
def test_images_that_are_compared_are_scored_together(scorer, kind, batch_size, together):
    """Three of each prompt, six of the one that is there twice: places among all, other scores as ever."""
    reward = Places(name="places", kind=kind, needs_full_group=True)
    both = Scorer([Brightness(name="brightness", kind="device"), reward])
    made = dataclasses.replace(
        _evaluator(both, batch_size), images_per_prompt=3, rows_together=together
    )
    done = []
    scores, kept_images = made(0.5, None, done.append)
    both.close()
    assert sum(done) == 21 and scores.valid.all() and not scores.failed.any()
    alone = dataclasses.replace(_evaluator(scorer, 4), images_per_prompt=3)
    brightness, same_images = alone(0.5, None)
    np.testing.assert_allclose(scores.values[:, 0], brightness.values[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(kept_images, same_images)
    texts = [TEXTS[i % 7] for i in range(21)]
    places = []
    for i, text in enumerate(texts):
        rivals = [brightness.values[j, 0] for j in range(21) if texts[j] == text]
        places.append(sum(rival < brightness.values[i, 0] for rival in rivals))
    np.testing.assert_array_equal(scores.values[:, 1], places)


def test_images_that_are_compared_have_to_fit_on_one_host():
    both = Scorer([Places(name="places", kind="host", needs_full_group=True)])
    made = dataclasses.replace(_evaluator(both, 8), images_per_prompt=3, rows_together=4)
    with pytest.raises(
        InputError, match="expected at most 4 images of a prompt.* received 6 of 'a cat'"
    ):
        made.batches()
    # One of each: nothing is compared, and the order is that of all other rewards.
    single = _evaluator(both, 4, prompts=PROMPTS[:6])
    assert single.comparing == []
    assert [index.tolist() for index, _ in single.batches()] == [[0, 1, 2, 3], [4, 5, 5, 5]]
    both.close()
