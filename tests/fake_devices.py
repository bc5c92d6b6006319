"""Functions of test modules, called in a process that has several devices: XLA's fake CPU devices."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def call(function: Callable[..., Any], *arguments: object, devices: int = 8) -> Any:
    """What `function` of a test module returns there (anything JSON knows).

    Args:
      function: at the top of its module.
      *arguments: texts and numbers; paths arrive as texts.
      devices: of the process.
    """
    file = Path(inspect.getfile(function))
    code = (
        f"import json, sys; sys.path[:0] = {[str(file.parent), str(TESTS)]!r}; import {file.stem} as module; "
        f"print(json.dumps(module.{function.__name__}(*json.loads(sys.argv[1]))))"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments, default=str)],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
