"""The configuration files that travel with the package, by name: `embedded`, `sd3:gpu_80gb`.

In a wheel they are a folder of the package, in a checkout they are `configs/` beside it. What each preset is for stands
in a file's table `ABOUT`, which is read without running the file.
"""

from __future__ import annotations

import ast
from pathlib import Path

_IN_THE_PACKAGE = Path(__file__).parents[1] / "presets"
_IN_A_CHECKOUT = Path(__file__).parents[2] / "configs"


def preset_files() -> dict[str, Path]:
    """Returns the configuration files that travel with the package, by the name that `--config` takes."""
    folder = _IN_THE_PACKAGE if _IN_THE_PACKAGE.is_dir() else _IN_A_CHECKOUT
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def described_presets(file: Path) -> dict[str, str]:
    """Returns what each preset of a file is for, in a line; the preset "" is the file without one.

    Args:
      file: a configuration file with a table `ABOUT` of texts; without it there is nothing to return.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ABOUT":
            return ast.literal_eval(node.value)
    return {}


def title_of(file: Path) -> str:
    """Returns the first line of a configuration file's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or file.stem
    return text.splitlines()[0]
