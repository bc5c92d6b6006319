"""`marble-jax VERB ...`: finds the verb, prints bad input as one line and exits with 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from marble_jax.errors import InputError, nearest

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C, 143 stopped by a signal
    with its state saved."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: marble-jax VERB [options]     (marble-jax VERB --help for its options)\n")
        for verb, meaning in VERBS.items():
            print(f"  {verb:8} {meaning}")
        return 0
    verb, *rest = argv
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # tokenizers are all that is used of it
    try:
        if verb not in VERBS:
            raise InputError(
                f"verb: expected one of {', '.join(VERBS)}; received {verb!r}{nearest(verb, VERBS)}"
            )
        module = importlib.import_module(f"marble_jax.cli.{verb}")
        if any(a in ("-h", "--help", "-help") for a in rest):
            print(module.help_text())
            return 0
        return module.run(rest) or 0
    except InputError as error:
        print(f"marble-jax {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"marble-jax {verb}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
