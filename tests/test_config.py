"""The table of keys, the files in configs/, and what a configuration may not hold."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from marble_jax.cli.configuration import load_config
from marble_jax.config import (
    KEYS,
    Settings,
    check,
    default_config,
    flatten,
    keys_meant,
    may_change_on_resume,
    sections,
    settings_from_flat,
    settings_of,
)
from marble_jax.config.keys import range_of
from marble_jax.config.presets import described_presets, title_of
from marble_jax.config.renamed import FOREIGN_KEYS, RENAMED_KEYS, RENAMED_VALUES
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


def test_sections_have_every_key_once():
    names = [name for group in sections().values() for name in group]
    assert sorted(names) == sorted(KEYS) and sections()["run"] == ["name", "seed"]


@pytest.mark.parametrize("name", FOREIGN_KEYS)
def test_names_of_other_libraries_lead_to_keys(name):
    """No such name is a key, and what it leads to is one, or an option."""
    assert name not in KEYS and keys_meant(f"train.{name}") == tuple(FOREIGN_KEYS[name].split())
    assert all(key in KEYS or key.startswith("--") for key in keys_meant(name))


def test_a_key_without_its_section_is_found_where_there_is_one():
    assert keys_meant("chunk_size") == keys_meant("solve.chunk_size") == ("harmonize.chunk_size",)
    assert keys_meant("every_steps") == keys_meant("nonsense") == ()
    assert keys_meant("nft.beta") == ("nft.beta",) and keys_meant("seed") == ("seed",)


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_preset_is_described(path):
    about = described_presets(path)
    assert list(about) == list(presets(path))
    assert all(10 < len(line) < 100 for line in about.values()) and len(title_of(path)) > 20


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
            "config.training.learning_rate: expected a finite number .*received nan",
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


EARLIER_KEYS = {
    "model.resolution": "config.model.height and config.model.width",
    "model.t5": "config.model.omit_text_encoders",
    "advantages.scalarise": "config.advantages.scalarize",
    "policies.ema_decay": "config.ema.decay",
    "policies.rate": "config.rollout_policy.rate",
    "training.schedule": "config.training.learning_rate_schedule",
    "evaluation.num_pictures": "config.evaluation.num_images",
}


@pytest.mark.parametrize("name", RENAMED_KEYS)
def test_earlier_names_of_keys_are_answered_with_todays(name):
    message = f"config.{name}: expected config.{RENAMED_KEYS[name]}, as it is called now; received its earlier name"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check({**flatten(default_config()), name: 1})
    for known_name in re.findall(r"[a-z_]+\.[a-z_0-9]+", RENAMED_KEYS[name].replace("config.", "")):
        assert known_name in KEYS
    assert name not in KEYS and EARLIER_KEYS.get(name, "") in message


def test_keys_that_were_renamed_are_on_the_list():
    assert set(EARLIER_KEYS) <= set(RENAMED_KEYS)


@pytest.mark.parametrize(
    ("name", "earlier", "today"),
    [
        ("harmonize.mode", "amortised", "amortized"),
        ("harmonize.mode", "faithful", "upstream"),
        ("export.policy", "old", "rollout"),
    ],
)
def test_earlier_values_are_answered_with_todays(name, earlier, today):
    message = f"config.{name}: expected '{today}', as it is called now; received '{earlier}'"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check({**flatten(default_config()), name: earlier})
    check({**flatten(default_config()), name: today})


def test_every_earlier_value_has_one_of_today():
    for name, values in RENAMED_VALUES.items():
        choices = KEYS[name].unit.split("|")
        assert set(values.values()) <= set(choices) and not set(values) & set(choices)


@pytest.mark.parametrize(
    ("unit", "inside", "outside"),
    [
        ("steps, >= 1", (1, 1e9, float("inf")), (0.999, float("nan"))),
        ("> 0", (1e-30,), (0, -1, float("nan"))),
        ("[0, 1)", (0, 0.999), (-1e-9, 1)),
        ("(0, 1]", (1e-9, 1), (0, 1.001)),
        ("[0, 1/K]", (0, 0.5), (-0.1, 1.1)),
    ],
)
def test_ranges(unit, inside, outside):
    allowed = range_of(unit)
    assert all(allowed.contains(number) for number in inside)
    assert not any(allowed.contains(number) for number in outside)


def test_units_without_a_range():
    assert range_of("-") is None and range_of("path") is None and range_of("a|b") is None


def test_settings_have_the_kinds_of_the_table():
    flat = flatten(default_config())
    flat |= {"nft.beta": 1, "rewards.train": ["ocr"], "harmonize.fixed_alpha": [1]}
    settings = settings_from_flat(flat)
    assert settings.nft.beta == 1.0 and type(settings.nft.beta) is float
    assert settings.rewards.train == ("ocr",) and settings.harmonize.fixed_alpha == (1,)
    assert settings_from_flat(flatten(settings)) == settings
    assert settings_of(default_config()) == Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.nft.beta = 0.5


def test_what_may_change_on_resume():
    flat = flatten(default_config())
    assert may_change_on_resume("logging.wandb", flat) and not may_change_on_resume("seed", flat)
    assert not may_change_on_resume("no.such", flat)
    assert may_change_on_resume("training.num_steps", flat)
    for changes in (
        {"training.learning_rate_schedule": "cosine"},
        {"reward_schedule.stages": ("ocr", "geneval")},
    ):
        assert not may_change_on_resume("training.num_steps", flat | changes)
    counted = {"reward_schedule.stages": ("ocr:5", "geneval:5")}
    assert may_change_on_resume("training.num_steps", flat | counted)


def test_a_key_left_out():
    flat = flatten(default_config())
    del flat["nft.beta"]
    with pytest.raises(InputError, match="config.nft.beta: expected a value .*; received none"):
        check(flat)


def test_the_smoke_preset_asks_for_no_extra():
    smoke = load_config([f"--config={ROOT}/configs/embedded.py:smoke"])
    entries = json.loads(
        (ROOT / "marble_jax" / "embedded" / "rewards" / "rewards.json").read_text()
    )
    rewards = (*smoke.rewards.train, *smoke.rewards.heldout)
    assert len(rewards) == 5 and set(rewards) < set(entries)
    assert "ocr" not in {entries[name]["kind"] for name in rewards}


def test_the_embedded_presets_evaluate_the_same_images_on_the_same_rewards():
    """A specialist is compared with the others: whatever it trains on, it is measured like them."""
    path = ROOT / "configs" / "embedded.py"
    made = {
        p: load_config([f"--config={path}:{p}"]) for p in presets(path) if p not in ("", "smoke")
    }
    opposed = made.pop("opposed"), made.pop("opposed_sum")
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
    assert not made["weighted_sum_raw"].advantages.weights
    for config in opposed:
        trained = (*made["exact"].rewards.train, "jpeg_compressibility")
        assert (tuple(config.rewards.train), tuple(config.rewards.heldout)) == (trained, ("judge",))
    assert opposed[1].advantages.weights[:5] == made["weighted_sum"].advantages.weights
