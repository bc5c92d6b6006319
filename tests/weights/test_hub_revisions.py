"""Hub models by revision: pinned in their names, put on record by commit; nobody else's code is ever asked for."""

from __future__ import annotations

import ast
from pathlib import Path

import huggingface_hub
import pytest

from marble_jax.errors import InputError
from marble_jax.families.model_index import name_without_owner
from marble_jax.weights import hub

PACKAGE = Path(__file__).parents[2] / "marble_jax"
COMMIT = "0123456789abcdef"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """(name, revision) of every download; the answer lies in a cache as the Hub's library makes it."""
    calls = []
    snapshot = tmp_path / "models--owner--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)

    def download(name, revision, **_):
        calls.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "_commits", {})
    return calls


def test_a_revision_in_the_name(asked):
    hub.find_model("owner/model@v1.0", ("vae",))
    hub.download("owner/model", ["*.json"], revision="main")
    hub.download("owner/model@v1.0", ["*.json"], revision="v1.0")
    assert asked == [("owner/model", "v1.0"), ("owner/model", "main"), ("owner/model", "v1.0")]
    assert hub.commits() == {"owner/model": COMMIT}


def test_a_run_s_commits_are_what_names_without_a_revision_mean(asked):
    hub.hold_to({"owner/model": COMMIT})
    hub.find_model("owner/model", ("vae",))
    hub.find_model("owner/model@v1.0", ("vae",))
    hub.find_model("owner/other", ("vae",))
    hub.hold_to({})
    hub.find_model("owner/model", ("vae",))
    revisions = [revision for _, revision in asked]
    assert revisions == [COMMIT, "v1.0", None, None]


def test_two_revisions(asked):
    with pytest.raises(InputError, match="expected one revision; received 'a' and 'b'"):
        hub.download("owner/model@a", [], revision="b")
    assert asked == [] and hub.commits() == {}


def test_a_directory_has_no_revision(asked, tmp_path):
    with pytest.raises(InputError, match="expected no revision of a directory .*; received 'v1.0'"):
        hub.find_model(tmp_path, ("vae",), revision="v1.0")
    assert hub.find_model(tmp_path, ("vae",)) == tmp_path and asked == []


@pytest.mark.parametrize("name", ["owner/model@", "owner/@a", "owner/model@a/b", "a@b", "o/m@a b"])
def test_names_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a directory or a Hub name owner/model"):
        hub.find_model(name, ())


def test_published_models_are_known_by_any_revision():
    assert name_without_owner("me/stable-diffusion-3.5-medium@abc") == "stable-diffusion-3.5-medium"


def test_no_library_may_ask_for_the_code_of_a_model():
    """Every opening of a model by another library says that its code is not run, or reads plain files of ours."""
    plain = {"PeftModel", "transformer_class", "pipe.transformer"}
    calls = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "from_pretrained":
                continue
            calls += 1
            owner = ast.unparse(node.func.value).split(".")[-1]
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            code = keywords.get("trust_remote_code")
            refused = isinstance(code, ast.Constant) and code.value is False
            assert refused or owner in plain, f"{path.name}: {ast.unparse(node)}"
    assert calls >= 4
