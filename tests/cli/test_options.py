"""Options and typed configuration overrides, as text from a command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from marble_jax.cli import kinds
from marble_jax.cli.configuration import load_config, load_settings
from marble_jax.cli.kinds import Number, Place, Switch, Text, Whole, Words, word_list
from marble_jax.cli.options import Option, Verb, check_either
from marble_jax.cli.parsing import parse
from marble_jax.config import settings_of
from marble_jax.config.keys import MOST_SEED
from marble_jax.errors import InputError

FILE = str(Path(__file__).parents[2] / "configs" / "embedded.py")
SMOKE = f"--config={FILE}:smoke"


WORKDIR = Option("workdir", "a run", Place(), required=True)
SEED = Option("seed", "of noise", Whole(), default="0", aliases=("random_seed",))
DRY = Option("dry", "tries", Switch())
GRID = Option("grid", "draws none", Switch(), default="true")


def read(argv, *options, config=True, **more):
    """Values of a command line, of a verb with these options."""
    return parse("verb", Verb("Does it.", ("...",), options, config=config, **more), argv)


def test_options_are_separated_from_the_configuration():
    argv = ["--workdir=/a", "--config=f.py", "--config.nft.beta", "0.2", "--dry"]
    values = read(argv, WORKDIR, SEED, DRY)
    assert (values.workdir, values.seed, values.dry) == ("/a", 0, True)
    assert values.config == ["--config=f.py", "--config.nft.beta=0.2"]
    assert values.command == "marble-jax verb " + " ".join(argv)


def test_values_may_hold_equals_signs_newlines_and_minus():
    text = Option("text", "any")
    level = Option("level", "of noise", Number(-5))
    values = read(["--text=a=b\nc", "--level", "-1"], text, level)
    assert (values.text, values.level) == ("a=b\nc", -1.0)
    assert read(["--text=--level=2"], text, level).text == "--level=2"
    assert read(["--text=", "--level=2"], text, level).text == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--wrkdir=1"],
            "option: expected one of --config, --workdir; received --wrkdir; did you mean 'workdir'",
        ),
        (["word"], "command line: expected --name=value; received 'word'"),
        (["--"], "command line: expected --name=value; received '--'"),
        (["--workdir"], "--workdir: expected a value; received none"),
        (["--workdir", "--config=a"], "--workdir: expected a value; received none"),
        ([], "--workdir: expected a value; received none"),
        (["--workdir=1", "--workdir=2"], "--workdir: expected once; received twice"),
        (["--work=1"], "option: expected one of --config, --workdir; received --work; did you"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(InputError, match=f"^{message}"):
        read(argv, WORKDIR)


def test_dashes_and_other_names_are_as_good():
    path = Option("rewards_path", "where", Place(), aliases=("path",))
    for written in ("--rewards_path", "--rewards-path", "--path"):
        assert read([f"{written}=x"], path).rewards_path == "x"
    assert read(["--random-seed", "3"], SEED).seed == 3
    assert read(["--config.nft.kl-weight=1"]).config == ["--config.nft.kl_weight=1"]
    with pytest.raises(InputError, match="^--seed: expected once; received twice$"):
        read(["--seed=1", "--random_seed=2"], SEED)


@pytest.mark.parametrize(
    ("argv", "dry", "grid"),
    [
        ([], False, True),
        (["--dry", "--grid"], True, True),
        (["--dry=True", "--grid=false"], True, False),
        (["--no-dry", "--no_grid"], False, False),
        (["--no-dry=false", "--no-grid=true"], True, False),
    ],
)
def test_switches_have_one_style(argv, dry, grid):
    values = read(argv, DRY, GRID)
    assert (values.dry, values.grid) == (dry, grid)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--grid=maybe"], "^--grid: expected one of true, false; received 'maybe'"),
        (["--no-grid=maybe"], "^--no_grid: expected one of true, false; received 'maybe'"),
        (["--dry", "--no-dry"], "^--dry: expected once; received twice"),
        (["--dry", "false"], "^command line: expected --name=value; received 'false'"),
        (["--no-seed"], "^option: expected one of .*; received --no-seed"),
    ],
)
def test_bad_switches(argv, message):
    with pytest.raises(InputError, match=message):
        read(argv, DRY, GRID, SEED)


def test_earlier_names_of_options_are_answered_with_todays():
    policy = Option("policy", "which", default="ema")
    with pytest.raises(
        InputError,
        match="^--which: expected --policy=NAME, as it is called now; received its earlier name$",
    ):
        read(["--which=best"], policy, renamed={"which": "--policy=NAME"})
    with pytest.raises(InputError, match="^option: expected --size=HxW; received --height$"):
        read(["--height=5"], policy, elsewhere={"height": "--size=HxW"})
    values = read(["--policy=best"], policy, renamed={"which": "--policy=NAME"})
    assert (values.policy, values.config, values.words) == ("best", [], [])


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("--lr=1", "'--config.training.learning_rate'"),
        ("--learning-rate=1", "'--config.training.learning_rate'"),
        ("--nft.beta=1", "'--config.nft.beta'"),
        (
            "--batch_size=1",
            "'--config.rollout.batch_size' or '--config.training.micro_batch_size'",
        ),
        ("--train_batch_size=1", "'--config.training.micro_batch_size'"),
        ("--resolution=64", "'--config.model.height' or '--config.model.width'"),
        ("--output_dir=x", "'--workdir'"),
    ],
)
def test_keys_without_their_prefix_and_names_of_other_libraries(written, hint):
    name = written.partition("=")[0]
    with pytest.raises(InputError) as caught:
        read([written], WORKDIR)
    assert str(caught.value).endswith(f"received {name}; did you mean {hint}?")


def test_words_beside_options():
    assert read(["a", "--seed", "3", "b"], SEED, words=2).words == ["a", "b"]
    with pytest.raises(InputError, match="expected --name=value; received 'b'"):
        read(["a", "b"], SEED, words=1)


def test_numbers():
    assert Whole(7).read("n", "7") == 7 and type(Whole(0).read("n", "7")) is int
    assert Number(0).read("n", "7") == 7.0 and type(Number(0).read("n", "7")) is float
    assert Number(0).read("n", "1e-3") == 1e-3


def test_options_that_are_not_given():
    options = [Option(kind, "") for kind in ("text", "list", "whole", "number", "switch")]
    of = (Text(), Words(), Whole(), Number(), Switch())
    options = [dataclasses.replace(option, kind=kind) for option, kind in zip(options, of)]
    values = read([], *options)
    assert [getattr(values, option.name) for option in options] == ["", (), None, None, False]
    # As a script writes it that leaves the choice open.
    assert read(["--whole=", "--number="], *options).whole is None
    with pytest.raises(InputError, match="^--seed: expected a whole number .*; received ''"):
        read(["--seed="], SEED)


@pytest.mark.parametrize("text", ["x", "", "2.5", "-1", "1e3"])
def test_what_is_no_whole_number(text):
    with pytest.raises(
        InputError, match=f"^--n: expected a whole number of at least 0; received '{text}'$"
    ):
        Whole(0).read("n", text)


@pytest.mark.parametrize("text", ["x", "", "0.05", "nan", "inf", "-inf"])
def test_what_is_no_number(text):
    with pytest.raises(
        InputError, match=f"^--n: expected a number of at least 0.1; received '{text}'$"
    ):
        Number(0.1).read("n", text)


@pytest.mark.parametrize("text", ["²", "\u0661", "\uff11", "1_0", "+1" * 20])
def test_digits_are_those_from_0_to_9(text):
    """`int` and `float` read digits of other scripts, and underscores between them."""
    for kind in (Whole(), Number()):
        with pytest.raises(InputError, match="^--n: expected a .*number of at least 0; received"):
            kind.read("n", text)


def test_numbers_that_are_too_large():
    with pytest.raises(InputError, match="of at least 1 and at most 4096; received '5000'$"):
        Whole(1, 4096).read("n", "5000")
    with pytest.raises(InputError, match="of at least 0 and at most 10; received '1e300'$"):
        Number(0, 10).read("n", "1e300")
    with pytest.raises(InputError, match="at most 2147483647; received '999999999999999999"):
        Whole().read("n", "9" * 400)
    assert Whole(1, 4096).read("n", "4096") == 4096


def test_the_largest_seed_is_that_of_the_configuration():
    assert kinds.MOST_SEED == MOST_SEED


def test_one_of_two_options():
    check_either("verb", argparse.Namespace(a="x", b=""), "a", "b")
    check_either("verb", argparse.Namespace(a="", b=("x",)), "a", "b")
    with pytest.raises(InputError, match="^verb: expected either --a or --b; received both$"):
        check_either("verb", argparse.Namespace(a="x", b="y"), "a", "b")
    with pytest.raises(InputError, match="^verb: expected either --a or --b; received neither$"):
        check_either("verb", argparse.Namespace(a="", b=()), "a", "b")


def test_verbs_without_a_configuration():
    assert read([], config=False).config == []
    with pytest.raises(InputError, match="^verb: expected no --config; received --config=f.py$"):
        read(["--config=f.py"], config=False)
    with pytest.raises(InputError, match=r"no --config \(it has one\); received --config.a=1$"):
        read(["--config.a=1"], config=False, no_config="it has one")


def test_lists_of_words():
    assert word_list(" a, b,,c ") == ("a", "b", "c") and word_list("") == ()
    assert Words("|").read("prompts", "~a, b | c") == ("~a, b", "c")


def test_a_home_begins_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert (
        Place().read("p", "~/a,x=~/b+~/c:0.5,a~b") == "/home/me/a,x=/home/me/b+/home/me/c:0.5,a~b"
    )
    assert Text().read("t", "~/a") == "~/a"


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
        ("--config.lr=3", "config.lr: expected .*; did you mean 'training.learning_rate'[?]$"),
        ("--config.train.beta1=3", "did you mean 'training.beta1'[?]$"),
        (
            "--config.sample.batch_size=3",
            "did you mean 'rollout.batch_size' or 'training.micro_batch_size'[?]$",
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
        InputError, match="--config: expected a configuration file or .*embeded.py'; did you mean"
    ):
        load_config([f"--config={FILE.replace('embedded', 'embeded')}"])
    with pytest.raises(
        InputError, match="preset of embedded: .*received 'smok'; did you mean 'smoke'"
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
