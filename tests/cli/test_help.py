"""Help, versions, pipes and terminals: what the command line says without running a verb."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from marble_jax.cli.guides import guide_files
from marble_jax.cli.help import ALL, SECTIONS, verb_help
from marble_jax.cli.main import VERBS, main
from marble_jax.cli.parsing import parse
from marble_jax.config import KEYS, sections
from marble_jax.config.presets import preset_files
from marble_jax.version import VERSION


def declared():
    """Every verb by the words that call it, with its declaration."""
    for name in VERBS:
        module = importlib.import_module(f"marble_jax.cli.{name}")
        for action, verb in getattr(module, "ACTIONS", {}).items():
            yield f"{name} {action}", verb
        if hasattr(module, "VERB"):
            yield name, module.VERB


DECLARED = dict(declared())


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("columns_of_the_terminal", [80, 100])
@pytest.mark.parametrize("name", DECLARED)
def test_the_short_help_fits_a_screen_and_names_every_option(
    name, columns_of_the_terminal, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(columns_of_the_terminal))
    lines = verb_help(name, DECLARED[name]).splitlines()
    assert lines[0].startswith(f"usage: marble-jax {name} ")
    assert len(lines) <= 30 and max(map(len, lines)) <= columns_of_the_terminal
    # No meaning is cut within brackets.
    for opening, closing in ("()", "{}", "[]"):
        assert "\n".join(lines).count(opening) == "\n".join(lines).count(closing)
    text = "\n".join(lines)
    assert all(re.search(rf"--(no-)?{o.name}\b", text) for o in DECLARED[name].options)


@pytest.mark.parametrize("name", DECLARED)
def test_the_whole_help_says_everything(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    verb = DECLARED[name]
    text = verb_help(name, verb, ALL)
    # What a shell takes as one word is not broken.
    assert all(len(line) <= 80 or line.startswith("--") for line in text.splitlines())
    flat = " ".join(text.split())
    for option in verb.options:
        assert " ".join(option.meaning.split()) in flat
        assert all(f"--{alias}" in text for alias in option.aliases)
    for note in (verb.notes, verb.about, *verb.groups.values()):
        assert " ".join(note.split()) in flat
    assert verb.config == all(f"  {key} = " in text for key in KEYS)


@pytest.mark.parametrize("name", DECLARED)
def test_declarations_are_sound(name):
    """Every name leads to one option, defaults are values of their kinds, and none is what parsing adds itself."""
    options = DECLARED[name].options
    names = [called for option in options for called in (option.name, *option.aliases)]
    assert len(names) == len(set(names))
    assert not {*names, *DECLARED[name].renamed} & {"config", "words", "command", "action", "help"}
    assert not {*names} & {*DECLARED[name].renamed, *DECLARED[name].elsewhere}
    for option in options:
        assert re.fullmatch("[a-z][a-z0-9_]+", option.name) and option.meaning
        option.value(None)
        assert not (option.required and option.default is not None)


def said(capsys, *argv):
    assert main(list(argv)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_topics(capsys):
    section = said(capsys, "train", "--help=nft")
    assert section == said(capsys, "help", "nft") and "  nft.beta = 0.1\n" in section
    assert "learning_rate" not in section
    assert said(capsys, "help", "nft.beta").startswith("  nft.beta = 0.1\n")
    group = said(capsys, "train", "--help=processes")
    assert "--coordinator=HOST:PORT" in group and "--workdir" not in group
    assert "--port=8810" not in said(capsys, "reward", "check", "--help")
    both = said(capsys, "reward", "--help")
    assert "usage: marble-jax reward check" in both and "  marble-jax reward serve" in both
    assert both.count("usage: ") == 1 and "marble-jax reward serve --help" in both
    assert both.count("\n") <= 30 and "--port" not in both
    everything = said(capsys, "reward", "--help=all")
    assert everything.count("usage: ") == 2 and "--port=8810" in everything
    assert said(capsys, "help", "export") == said(capsys, "export", "--workdir=x", "-h")


def test_the_sections_are_those_of_the_table():
    assert list(SECTIONS) == list(sections())


def test_guides_are_printed_as_they_stand(capsys):
    listed = said(capsys, "help", "guides")
    assert guide_files()
    for name, file in guide_files().items():
        text = file.read_text()
        assert text.startswith("# ") and name not in VERBS and re.fullmatch("[a-z0-9_]+", name)
        assert re.search(rf"^  {name} .*{re.escape(text.split()[1])}", listed, re.MULTILINE)
        assert said(capsys, "help", name.replace("_", "-")).startswith(text.rstrip())
    assert all(name in said(capsys) for name in guide_files())


def test_the_readme_lists_every_guide():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    listed = re.findall(r"^\| \[`([a-z_]+)`\]\(marble_jax/guides/\1\.md\)", readme, re.MULTILINE)
    assert sorted(listed) == sorted(guide_files())


def test_every_command_and_key_in_a_guide_and_in_the_readme_is_one():
    """What a reader copies is understood: verbs, options, presets that ship, and keys."""
    readme = Path(__file__).parents[2] / "README.md"
    for file in (readme, *guide_files().values()):
        text = file.read_text().replace("\\\n", " ")
        for called in set(re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)\b", text)):
            assert called in KEYS, (file.name, called)
        for called in set(re.findall(r"--config=([a-z0-9]+)[:\s`]", text)):
            assert called in preset_files(), (file.name, called)
        for line in re.findall(r"^marble-jax +(.*?)(?: #.*)?$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            name = words.pop(0)
            if f"{name} {words[0] if words else ''}" in DECLARED:
                name = f"{name} {words.pop(0)}"
            if name not in ("help", "--version"):
                parse(name, DECLARED[name], [w for w in words if not w.startswith("--help")])


def test_topics_that_are_not_there(refused):
    assert "--help: expected one of all, drawing; received 'drwing'; did you mean 'drawing'?" in (
        refused("sample", "--help=drwing")
    )
    assert "received 'harmonise'; did you mean 'harmonize'?" in refused("train", "--help=harmonise")
    assert "received 'tarin'; did you mean 'train'?" in refused("help", "tarin")


def test_the_verbs_and_the_version(capsys):
    verbs = said(capsys)
    assert verbs == said(capsys, "help") == said(capsys, "--help")
    assert all(re.search(rf"^  {name} ", verbs, re.MULTILINE) for name in VERBS)
    assert said(capsys, "--version") == f"marble-jax {VERSION}\n"


def test_argparse_never_speaks(refused, tmp_path):
    """What argparse itself would refuse, in its own words and on its own way out."""
    for argv in (
        ["export", "--out"],
        ["export", "--out", "--workdir=x"],
        ["export", "-o", "x"],
        ["export", "--out=x", "--workdi=x"],
        ["export", "--out=x", "stray"],
        ["export", "--out=x", "--", "stray"],
        ["plan", "--devices=many"],
        ["completion", "--shell=bash"],
        ["completion"],
    ):
        assert "expected" in refused(*argv)


def run(command, **environment):
    return subprocess.run(
        ["bash", "-c", command.replace("marble-jax", f"{sys.executable} -m marble_jax")],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_a_reader_that_has_gone_is_no_error():
    done = run("set -o pipefail; marble-jax train --help=all | head -n 1; marble-jax | true")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: marble-jax train")


def test_a_terminal_of_ascii_letters():
    done = run("marble-jax help train; marble-jax train --wörkdir=ä", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stdout.isascii() and done.stderr.isascii()
    assert r"--w\xf6rkdir" in done.stderr and done.stderr.count("\n") == 1


def test_help_is_light():
    """What makes it slow is not imported: JAX above all."""
    code = (
        "import sys; from marble_jax.cli.main import main\n"
        "for verb in sys.argv[1:]:\n    main([verb, '--help'])\n"
        "slow = {'jax', 'numpy', 'ml_collections', 'pydantic', 'annotated_types'} & set(sys.modules)\n"
        "sys.exit(', '.join(slow) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_has_verbs_options_and_keys(capsys):
    pytest.importorskip("shtab")
    script = said(capsys, "completion", "bash")
    for word in ("reward", "serve", "--max_side", "--num_inference_steps", "--config.nft.beta"):
        assert word in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_completion_of_a_shell_that_is_unknown(refused):
    pytest.importorskip("shtab")
    assert "received 'fish'" in refused("completion", "fish")
