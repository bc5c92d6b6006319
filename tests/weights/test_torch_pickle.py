"""Files of `torch.save`: exact values, wrappers, and refusal of everything that is not plain tensors."""

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from marble_jax.errors import InputError
from marble_jax.weights.torch_pickle import TorchPickleFile, open_weights

torch = pytest.importorskip("torch")
VALUES = {
    "a.weight": torch.arange(6.0).reshape(2, 3).T,
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2]),
    "d": torch.tensor([1.5], dtype=torch.float16),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"epoch": 3, "state_dict": t},
        lambda t: {"model": {f"module.{k}": v for k, v in t.items()}},
    ],
)
def test_reads_what_was_saved(tmp_path, zipped, wrap):
    torch.save(wrap(VALUES), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    file = open_weights(tmp_path / "x.pt")
    assert file.keys() == list(VALUES) and file.file("b") == tmp_path / "x.pt"
    assert [file.shape(k) for k in file.keys()] == [(3, 2), (), (2,), (1,)]
    assert [file.dtype(k) for k in file.keys()] == [
        np.float32,
        ml_dtypes.bfloat16,
        np.int64,
        np.float16,
    ]
    np.testing.assert_array_equal(file.read("a.weight"), [[0, 3], [1, 4], [2, 5]])
    assert file.read("b") == 2.5 and file.read("b").dtype == ml_dtypes.bfloat16


def test_safetensors_by_their_ending(tmp_path):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    assert open_weights(tmp_path / "x.safetensors").keys() == ["x"]


class Evil:
    """A pickle of it runs a command when it is opened in the usual way."""

    def __reduce__(self):
        return os.system, ("touch /tmp/marble_jax_pickle_ran",)


def test_refuses_code(tmp_path):
    torch.save({"state_dict": VALUES, "optimizer": Evil()}, tmp_path / "x.pt")
    with pytest.raises(
        InputError,
        match="expected a file of tensors that opens with weights_only; received Unpickl",
    ):
        TorchPickleFile(tmp_path / "x.pt")
    assert not os.path.exists("/tmp/marble_jax_pickle_ran")


def test_bad_files(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="expected a file of weights; received no such file"):
        TorchPickleFile(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(
        InputError, match="expected a file of tensors that opens with weights_only; received"
    ):
        TorchPickleFile(tmp_path / "x.bin")
    torch.save([1, 2], tmp_path / "x.bin")
    with pytest.raises(InputError, match="expected named tensors; received a list without any"):
        TorchPickleFile(tmp_path / "x.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(
        InputError, match="expected the package torch to read a pickled file; received none"
    ):
        TorchPickleFile(tmp_path / "x.bin")
