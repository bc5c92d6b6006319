"""Options and typed configuration overrides, as text from a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from marble_jax.cli.configuration import load_config, load_settings
from marble_jax.cli.options import (
    boolean,
    check_either,
    number,
    refuse_config,
    split,
    whole_number,
    word_list,
)
from marble_jax.config import settings_of
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


def test_earlier_names_of_options_are_answered_with_todays():
    options, renamed = {"policy": "ema"}, {"which": "--policy=NAME"}
    with pytest.raises(
        InputError,
        match="^--which: expected --policy=NAME, as it is called now; received its earlier name$",
    ):
        split(["--which=best"], options, renamed)
    assert split(["--policy=best"], options, renamed) == ({"policy": "best"}, [])


def test_numbers():
    assert whole_number({"n": "7"}, "n", 7) == 7 and type(whole_number({"n": "7"}, "n", 0)) is int
    assert number({"n": "7"}, "n", 0) == 7.0 and type(number({"n": "7"}, "n", 0)) is float
    assert number({"n": "1e-3"}, "n", 0) == 1e-3


@pytest.mark.parametrize("text", ["x", "", "2.5", "-1", "1e3"])
def test_what_is_no_whole_number(text):
    with pytest.raises(
        InputError, match=f"^--n: expected a whole number of at least 0; received '{text}'$"
    ):
        whole_number({"n": text}, "n", 0)


@pytest.mark.parametrize("text", ["x", "", "0.05", "nan", "inf", "-inf"])
def test_what_is_no_number(text):
    with pytest.raises(
        InputError, match=f"^--n: expected a number of at least 0.1; received '{text}'$"
    ):
        number({"n": text}, "n", 0.1)


@pytest.mark.parametrize("text", ["²", "\u0661", "\uff11", "1_0", "+1" * 20])
def test_digits_are_those_from_0_to_9(text):
    """`int` and `float` read digits of other scripts, and underscores between them."""
    for read in (whole_number, number):
        with pytest.raises(InputError, match="^--n: expected a .*number of at least 0; received"):
            read({"n": text}, "n", 0)


def test_numbers_that_are_too_large():
    with pytest.raises(InputError, match="of at least 1 and at most 4096; received '5000'$"):
        whole_number({"n": "5000"}, "n", 1, 4096)
    with pytest.raises(InputError, match="of at least 0 and at most 10; received '1e300'$"):
        number({"n": "1e300"}, "n", 0, 10)
    with pytest.raises(InputError, match="at most 2147483647; received '999999999999999999"):
        whole_number({"n": "9" * 400}, "n", 0)
    assert whole_number({"n": "4096"}, "n", 1, 4096) == 4096


def test_one_of_two_options():
    check_either("verb", {"a": "x", "b": ""}, "a", "b")
    check_either("verb", {"a": "", "b": "x"}, "a", "b")
    with pytest.raises(InputError, match="^verb: expected either --a or --b; received both$"):
        check_either("verb", {"a": "x", "b": "y"}, "a", "b")
    with pytest.raises(InputError, match="^verb: expected either --a or --b; received neither$"):
        check_either("verb", {"a": "", "b": ""}, "a", "b")


def test_verbs_without_a_configuration():
    refuse_config("verb: expected no --config", [])
    with pytest.raises(InputError, match="^verb: expected no --config; received --config=f.py$"):
        refuse_config("verb: expected no --config", ["--config=f.py"])


def test_lists_of_words():
    assert word_list(" a, b,,c ") == ("a", "b", "c") and word_list("") == ()
    assert word_list("a, b | c", "|") == ("a, b", "c")


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


def test_settings_are_those_of_the_configuration():
    arguments = [SMOKE, "--config.nft.beta=1"]
    settings = load_settings(arguments)
    assert settings == settings_of(load_config(arguments)) and settings.nft.beta == 1.0


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
        (
            "--config.model.t5=false",
            "config.model.t5: expected config.model.omit_text_encoders, as it is "
            "called now; received its earlier name",
        ),
        (
            "--config.harmonize.mode=amortised",
            "config.harmonize.mode: expected 'amortized', as it is called now; received 'amortised'",
        ),
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
