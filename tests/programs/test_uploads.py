"""Uploads beside the training, against a stand-in of the Hub: each a commit, and none that stops or delays the run."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
from etils import epath
from hub_server import READER, TOKEN, served
from huggingface_hub import constants

from marble_jax.errors import InputError
from marble_jax.programs import uploads
from marble_jax.programs.uploads import Uploads

KEY = "model", "me/lora"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which this process takes for the Hub."""
    with served() as (repositories, root):
        monkeypatch.setattr(constants, "ENDPOINT", root)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield repositories


def _folder(path, content):
    (path / "lora").mkdir(parents=True)
    (path / "README.md").write_text(content)
    (path / "lora" / "adapter_model.safetensors").write_text(content)
    return epath.Path(path)


def test_every_export_is_a_commit_even_when_its_folder_goes_at_once(hub, tmp_path):
    said = []
    pushed = Uploads("me/lora", True, said.append)
    for step in (2, 4):
        folder = _folder(tmp_path / f"step_{step}", f"weights {step}")
        pushed.push(folder, f"ema after step {step}")
        folder.rmtree()
    pushed.close(hurried=False)
    assert hub.private[KEY] is True
    assert hub.messages[KEY] == ["ema after step 2", "ema after step 4"]
    assert hub.files[KEY] == {
        "README.md": b"weights 4",
        "lora/adapter_model.safetensors": b"weights 4",
    }
    assert len(said) == 2 and all(line.startswith("Hub: http://127.0.0.1:") for line in said)


def test_an_upload_that_fails_is_a_line(hub, tmp_path, monkeypatch):
    said = []
    pushed = Uploads("me/lora", False, said.append)
    monkeypatch.setenv("HF_TOKEN", READER)
    pushed.push(_folder(tmp_path / "a", "x"), "ema after step 2")
    pushed.push(epath.Path(tmp_path / "gone"), "ema after step 4")
    pushed.close(hurried=False)
    assert said[0].startswith("upload of gone failed, training goes on: FileNotFoundError")
    assert said[1] == (
        "upload failed, training goes on: config.export.push_to_hub: expected to write the Hub repository "
        "'me/lora'; received a token without that right (make one with write access to it)"
    )


def test_no_room_for_the_copy_is_a_line(hub, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = []
    pushed = Uploads("me/lora", False, said.append)
    monkeypatch.setattr(uploads.tempfile, "mkdtemp", full)
    pushed.push(_folder(tmp_path / "step_2", "x"), "ema after step 2")
    monkeypatch.undo()
    pushed.close(hurried=False)
    assert said == [
        "upload of step_2 failed, training goes on: OSError: [Errno 28] No space left on device"
    ]


def test_an_upload_that_never_ends_is_given_up(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "HURRIED_SECONDS", 0.2)
    monkeypatch.setattr(uploads, "push_folder", lambda *_: threading.Event().wait())
    monkeypatch.setattr(uploads.tempfile, "tempdir", str(tmp_path))
    said = []
    pushed = Uploads("me/lora", False, said.append)
    start = time.monotonic()
    pushed.push(_folder(tmp_path / "a", "x"), "ema after step 2")
    pushed.push(_folder(tmp_path / "b", "x"), "ema after step 4")
    pushed.close(hurried=True)
    assert time.monotonic() - start < 5
    assert len(said) == 1 and "upload to me/lora is given up after 0.2 s" in said[0]
    assert not list(tmp_path.glob("marble-jax-upload-*"))


def test_a_repository_that_may_not_be_written_is_refused_before_the_first_step(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="config.export.push_to_hub: expected to write .*no valid"):
        Uploads("me/lora", False, print)
    with pytest.raises(InputError, match="config.export.push_to_hub: expected USER/NAME"):
        Uploads("lora", False, print)
    assert KEY not in hub.files
