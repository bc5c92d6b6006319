"""The UMT5 encoder against transformers' on random weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.networks import t5, umt5

SHAPE = dict(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4)
LENGTHS = (150, 70, 1)


def saved(directory, **changes):
    """A torch UMT5EncoderModel with random weights, saved in `directory`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(their encoder, our encoder as a compiled function of ids and mask, directory)."""
    directory = tmp_path_factory.mktemp("umt5")
    theirs = saved(directory)
    model, params = umt5.load_umt5(directory)
    run = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, mask))
    return theirs, run, directory


def inputs(length: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask; longer than the largest relative distance, and one prompt of one token."""
    ids = np.random.default_rng(0).integers(2, 50, size=(len(LENGTHS), 150))
    mask = np.arange(150) < np.asarray(LENGTHS)[:, None]
    return np.where(mask, ids, 0).astype(np.int32)[:, :length], mask[:, :length]


def wanted(theirs, ids, mask) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())[0].numpy()
    return out * mask[..., None]


def test_encoder_matches_transformers(pair):
    theirs, run, _ = pair
    got = np.asarray(run(*inputs()))
    want = wanted(theirs, *inputs())
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert not got[1, 70:].any() and got[1, 69].any()


def test_every_block_reads_its_own_table(pair):
    """With the first block's table in all blocks, as in a T5, the same file gives something else."""
    theirs, run, directory = pair
    model, params = umt5.load_umt5(directory)
    name = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias"
    shared = {**params, name.format(1): params[name.format(0)]}
    other = jax.jit(model.apply)({"params": shared}, *inputs())
    assert np.abs(np.asarray(run(*inputs())) - np.asarray(other)).max() > 1e-2


def test_padding_does_not_count(pair):
    """A prompt of 70 tokens, padded to 150 and to 80."""
    _, run, _ = pair
    ids, mask = inputs()
    long, short = run(ids, mask), run(ids[:, :80], mask[:, :80])
    # Products over other numbers of tokens add up in another order, which differs from processor to processor.
    np.testing.assert_allclose(long[1, :70], short[1, :70], atol=5e-6)


@pytest.mark.parametrize("names", [t5._TIED[:1], t5._TIED], ids=["shared", "both"])
def test_the_embedding_is_the_shared_one(pair, names, tmp_path):
    """Files hold it once or twice; some versions of transformers leave the second one random."""
    numpy_io = pytest.importorskip("safetensors.numpy")
    theirs, _, directory = pair
    stored = numpy_io.load_file(directory / "model.safetensors")
    tensors = {name: value for name, value in stored.items() if name not in t5._TIED}
    table = theirs.shared.weight.detach().numpy().copy()
    tables = {name: table if name == t5._TIED[0] else np.zeros_like(table) for name in names}
    numpy_io.save_file({**tensors, **tables}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    _, params = umt5.load_umt5(tmp_path)
    np.testing.assert_array_equal(params["shared"]["embedding"], table)


def test_published_size():
    """UMT5-XXL's encoder: 242 tensors."""
    config = umt5.UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
    )
    leaves = jax.tree.leaves(umt5.abstract_params(umt5.UMT5Encoder(config)))
    assert len(leaves) == 242 and sum(leaf.size for leaf in leaves) == 5_680_910_336


def test_a_t5_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.T5EncoderModel(transformers.T5Config(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected model_type umt5; received 't5'"):
        umt5.load_umt5(tmp_path)
