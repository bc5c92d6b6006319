"""Models in buckets: what is copied, once, and what is said of one that cannot be had; a folder is the bucket here."""

import os
import shutil

import pytest
from etils import epath

from marble_jax.errors import InputError
from marble_jax.families import location as model_location
from marble_jax.programs.locations import EMBEDDED, resolve_path
from marble_jax.programs.locations import model_location as named
from marble_jax.weights import bucket

URL = "gs://models/tiny"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder that URL opens, and a home for copies."""
    root = tmp_path / "bucket"
    for name in ("transformer/sub", "vae", "text_encoder_3"):
        (root / name).mkdir(parents=True)
        (root / name / "weights").write_bytes(name.encode() * 3)
    shutil.copy(resolve_path(EMBEDDED, "pipeline") / bucket.INDEX, root)
    monkeypatch.setattr(bucket, "location", lambda what, url: epath.Path(root))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return root


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_only_what_a_run_reads_is_copied_and_only_once(model, tmp_path):
    copied = model_location.find_model(URL, ("text_encoder_3",))
    assert files(copied) == [bucket.INDEX, "transformer/sub/weights", "vae/weights"]
    assert tmp_path / "home" in copied.parents
    file = copied / "vae" / "weights"
    before = file.stat().st_ino
    # One that was cut short is copied again, the others are not.
    (copied / "transformer" / "sub" / "weights").write_bytes(b"cut")
    again = bucket.local_copy(URL, ("transformer", "vae", "text_encoder_3"))
    assert again == copied and file.stat().st_ino == before
    assert (copied / "transformer" / "sub" / "weights").read_bytes() == b"transformer/sub" * 3
    assert "text_encoder_3/weights" in files(copied)


def test_a_copy_that_breaks_off_leaves_no_half_file(model, monkeypatch):
    def full(self, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(InputError, match="model.path: expected room and access .*No space left"):
        bucket.local_copy(URL, ("vae",))
    assert files(model.parent / "home") == []


def test_a_bucket_without_a_model_is_refused(model):
    (model / bucket.INDEX).unlink()
    with pytest.raises(InputError, match=f"expected a directory with model_index.json.*{URL}"):
        bucket.local_copy(URL, ())


def test_what_has_to_be_on_this_machine(tmp_path):
    assert named(URL) == URL and named(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="prompts.path: expected a directory of this machine"):
        resolve_path("s3://prompts", "prompts")
