"""`marble-jax presets` lists the configurations that ship, prints one, or writes one as a file to edit."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from marble_jax.cli.help import columns, width
from marble_jax.cli.kinds import Place
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError
from marble_jax.version import VERSION

VERB = Verb(
    about="Lists the configurations that ship, prints what one of them changes of the defaults, or writes that as a "
    "file of its own, to edit and to pass as --config=FILE.",
    usage=("[NAME[:PRESET]] [--out=FILE]",),
    options=(
        Option(
            "out", "a new file for the preset that is named", Place(), "FILE", aliases=("output",)
        ),
    ),
    words=1,
    no_config="a preset is named without it, such as sd3:gpu_80gb",
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: no such preset, or a file that is there already.
    """
    if not options.words:
        if options.out:
            raise InputError("presets: expected the name of a preset with --out; received none")
        print(_listed())
        return 0
    (name,) = options.words
    text = _as_file(name)
    if not options.out:
        print(text, end="")
        return 0
    _write(Path(options.out), text)
    print(f"{options.out}: {name}, for --config={options.out}")
    return 0


def _listed() -> str:
    from marble_jax.config.presets import described_presets, preset_files, title_of

    lines = []
    for name, file in preset_files().items():
        rows = []
        for preset, about in described_presets(file).items():
            rows.append((f"{name}:{preset}" if preset else name, about))
        lines += [title_of(file), *columns(rows, width() // 2), ""]
    lines.append(
        "marble-jax presets NAME prints one; marble-jax train --config=NAME --workdir=DIR runs it"
    )
    return "\n".join(lines)


def _as_file(name: str) -> str:
    """A configuration file that says what a preset changes of the defaults.

    Raises:
      InputError: no such preset.
    """
    from marble_jax.cli.configuration import load_config
    from marble_jax.config import KEYS, flatten

    lines = [
        f'"""{name} of marble_jax {VERSION}: what it changes of the defaults, to edit and to pass as --config=FILE."""',
        "",
        "from marble_jax.config import default_config",
        "",
        "CHANGES = {",
    ]
    for key, value in flatten(load_config([f"--config={name}"])).items():
        if value != KEYS[key].default:
            lines += textwrap.wrap(
                KEYS[key].meaning, 96, initial_indent="    # ", subsequent_indent="    # "
            )
            lines.append(f'    "{key}": {_literal(value)},')
    lines += [
        "}",
        "",
        "",
        "def get_config():",
        "    config = default_config()",
        "    config.update_from_flattened_dict(CHANGES)",
        "    return config",
    ]
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    # With the quotation marks that code formatters leave alone.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _write(file: Path, text: str) -> None:
    """Writes a new file.

    Raises:
      InputError: it is there already, or cannot be written.
    """
    from marble_jax.storage.files import write_whole

    if file.exists():
        raise InputError(f"--out: expected a new file; received {str(file)!r}, which exists")
    if not file.parent.is_dir():
        raise InputError(
            f"--out: expected a file in a folder that is there; received {str(file)!r}"
        )
    write_whole(file, text)
