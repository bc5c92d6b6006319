"""Conversion with several families registered: each model finds its own, and the code of none is in convert/."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import marble_jax
from marble_jax.convert.original import open_original
from marble_jax.convert.sources import open_model
from marble_jax.errors import InputError
from marble_jax.families.registry import families
from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.weights import hub

EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded" / "pipeline"))
assert SD3_FORMATS.single_file is not None
OTHER = dataclasses.replace(
    SD3_FORMATS,
    name="Other",
    pipeline="OtherPipeline",
    components=("transformer", "text_encoder"),
    carried=("tokenizer",),
    classes={
        **SD3_FORMATS.classes,
        "transformer": ("diffusers", "OtherTransformer"),
        "text_encoder": ("transformers", "OtherEncoder"),
    },
    single_file=dataclasses.replace(SD3_FORMATS.single_file, recognizes=lambda keys: False),
)
"""A family that shares folder names with SD3 and nothing else."""
BOTH = (OTHER, SD3_FORMATS)


def test_every_registered_family_is_complete():
    for family in (family.formats for family in families()):
        assert set(family.classes) == set(family.folders)
        assert set(family.stems) == set(family.components) and family.adapted in family.components
        assert family.lora.diffusers_prefix in family.lora.prefixes


def test_the_index_tells_the_family(tmp_path):
    assert open_model(str(EMBEDDED), BOTH, components=["vae"]).formats is SD3_FORMATS
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    with pytest.raises(
        InputError,
        match="expected a OtherPipeline or StableDiffusion3Pipeline; received Flux2Pipeline",
    ):
        open_model(str(tmp_path), BOTH)


def test_without_index_the_classes_of_the_components_tell_it(tmp_path):
    shutil.copytree(EMBEDDED / "text_encoder", tmp_path / "text_encoder")
    assert open_model(str(tmp_path), BOTH).formats is SD3_FORMATS
    path = tmp_path / "text_encoder/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["OtherEncoder"]}))
    assert open_model(str(tmp_path), BOTH).formats is OTHER
    path.write_text(json.dumps({**config, "architectures": ["Neither"]}))
    assert open_model(str(tmp_path), BOTH).formats is OTHER  # the first, for want of a better one


def test_a_single_file_of_no_family(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(
        InputError,
        match="expected a single-file checkpoint of Other or SD3; received 1 tensors of none",
    ):
        open_original(tmp_path / "x.safetensors", BOTH)


def test_a_hub_model_comes_without_the_components_that_are_not_wanted(monkeypatch):
    asked = {}

    def download(name, patterns, skipped, revision):
        asked.update(patterns=patterns, skipped=skipped)
        return EMBEDDED

    monkeypatch.setattr(hub, "download", download)
    model = open_model("owner/model", [SD3_FORMATS], components=["vae"])
    assert list(model.components) == ["vae"]
    assert asked["patterns"][0] == "model_index.json" and "tokenizer_3/*" in asked["patterns"]
    assert {"*.fp16*", "transformer/*", "text_encoder_3/*"} <= set(asked["skipped"])
    assert not {"vae/*", "tokenizer_3/*"} & set(asked["skipped"])


def test_a_revision_is_of_a_hub_model(tmp_path):
    """A directory or a file of this machine has none: it would be opened as it is."""
    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors")
    for place in (EMBEDDED, tmp_path / "x.safetensors"):
        with pytest.raises(
            InputError, match="--revision: expected with a Hub name, .* 'v2' with /"
        ):
            open_model(str(place), BOTH, revision="v2")


@pytest.mark.parametrize("room", ["convert", "weights"])
def test_no_family_is_named_below_families(room):
    named = re.compile(r"\b(SD3\w*|MMDiT\w*|T5\w*|CLIP\w*|StableDiffusion\w*|FLUX\w*|Wan)\b")
    for path in sorted((Path(marble_jax.__file__).parent / room).glob("*.py")):
        assert not named.findall(path.read_text(encoding="utf-8")), path
