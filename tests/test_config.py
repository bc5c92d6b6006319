"""The table of keys, the files in configs/, and what a configuration may not hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from marble_jax.cli.configuration import load_config
from marble_jax.config import KEYS, check, default_config, describe, flatten
from marble_jax.errors import InputError

ROOT = Path(__file__).parents[1]
READERS = "\n".join(
    path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "marble_jax").rglob("*.py"))
    if path.parent.name != "config"
)
FILES = sorted((ROOT / "configs").glob("*.py"))


def presets(path: Path) -> tuple[str, ...]:
    """The presets a configuration file names, read without running it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PRESETS":
            return tuple(
                map(ast.literal_eval, getattr(node.value, "keys", None) or node.value.elts)
            )
    return ("",)


ALL = [(path, preset) for path in FILES for preset in presets(path)]


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_documented_and_allowed(name):
    key = KEYS[name]
    assert re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)?", name)
    assert len(key.meaning) > 8 and key.unit and key.source in ("ours", "paper", "NFT")
    assert isinstance(key.default, (bool, int, float, str, tuple))
    if "|" in key.unit:
        assert key.default in key.unit.split("|")


def test_the_defaults_pass():
    check(flatten(default_config()))


def test_help_names_every_key_with_its_default():
    text = describe()
    for name, key in KEYS.items():
        assert f"  {name} = {key.default!r}\n      {key.meaning} [{key.unit}; {key.source}]" in text


@pytest.mark.parametrize("name", [n for n in KEYS if n != "name"])
def test_every_key_is_used(name):
    """`a.b` is read as an attribute somewhere: a key that changes nothing would be a trap."""
    leaf = name.rpartition(".")[2]
    assert re.search(rf"\.{leaf}\b", READERS), f"{name} is never read"


def test_defaults_become_a_tree_and_back():
    config = default_config()
    assert isinstance(config.rollout, ml_collections.ConfigDict)
    assert flatten(config) == {name: key.default for name, key in KEYS.items()}
    assert flatten(ml_collections.ConfigDict(config.to_dict())) == flatten(config)


def test_every_configuration_file_is_covered():
    assert {"embedded.py"} <= {path.name for path in FILES}
    assert "smoke" in presets(ROOT / "configs" / "embedded.py")


@pytest.mark.parametrize(("path", "preset"), ALL, ids=[f"{p.stem}:{s}" for p, s in ALL])
def test_files_load_for_every_preset(path, preset):
    config = load_config([f"--config={path}" + (f":{preset}" if preset else "")])
    assert set(flatten(config)) == set(KEYS)
    with pytest.raises(AttributeError):
        config.surprise = 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "training.num_steps",
            0,
            "config.training.num_steps: expected a number >= 1 .optimiser steps.; received 0",
        ),
        ("training.num_steps", "3", "config.training.num_steps: expected int .*; received '3'"),
        ("training.num_steps", True, "config.training.num_steps: expected int .*; received True"),
        (
            "training.learning_rate",
            float("nan"),
            "config.training.learning_rate: expected a number >= 0 .*received nan",
        ),
        ("nft.beta", 0.0, r"config.nft.beta: expected a number in \(0, 1\] .*; received 0.0"),
        (
            "harmonize.rho",
            1.0,
            r"config.harmonize.rho: expected a number in \[0, 1\) .*; received 1.0",
        ),
        ("rollout.images_per_prompt", 1, "expected a number >= 2 .*; received 1"),
        (
            "advantages.scale",
            "batch",
            "config.advantages.scale: expected one of global, group; received 'batch'",
        ),
        (
            "harmonize.mode",
            "amortize",
            "one of exact, amortized, upstream; received 'amortize'; did you mean 'amor",
        ),
        (
            "harmonize.reward_weights",
            (1.0, 0.0),
            r"reward_weights: expected a number > 0 .*received \(1.0, 0.0\)",
        ),
        (
            "harmonize.fixed_alpha",
            ("a",),
            r"harmonize.fixed_alpha: expected tuple of numbers .*received \('a',\)",
        ),
        (
            "rewards.train",
            (1, 2),
            r"config.rewards.train: expected tuple of texts .*received \(1, 2\)",
        ),
        ("rewards.train", "ocr", "config.rewards.train: expected tuple of texts .*received 'ocr'"),
        ("rollout.merge_adapter", 1, "config.rollout.merge_adapter: expected bool .*; received 1"),
        (
            "model.atention",
            "xla",
            "model.atention: expected a configuration key; .*did you mean 'model.attention'",
        ),
    ],
)
def test_what_the_table_does_not_allow(name, value, message):
    with pytest.raises(InputError, match=message):
        check({**flatten(default_config()), name: value})


def test_a_key_left_out():
    flat = flatten(default_config())
    del flat["nft.beta"]
    with pytest.raises(InputError, match="config.nft.beta: expected a value .*; received none"):
        check(flat)


def test_the_embedded_presets_evaluate_the_same_images_on_the_same_rewards():
    """A specialist is compared with the others: whatever it trains on, it is measured like them."""
    path = ROOT / "configs" / "embedded.py"
    made = {
        p: load_config([f"--config={path}:{p}"]) for p in presets(path) if p not in ("", "smoke")
    }
    for preset, config in made.items():
        assert sorted((*config.rewards.train, *config.rewards.heldout)) == [
            "aesthetic",
            "alignment",
            "geneval",
            "judge",
            "ocr",
            "preference",
        ], preset
        assert "judge" in config.rewards.heldout
        assert tuple(config.evaluation.sources or config.prompts.sources) == (
            "general",
            "ocr",
            "geneval",
        )
        same = ("num_prompts", "num_steps", "solver", "seed")
        assert [config.evaluation[k] for k in same] == [made["exact"].evaluation[k] for k in same]
    only = {name.removeprefix("only_"): c for name, c in made.items() if name.startswith("only_")}
    assert {n: tuple(c.rewards.train) for n, c in only.items()} == {
        n: (n,) for n in made["exact"].rewards.train
    }
    assert {
        n: tuple(c.prompts.sources) for n, c in only.items() if len(c.prompts.sources) == 1
    } == {"ocr": ("ocr",), "geneval": ("geneval",)}
    ratio = np.divide(
        made["upweighted"].advantages.weights, made["weighted_sum"].advantages.weights
    )
    np.testing.assert_allclose(ratio, (1, 1, 1, 2, 2))
