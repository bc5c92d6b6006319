"""`marble-jax VERB ...`: finds the verb, prints bad input as one line and exits with 2."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from marble_jax.errors import InputError, nearest, one_of, printable
from marble_jax.version import VERSION

if TYPE_CHECKING:
    from marble_jax.cli.options import Verb

VERBS = {
    "train": "train adapters on several rewards",
    "sample": "draw images from a model or a training run",
    "export": "write a run's LoRA for diffusers, PEFT and ComfyUI, and prove it",
    "report": "write a run's report.html from its records",
    "reward": "check rewards on golden images, or serve them to other machines",
    "evaluate": "compare models: images, scores and a page",
    "rate": "let people grade the images of several models on a blind page",
    "presets": "list the configurations that ship, print one or write it to a file",
    "prompts": "write the ready-made prompt sets, or look through prompt files",
    "plan": "sizes, memory, work and a compile for a TPU slice, without running",
    "convert": "checkpoints of diffusers and Stability to our layout and back",
    "completion": "completion of verbs and options for bash, zsh or tcsh",
}
"""Verb -> what it does. Each is a module with `VERB`, or `ACTIONS` by name, and `run(options)`."""

HELP = ("-h", "--help", "-help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: the verb and its options; those of this process if None.

    Returns:
      The exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C, 143 stopped by a signal with the state saved.
    """
    if argv is None:
        argv = sys.argv[1:]
    verb, *options = argv or ["help"]
    # Nothing but its tokenizers is used of transformers, which otherwise complains that PyTorch is not there.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _show_what_the_terminal_can()
    try:
        status = _run(verb, options)
        # What a pipe has not taken yet would otherwise fail on the way out of Python.
        sys.stdout.flush()
        return status
    except InputError as error:
        return _refuse(verb, str(error))
    except KeyboardInterrupt:
        print(f"marble-jax {verb}: stopped", file=sys.stderr)
        return 130
    except MemoryError:
        return _refuse(verb, "expected input that fits into memory; received more")
    except RecursionError:
        return _refuse(verb, "expected input of a depth that people write; received a deeper one")
    except BrokenPipeError:
        # Whoever read the output has gone. Python would fail once more when it flushes the rest on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A disk that is full or out of reach, a file that may not be read.
        place = error.filename or "a file"
        return _refuse(
            verb, f"{place}: expected to read or write it; received {error.strerror or error}"
        )


def _show_what_the_terminal_can() -> None:
    """Has both streams show a character that the terminal lacks as its number, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _refuse(verb: str, line: str) -> int:
    """Prints what is wrong, as one line without control characters; returns the exit status."""
    # A reader of both streams that has gone has no use for the line either.
    with contextlib.suppress(BrokenPipeError):
        print(f"marble-jax {printable(verb)}: {printable(line)}", file=sys.stderr)
    return 2


def _run(verb: str, options: Sequence[str]) -> int:
    """Runs a verb, or prints its help.

    Raises:
      InputError: an unknown verb, or whatever the verb finds wrong.
    """
    if verb in ("--version", "-version", "version"):
        print(f"marble-jax {VERSION}")
        return 0
    if verb in HELP or verb == "help":
        return _help(options)
    if verb.startswith("--help="):
        return _help([verb.removeprefix("--help="), *options])
    if verb not in VERBS:
        raise InputError(
            f"verb: expected one of {', '.join(VERBS)}; received {verb!r}{nearest(verb, VERBS)}"
        )
    topics = _help_topics(options)
    words = [word for word in options if word not in HELP and not word.startswith("--help=")]
    if topics:
        _print_help(verb, words, topics[0])
        return 0
    # Verbs import what they need, so that `report` works where there is no JAX.
    module = importlib.import_module(f"marble_jax.cli.{verb}")
    from marble_jax.cli.parsing import parse

    if not hasattr(module, "ACTIONS"):
        return module.run(parse(verb, module.VERB, options))
    action, *options = options or [""]
    one_of(verb, action, module.ACTIONS)
    values = parse(f"{verb} {action}", module.ACTIONS[action], options)
    values.action = action
    return module.run(values)


def _help_topics(options: Sequence[str]) -> list[str]:
    """Topics that help is asked for among the words behind a verb; "" is the short one."""
    topics = []
    for word in options:
        if word in HELP:
            topics.append("")
        elif word.startswith("--help="):
            topics.append(word.removeprefix("--help="))
    return topics


def _help(words: Sequence[str]) -> int:
    """Prints the help of what the words name: nothing, a verb, a guide, or a section or key of the configuration.

    Raises:
      InputError: no such thing.
    """
    if not words:
        _print_verbs()
        return 0
    topic, *rest = words
    if topic in VERBS:
        _print_help(topic, rest, "")
        return 0
    print(_page(topic))
    return 0


def _page(topic: str) -> str:
    """A guide, the list of them, or keys of the configuration.

    Raises:
      InputError: no such topic.
    """
    from marble_jax.cli.guides import guide_files, guide_list, guide_text
    from marble_jax.cli.help import config_help, config_topics

    guides = guide_files()
    page = topic.replace("-", "_")
    if topic == "guides":
        return guide_list()
    if page in guides:
        text = guide_text(guides[page])
        if page in config_topics():
            text += f"\n\nThe keys of this name: marble-jax train --help={page}"
        return text
    topics = [*VERBS, "guides", *guides, *config_topics()]
    if topic not in topics:
        raise InputError(
            f"help: expected a verb, a guide, a section of the configuration or one of its keys; received "
            f"{topic!r}{nearest(topic, topics)}"
        )
    return config_help(topic)


def _print_help(verb: str, words: Sequence[str], topic: str) -> None:
    """Prints the help of a verb; of one of its actions, or else of all, where it has some."""
    from marble_jax.cli.help import actions_help, verb_help

    module = importlib.import_module(f"marble_jax.cli.{verb}")
    verbs: dict[str, Verb]
    if hasattr(module, "VERB"):
        verbs = {verb: module.VERB}
    else:
        chosen = [word for word in words if word in module.ACTIONS]
        if not (chosen or topic):
            print(actions_help(verb, module.ACTIONS))
            return
        actions = chosen or module.ACTIONS
        verbs = {f"{verb} {action}": module.ACTIONS[action] for action in actions}
    print("\n\n".join(verb_help(name, each, topic) for name, each in verbs.items()))


def _print_verbs() -> None:
    from marble_jax.cli.guides import guide_files

    print("usage: marble-jax VERB [options]\n")
    for verb, meaning in VERBS.items():
        print(f"  {verb:10} {meaning}")
    print(f"\nguides: {', '.join(guide_files())}")
    print(
        "\n"
        "  marble-jax VERB --help         its options; --help=all for everything that is said of them\n"
        "  marble-jax help GUIDE          one of the guides; marble-jax help guides for what they are about\n"
        "  marble-jax help SECTION        keys of the configuration: model, lora, training, ...\n"
        "  marble-jax --version"
    )


if __name__ == "__main__":
    sys.exit(main())
