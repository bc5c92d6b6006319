"""Options and typed configuration overrides, as text from a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from marble_jax.cli.options import boolean, load_config, split
from marble_jax.errors import InputError

FILE = str(Path(__file__).parents[2] / "configs" / "embedded.py")
SMOKE = f"--config={FILE}:smoke"


def test_split_separates_options_from_configuration():
    values, rest = split(
        ["--workdir=/a", "--config=f.py", "--config.nft.beta", "0.2", "--dry"],
        {"workdir": None, "seed": "0", "dry": "false"},
    )
    assert values == {"workdir": "/a", "seed": "0", "dry": "true"}
    assert rest == ["--config=f.py", "--config.nft.beta=0.2"]


def test_values_may_hold_equals_signs_newlines_and_minus():
    values, _ = split(["--text=a=b\nc", "--seed", "-1"], {"text": None, "seed": "0"})
    assert values == {"text": "a=b\nc", "seed": "-1"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--wrkdir=1"],
            "option: expected one of --config, --workdir; received --wrkdir; did you mean 'workdir'",
        ),
        (["word"], "command line: expected --name=value; received 'word'"),
        (["--workdir"], "--workdir: expected a value; received none"),
        (["--workdir", "--config=a"], "--workdir: expected a value; received none"),
        ([], "--workdir: expected a value; received none"),
        (["--workdir=1", "--workdir=2"], "--workdir: expected once; received twice"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(InputError, match=message):
        split(argv, {"workdir": None})


def test_boolean():
    assert boolean("grid", "True") and not boolean("grid", "false")
    with pytest.raises(InputError, match="--grid: expected one of true, false; received 'maybe'"):
        boolean("grid", "maybe")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("training.num_steps=7", 7),
        ("training.learning_rate=1e-4", 1e-4),
        ("lora.alpha=8", 8.0),
        ("nft.beta=1", 1.0),
        ("rollout.merge_adapter=false", False),
        ("name=some run", "some run"),
        ("model.path=/a=b", "/a=b"),
        ("rewards.train=('ocr', 'geneval')", ("ocr", "geneval")),
        ("rewards.train=ocr,geneval", ("ocr", "geneval")),
        ("rewards.train=ocr", ("ocr",)),
        ("rewards.heldout=()", ()),
        ("rewards.heldout=", ()),
        ("harmonize.fixed_alpha=(0.5, 0.25, 0.25, 0, 0)", (0.5, 0.25, 0.25, 0, 0)),
        ("harmonize.reward_weights=1,2,1,1,1", (1, 2, 1, 1, 1)),
    ],
)
def test_overrides_have_the_type_of_their_key(argument, expected):
    config = load_config([SMOKE, f"--config.{argument}"])
    node = config
    for part in argument.split("=")[0].split("."):
        node = node[part]
    assert node == expected and type(node) is type(expected)


def test_the_last_override_wins_and_the_others_stay():
    config = load_config([SMOKE, "--config.nft.beta=0.2", "--config.nft.beta=0.3"])
    assert (
        config.nft.beta == 0.3 and config.nft.kl_weight == 1e-4 and config.name == "embedded-smoke"
    )
    assert load_config([SMOKE]).nft.beta == 0.1
    twice = load_config([SMOKE, "--config.rewards.train=ocr,geneval", "--config.rewards.train=ocr"])
    assert twice.rewards.train == ("ocr",)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.training.num_stps=3",
            "training.num_stps: expected a configuration key; .*mean 'training.num_steps'",
        ),
        ("--config.model=3", "config.model: expected a configuration key; received an unknown one"),
        (
            "--config.training.num_steps=abc",
            r"num_steps: expected int \(optimiser steps\); received 'abc'",
        ),
        (
            "--config.training.num_steps=2.5",
            r"config.training.num_steps: expected int .*; received '2.5'",
        ),
        ("--config.nft.beta=half", "config.nft.beta: expected float .*; received 'half'"),
        ("--config.nft.beta=2", r"config.nft.beta: expected a number in \(0, 1\] .*; received 2.0"),
        (
            "--config.rollout.merge_adapter=maybe",
            "config.rollout.merge_adapter: expected bool .*; received 'maybe'",
        ),
        (
            "--config.rewards.train=1,2",
            r"config.rewards.train: expected tuple of texts .*; received \(1, 2\)",
        ),
        (
            "--config.harmonize.fixed_alpha=a,b",
            "config.harmonize.fixed_alpha: expected tuple of numbers",
        ),
        (f"--config={FILE}", "--config: expected one configuration file .*; received 2"),
    ],
)
def test_bad_overrides(argument, message):
    with pytest.raises(InputError, match=message):
        load_config([SMOKE, argument])


def test_bad_files(tmp_path):
    with pytest.raises(
        InputError, match="--config: expected a configuration file; .*embeded.py'; did you mean"
    ):
        load_config([f"--config={FILE.replace('embedded', 'embeded')}"])
    with pytest.raises(
        InputError, match="preset of configs/embedded.py: .*received 'smok'; did you mean 'smoke'"
    ):
        load_config([f"--config={FILE}:smok"])
    for text, message in (
        ("x = 1\n", "expected a file with get_config.* received KeyError: 'get_config'"),
        ("def get_config(:\n", "expected a file with get_config.*received SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", "received ZeroDivisionError: division by zero"),
        (
            "def get_config():\n    return {}\n",
            "expected get_config to return a ConfigDict; received dict",
        ),
        (
            "from marble_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
            "    config.nft.betta = 1.0\n    return config\n",
            "config.nft.betta: .*did you mean 'nft.beta'",
        ),
        (
            "import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({'seed': 1})\n",
            "config.name: expected a value .*; received none",
        ),
    ):
        file = tmp_path / "mine.py"
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            load_config([f"--config={file}"])
    with pytest.raises(InputError, match="expected a file with get_config.*received TypeError"):
        file.write_text("def get_config():\n    return 1\n")
        load_config([f"--config={file}:preset"])
