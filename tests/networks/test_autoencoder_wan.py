"""The causal video autoencoder against diffusers' on random weights: whole clips = streams = their cached chunks."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from marble_jax.distributed.device_mesh import AXES
from marble_jax.errors import InputError
from marble_jax.networks import autoencoder_wan as wan
from marble_jax.networks import autoencoder_wan_flops
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.networks.causal_conv import causal_conv
from marble_jax.networks.sharding_rules import VIDEO_AUTOENCODER
from marble_jax.weights.key_map import path_entries, published_shape, save_params
from marble_jax.weights.safetensors_files import SafetensorsDir

TINY = WanVAEConfig(
    base_dim=4, z_dim=3, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True),
    latents_mean=(0.3, -0.2, 0.1), latents_std=(1.5, 0.7, 2.0), scale_factor_spatial=4,
)  # fmt: skip
# Sides alone at the finest resolution, as in the published model, and half as many frames.
SIDES_FIRST = dataclasses.replace(TINY, temperal_downsample=(False, True), scale_factor_temporal=2)
QUICK = {"xla_backend_optimization_level": 0}  # these programs are compiled for one run each


def saved(config, path):
    """A diffusers autoencoder with random weights that keep their scale, saved in `path`."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    # Lists, as in a config.json.
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    theirs = diffusers.AutoencoderKLWan(**values).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("gamma"):
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
    theirs.save_pretrained(path)
    return theirs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(diffusers' autoencoder, our model, our parameters, directory)."""
    path = tmp_path_factory.mktemp("vae")
    return (saved(TINY, path), *wan.load_wan_vae(path), path)


def encode(model, params, clips):
    """Posterior means of whole clips, in the transformer's scale."""
    mean, _ = model.apply({"params": params}, 2 * clips - 1, method="moments")
    return (mean - jnp.asarray(model.config.latents_mean)) / jnp.asarray(model.config.latents_std)


def decode(model, params, latents):
    """Whole clips at once."""
    z = latents * jnp.asarray(model.config.latents_std) + jnp.asarray(model.config.latents_mean)
    decoded = model.apply({"params": params}, z, method="reconstruct")
    return jnp.clip(0.5 * decoded + 0.5, 0.0, 1.0)


FUNCTIONS = {
    function.__name__: jax.jit(function, static_argnums=0, compiler_options=QUICK)
    for function in (encode, decode, wan.decode_stream, wan.decode_chunk)
}
BOTH = ("", "_stream")


def clips(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).random((2, frames, 8, 12, 3)).astype(np.float32)


def latents(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).standard_normal((2, frames, 2, 3, 3)).astype(np.float32)


def to_torch(array):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def encoded_by_diffusers(theirs, config, array):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        mode = theirs.encode(2 * to_torch(array) - 1).latent_dist.mode().numpy()
    return (np.moveaxis(mode, 1, -1) - np.asarray(config.latents_mean)) / config.latents_std


def decoded_by_diffusers(theirs, config, array):
    torch = pytest.importorskip("torch")
    z = array * np.asarray(config.latents_std) + np.asarray(config.latents_mean)
    with torch.no_grad():
        decoded = theirs.decode(to_torch(z.astype(np.float32))).sample.numpy()
    return np.moveaxis(decoded, 1, -1) / 2 + 0.5


def assert_close(got, want, tolerance=1e-5):
    """In the Euclidean norm."""
    assert got.shape == want.shape
    assert np.linalg.norm(np.asarray(got) - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("frames", [1, 9])
def test_encoding(pair, frames):
    theirs, model, params, _ = pair
    want = encoded_by_diffusers(theirs, TINY, clips(frames))
    assert want.shape == (2, 1 + (frames - 1) // 4, 2, 3, 3)
    assert_close(FUNCTIONS["encode"](model, params, clips(frames)), want)


@pytest.mark.parametrize("frames, names", [(1, BOTH[:1]), (3, BOTH)])
def test_decoding(pair, frames, names):
    theirs, model, params, _ = pair
    want = decoded_by_diffusers(theirs, TINY, latents(frames))
    assert want.shape == (2, 1 + (frames - 1) * 4, 8, 12, 3)
    assert 0.05 < np.mean((want > 0) & (want < 1)) and want.std() > 0.1
    for name in names:
        assert_close(FUNCTIONS[f"decode{name}"](model, params, latents(frames)), want)


def test_frames_halved_at_some_resolutions_alone(tmp_path):
    """Where encoder and decoder go through the resolutions in opposite order."""
    theirs = saved(SIDES_FIRST, tmp_path)
    model, params = wan.load_wan_vae(tmp_path)
    assert model.config == SIDES_FIRST
    want = encoded_by_diffusers(theirs, SIDES_FIRST, clips(5))
    assert_close(FUNCTIONS["encode"](model, params, clips(5)), want)
    want = decoded_by_diffusers(theirs, SIDES_FIRST, latents(3))
    assert want.shape[1] == 5
    assert_close(FUNCTIONS["decode"](model, params, latents(3)), want)


def test_three_dimensional_convolutions_give_the_same(pair):
    """What other backends than CPUs run."""
    _, model, params, _ = pair
    other = model.clone(taps=False)
    z = latents(3)
    want = np.asarray(FUNCTIONS["decode"](model, params, z))
    assert_close(FUNCTIONS["decode"](other, params, z), want)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("window", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_causal_convolution_against_torch(window, count):
    """Alone and with frames before; sums of taps and three-dimensional."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, count, 4, 5, 3)).astype(np.float32)
    before = rng.standard_normal((2, window[0] - 1, 4, 5, 3)).astype(np.float32)
    kernel = rng.standard_normal((*window, 3, 6)).astype(np.float32)
    for past in (None, before):
        front = np.zeros_like(before) if past is None else past
        whole = np.moveaxis(np.concatenate([front, x], axis=1), -1, 1)
        want = torch.nn.functional.conv3d(
            torch.from_numpy(whole.copy()),
            torch.from_numpy(kernel.transpose(4, 3, 0, 1, 2).copy()),
            padding=(0, window[1] // 2, window[2] // 2),
        ).numpy()
        for taps in (True, False):
            got = causal_conv(jnp.asarray(x), jnp.asarray(kernel), past, taps)
            np.testing.assert_allclose(got, np.moveaxis(want, 1, -1), atol=1e-4)


def test_nothing_looks_ahead(pair):
    """Another last latent frame leaves all frames before its own as they are; so it is for encoding."""
    _, model, params, _ = pair
    chunk = model.config.scale_factor_temporal
    z, changed = latents(3), latents(3)
    changed[:, -1] += 1
    one, other = (np.asarray(FUNCTIONS["decode"](model, params, value)) for value in (z, changed))
    np.testing.assert_array_equal(one[:, :-chunk], other[:, :-chunk])
    assert np.abs(one[:, -chunk:] - other[:, -chunk:]).max() > 1e-2
    x, changed = clips(9), clips(9)
    changed[:, -1] += 1
    one, other = (np.asarray(FUNCTIONS["encode"](model, params, value)) for value in (x, changed))
    np.testing.assert_array_equal(one[:, :-1], other[:, :-1])


def test_interleaved_streams_do_not_mix(pair):
    """Each stream's state is a value: two clips decoded in turn come out as each by itself."""
    _, model, params, _ = pair
    chunk = FUNCTIONS["decode_chunk"]
    z, states, parts = (latents(3), latents(3)[::-1] + 1), [None, None], ([], [])
    for frame in range(3):
        for i in range(2):
            out, states[i] = chunk(model, params, z[i][:, frame : frame + 1], states[i])
            parts[i].append(out)
    for i in range(2):
        want = FUNCTIONS["decode"](model, params, z[i])
        assert_close(np.concatenate(parts[i], axis=1), np.asarray(want))


def test_log_variance_of_the_posterior(pair):
    torch = pytest.importorskip("torch")
    theirs, model, params, _ = pair
    _, logvar = model.apply({"params": params}, 2 * clips(1) - 1, method="moments")
    with torch.no_grad():
        want = theirs.encode(2 * to_torch(clips(1)) - 1).latent_dist.logvar.numpy()
    np.testing.assert_allclose(logvar, np.moveaxis(want, 1, -1), atol=1e-4)


def test_weights_round_trip_bit_for_bit(pair):
    _, _, params, path = pair
    saved_tensors, source = save_params(params, path_entries(params)), SafetensorsDir(path)
    assert saved_tensors.keys() == set(source.keys())
    for key in source.keys():
        np.testing.assert_array_equal(saved_tensors[key], source.read(key))


def test_published_size():
    """Counts, and names and shapes of all tensors, against diffusers' model without memory."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    shapes = wan.abstract_params(wan.AutoencoderWan(WanVAEConfig()))
    leaves = traverse_util.flatten_dict(shapes)
    ours = {
        entry.key: published_shape(entry, leaves[entry.path].shape)
        for entry in path_entries(shapes)
    }
    assert len(ours) == 194 and sum(leaf.size for leaf in leaves.values()) == 126_892_531
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan()
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert list(WanVAEConfig().latents_mean) == theirs.config.latents_mean
    assert list(WanVAEConfig().latents_std) == theirs.config.latents_std
    mesh = jax.sharding.AbstractMesh((1, 2, 2), AXES)
    for path, leaf in leaves.items():
        assert not any(VIDEO_AUTOENCODER.spec_of(mesh, path, leaf.shape))


def test_flops_by_hand():
    """One residual level after the middle; a clip of two latent frames of one cell."""
    factors = {"scale_factor_temporal": 2, "scale_factor_spatial": 2}
    config = dataclasses.replace(TINY, dim_mult=(1, 1), temperal_downsample=(True,), **factors)
    shapes = wan.abstract_params(wan.AutoencoderWan(config))
    cells = {"post_quant_conv": 2 * 9, "conv_in": 2 * 27 * 12, "middle": 2 * (4 * 27 * 16 + 4 * 16)}
    cells["attention"] = 2 * 2 * 4
    cells["first level"] = 2 * 4 * 27 * 16 + 1 * 3 * 4 * 8 + 3 * 4 * 9 * 4 * 2
    # Three frames of four pixels; the first block widens two channels to four and projects its input.
    cells["second level"] = 12 * (27 * 2 * 4 + 8 + 3 * 27 * 16 + 27 * 4 * 3)
    counted = autoencoder_wan_flops.decoder(config, shapes, 2, 1, 1)
    assert counted == 2 * sum(cells.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_residual": True}, "expected the autoencoder of Wan 2.1; received that of Wan 2.2 5B"),
        ({"patch_size": 2}, "expected the autoencoder of Wan 2.1; received that of Wan 2.2 5B"),
        ({"attn_scales": [1.0]}, r"attn_scales: expected none; received \[1.0\]"),
        ({"temperal_downsample": [True]}, "temperal_downsample: expected 2 values; received 1"),
        ({"latents_std": [1.0]}, "latents_std: expected 3 values; received 1"),
        ({"scale_factor_spatial": 8}, "scale_factor_spatial: expected 4, .*; received 8"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(InputError, match=message):
        WanVAEConfig.from_dict({**dataclasses.asdict(TINY), **changes})


def test_unknown_keys_are_passed_over():
    values = {**dataclasses.asdict(TINY), "clip_output": False, "_class_name": "x"}
    assert WanVAEConfig.from_dict(values) == TINY
