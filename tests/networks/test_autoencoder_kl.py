"""The autoencoder against diffusers' on random weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.networks import autoencoder_kl

SD3 = dict(
    latent_channels=16,
    block_out_channels=(8, 16, 24),
    layers_per_block=2,
    norm_num_groups=8,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
SD1 = dict(
    latent_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.18215,
)


encode, decode = (
    jax.jit(function, static_argnums=0)
    for function in (autoencoder_kl.encode, autoencoder_kl.decode)
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(model, method: str, params, x):
    return model.apply({"params": params}, x, method=method)


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def reference(config: dict, directory):
    """A torch AutoencoderKL with random weights, biases and affines, saved in `directory`."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    depth = len(config["block_out_channels"])
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        **config,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=[SD3, SD1], ids=["sd3", "sd1"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("vae")
    return reference(request.param, directory), *autoencoder_kl.load_vae(directory)


def sample_images(side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(2, side, side + 8, 3)).astype(np.float32)


def test_encode_matches_diffusers(pair):
    torch = pytest.importorskip("torch")
    theirs, model, params = pair
    images = sample_images()
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1).latent_dist
    shift = theirs.config.shift_factor or 0.0
    want = (posterior.mean - shift).permute(0, 2, 3, 1).numpy() * theirs.config.scaling_factor
    assert relative_error(encode(model, params, images), want) < 1e-5
    mean, logvar = apply(model, "moments", params, jnp.asarray(images) * 2 - 1)
    assert relative_error(mean, posterior.mean.permute(0, 2, 3, 1)) < 1e-5
    assert relative_error(logvar, posterior.logvar.permute(0, 2, 3, 1)) < 1e-5


def test_decode_matches_diffusers(pair):
    torch = pytest.importorskip("torch")
    theirs, model, params = pair
    shape = (2, 4, 3, model.config.latent_channels)
    latents = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    z = torch.from_numpy(latents).permute(0, 3, 1, 2) / theirs.config.scaling_factor + (
        theirs.config.shift_factor or 0
    )
    with torch.no_grad():
        want = theirs.decode(z).sample.permute(0, 2, 3, 1).numpy()
    got = apply(model, "reconstruct", params, z.permute(0, 2, 3, 1).numpy())
    assert relative_error(got, want) < 1e-5
    images = decode(model, params, latents)
    assert images.dtype == jnp.float32 and float(images.min()) >= 0 and float(images.max()) <= 1
    np.testing.assert_allclose(images, np.clip(want / 2 + 0.5, 0, 1), atol=2e-5)


def test_sampling_follows_the_posterior(pair):
    _, model, params = pair
    images, key = sample_images(), jax.random.key(3)
    scale = model.config.scaling_factor
    _, logvar = apply(model, "moments", params, jnp.asarray(images) * 2 - 1)
    mean, drawn = encode(model, params, images), encode(model, params, images, key)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    np.testing.assert_allclose(drawn - mean, jnp.exp(logvar / 2) * noise * scale, atol=2e-5)
    np.testing.assert_array_equal(drawn, encode(model, params, images, key))


def test_nearest_double_by_hand():
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    want = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    np.testing.assert_array_equal(autoencoder_kl.nearest_double(x)[0, :, :, 0], want)


def test_bfloat16_stays_near_float32(pair):
    _, model, params = pair
    latents = (
        np.random.default_rng(2)
        .normal(size=(2, 4, 3, model.config.latent_channels))
        .astype(np.float32)
    )
    half = autoencoder_kl.AutoencoderKL(model.config, jnp.bfloat16)
    got = decode(half, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), latents)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, decode(model, params, latents), atol=0.05)


def test_config_defaults_and_downsampling():
    config = autoencoder_kl.VAEConfig.from_dict(
        {
            "shift_factor": None,
            "block_out_channels": [8, 8, 8],
            "norm_num_groups": 8,
            "sample_size": 64,
        }
    )
    assert config.shift_factor == 0.0 and config.downsampling == 4 and config.use_quant_conv


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "down_block_types.*AttnDownEncoder",
        ),
        (
            {"up_block_types": ["UpBlock2D"]},
            "up_block_types: expected only UpDecoderBlock2D; received UpBlock2D",
        ),
        ({"act_fn": "relu"}, "act_fn: expected silu; received 'relu'"),
    ],
)
def test_config_rejects_other_architectures(values, message):
    with pytest.raises(InputError, match=message):
        autoencoder_kl.VAEConfig.from_dict(values)
