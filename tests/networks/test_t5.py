"""The T5 encoder against transformers' on random weights."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.networks import t5

SHAPE = dict(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4)


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def saved(directory, **changes):
    """A torch T5EncoderModel with random weights, saved in `directory`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def ids(length: int = 150) -> np.ndarray:
    """Longer than the largest relative distance, padded with zeros."""
    values = np.random.default_rng(0).integers(2, 50, size=(2, length))
    values[:, length // 2 :] = 0
    return values


@pytest.mark.parametrize("feed_forward_proj", ["gated-gelu", "relu", "gated-silu"])
def test_encoder_matches_transformers(feed_forward_proj, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = saved(tmp_path, feed_forward_proj=feed_forward_proj)
    model, params = t5.load_t5(tmp_path)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids()))[0]
    assert relative_error(jax.jit(model.apply)({"params": params}, ids()), want) < 1e-5


def test_an_activation_of_its_own_counts_as_in_transformers(tmp_path):
    """A file holds the activation twice; transformers computes with the second one, whatever the first says."""
    torch = pytest.importorskip("torch")
    theirs = saved(tmp_path, feed_forward_proj="gated-gelu", dense_act_fn="relu")
    assert theirs.config.dense_act_fn == "relu"
    model, params = t5.load_t5(tmp_path)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids()))[0]
    assert relative_error(jax.jit(model.apply)({"params": params}, ids()), want) < 1e-5
    file = tmp_path / "config.json"
    config = t5.T5Config.from_dict(json.loads(file.read_text()) | {"is_gated_act": False})
    assert config.activation == "relu" and not config.gated


@pytest.mark.parametrize(
    "names", [t5._TIED[:1], t5._TIED[1:], t5._TIED], ids=["shared", "embed_tokens", "both"]
)
def test_either_name_of_the_embedding_loads(names, tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    theirs = saved(tmp_path, feed_forward_proj="gated-gelu")
    file = tmp_path / "model.safetensors"
    tensors = {k: v for k, v in numpy_io.load_file(file).items() if k not in t5._TIED}
    table = theirs.shared.weight.detach().numpy()
    numpy_io.save_file({**tensors, **{name: table.copy() for name in names}}, file)
    _, params = t5.load_t5(tmp_path)
    np.testing.assert_array_equal(params["shared"]["embedding"], table)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 20)])
def test_relative_buckets_match_transformers(num_buckets, max_distance):
    torch = pytest.importorskip("torch")
    attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    position = torch.arange(300)
    want = attention._relative_position_bucket(
        position[None] - position[:, None], num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(t5.relative_buckets(300, num_buckets, max_distance), want)


def test_relative_buckets_by_hand():
    buckets = t5.relative_buckets(200)
    assert buckets[0, :3].tolist() == [0, 17, 18]  # the query itself, then keys after it
    assert buckets[:3, 0].tolist() == [0, 1, 2]  # keys before it
    assert (
        buckets[8, 0] == 8 and buckets[128, 0] == 15 and buckets[0, 199] == 31
    )  # first shared, last of each half


def test_bad_input():
    with pytest.raises(
        InputError, match="feed_forward_proj: expected one of gelu_new, gelu, relu, silu; received"
    ):
        t5.T5Config(feed_forward_proj="gated-tanh")
