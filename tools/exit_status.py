"""The exit status of a tool, which answers bad input in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from marble_jax.errors import InputError


def exit_status(tool: str, work: Callable[[], object]) -> int:
    """Returns 0 where the work is done, 2 for bad input, which gets one line on standard error.

    Args:
      tool: name in front of that line.
      work: what the tool does.
    """
    try:
        work()
    except InputError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 2
    return 0
