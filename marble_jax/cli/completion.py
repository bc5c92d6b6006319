"""`marble-jax completion bash`: prints what makes a shell complete verbs, options and keys, by shtab."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from marble_jax.cli.kinds import Place, Switch
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError, one_of

SHELLS = ("bash", "zsh", "tcsh")
VERB = Verb(
    about="Prints a script that makes a shell complete verbs, options and keys of the configuration. Needs the "
    "package shtab: pip install 'marble-jax[completion]'.",
    usage=("SHELL",),
    options=(),
    words=1,
    notes="bash: marble-jax completion bash > ~/.local/share/bash-completion/completions/marble-jax\n\n"
    "zsh: marble-jax completion zsh > FOLDER/_marble-jax, with a folder of $fpath",
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: no shell that shtab knows, or no shtab.
    """
    (shell,) = options.words or [""]
    one_of("completion", shell, SHELLS)
    try:
        import shtab
    except ImportError:
        raise InputError(
            "completion: expected the package shtab (pip install 'marble-jax[completion]'); received none"
        ) from None
    print(shtab.complete(whole_parser(), shell=shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Returns one argparse parser of all verbs with their options."""
    from marble_jax.cli.main import VERBS

    parser = argparse.ArgumentParser("marble-jax")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers()
    for name, meaning in VERBS.items():
        module = importlib.import_module(f"marble_jax.cli.{name}")
        below = verbs.add_parser(name, help=meaning)
        if hasattr(module, "VERB"):
            _add_options(below, module.VERB)
            continue
        actions = below.add_subparsers()
        for action, verb in module.ACTIONS.items():
            _add_options(actions.add_parser(action, help=verb.about), verb)
    return parser


def _add_options(parser: argparse.ArgumentParser, verb: Verb) -> None:
    for option in verb.options:
        _add_option(parser, option)
    if not verb.config:
        return
    from marble_jax.config import KEYS

    config = parser.add_argument("--config", help="preset or configuration file")
    config.complete = _files()  # type: ignore[attr-defined]
    for name, key in KEYS.items():
        choices = key.choices or None
        parser.add_argument(f"--config.{name}", help=_escaped(key.meaning), choices=choices)


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    names = [f"--{name}" for name in (option.name, *option.aliases)]
    meaning = _escaped(option.meaning)
    if isinstance(option.kind, Switch):
        parser.add_argument(*names, action="store_true", help=meaning)
        return
    added = parser.add_argument(
        *names, help=meaning, choices=getattr(option.kind, "names", None) or None
    )
    if isinstance(option.kind, Place):
        added.complete = _files()  # type: ignore[attr-defined]


def _escaped(text: str) -> str:
    # argparse formats help with the % operator.
    return text.replace("%", "%%")


def _files() -> Any:
    import shtab

    return shtab.FILE
