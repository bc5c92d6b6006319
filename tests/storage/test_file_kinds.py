"""Files that are not what their names say: what is said about them."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from marble_jax.errors import InputError
from marble_jax.storage.file_kinds import kind_of_file
from marble_jax.storage.files import MOST_JSON_BYTES, read_json
from marble_jax.weights.safetensors_files import SafetensorsFile

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 5\n"
PAGE = (
    b"\n  <!DOCTYPE html><html><body>Access to this model is restricted</body></html>" + b" " * 999
)


@pytest.mark.parametrize(
    "content, kind",
    [
        (POINTER, "a Git LFS pointer in place of the file .run `git lfs pull`"),
        (PAGE, "an HTML page in place of the file .log in or accept the licence"),
        (b"\xef\xbb\xbf<html>", "an HTML page"),
        (b"<Error><Code>AccessDenied</Code></Error>", "an HTML page"),
        (b"/annex/objects/MD5E-s1--a", "a git-annex pointer"),
        (pickle.dumps({"a": 1}), "a Python pickle"),
        (b"\x1f\x8b\x08rest", "a gzip archive"),
        (b"GGUF\x03", "a GGUF file of quantised weights"),
        (b"", "an empty file"),
    ],
)
def test_the_kind_is_in_the_line(tmp_path, content, kind):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    for call in (lambda: SafetensorsFile(file), lambda: read_json(file)):
        with pytest.raises(InputError, match=kind) as caught:
            call()
        assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


def test_a_zip_is_told_from_safetensors(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr("data.pkl", "x")
    with pytest.raises(InputError, match="a ZIP archive, as torch.save writes"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_what_is_right_is_of_no_other_kind(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "b.safetensors").write_bytes(save({"x": np.ones(3, np.float32)}))
    assert kind_of_file(tmp_path / "a.json") == kind_of_file(tmp_path / "b.safetensors") == ""
    assert kind_of_file(tmp_path / "absent") == ""


def test_a_large_json_file_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(InputError, match=f"at most {MOST_JSON_BYTES} bytes; received 67108865"):
        read_json(tmp_path / "a.json")
