"""`marble-jax VERB ...`: finds the verb, prints bad input as one line and exits with 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from marble_jax.errors import InputError, nearest, printable

VERBS = {
    "train": "train adapters on several rewards",
    "sample": "draw images from a model or a training run",
    "export": "write a run's LoRA for diffusers, PEFT and ComfyUI, and prove it",
    "report": "write a run's report.html from its records",
    "reward": "check rewards on golden images, or serve them to other machines",
    "evaluate": "compare models: images, scores and a page",
    "prompts": "write the ready-made prompt sets, or look through prompt files",
    "plan": "sizes, memory, work and a compile for a TPU slice, without running",
    "convert": "checkpoints of diffusers and Stability to our layout and back",
}


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
    if not argv or argv[0] in (*HELP, "help"):
        _print_verbs()
        return 0
    verb, *options = argv
    # Nothing but its tokenizers is used of transformers, which otherwise complains that PyTorch is not there.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _show_what_the_terminal_can()
    try:
        return _run(verb, options)
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
    print(f"marble-jax {printable(verb)}: {printable(line)}", file=sys.stderr)
    return 2


def _run(verb: str, options: Sequence[str]) -> int:
    """Runs a verb, or prints its help.

    Raises:
      InputError: an unknown verb, or whatever the verb finds wrong.
    """
    if verb not in VERBS:
        raise InputError(
            f"verb: expected one of {', '.join(VERBS)}; received {verb!r}{nearest(verb, VERBS)}"
        )
    # Verbs import what they need, so that `report` works where there is no JAX.
    module = importlib.import_module(f"marble_jax.cli.{verb}")
    if not set(HELP).isdisjoint(options):
        print(module.help_text())
        return 0
    return module.run(options)


def _print_verbs() -> None:
    print("usage: marble-jax VERB [options]     (marble-jax VERB --help for its options)\n")
    for verb, meaning in VERBS.items():
        print(f"  {verb:8} {meaning}")


if __name__ == "__main__":
    sys.exit(main())
