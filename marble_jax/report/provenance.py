"""How the run was made: command, differences from the upstream preset, configuration, versions and hardware."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from marble_jax.report import blocks
from marble_jax.report.formatting import has_value
from marble_jax.report.markup import element, items
from marble_jax.report.records import Records


def setup(records: Records) -> str:
    """Returns command, differences from the upstream preset, configuration, versions and hardware."""
    title, run = "How it was run", records.run
    if not run:
        return blocks.section("setup", title, blocks.absent("No <code>run.json</code> yet."))
    return blocks.section(
        "setup",
        title,
        _command(run.get("command")),
        _differences(run.get("differences_from_upstream")),
        _configuration(run.get("config")),
        _item_table("Versions", run.get("versions")),
        _item_table("Hardware", run.get("hardware")),
    )


def _code(text: str) -> str:
    return element("code", escape(text))


def _value(value: Any) -> str:
    """Returns a recorded value as code: text as it is, anything else as JSON."""
    if isinstance(value, str):
        return _code(value)
    return _code(json.dumps(value, ensure_ascii=False))


def _pairs(recorded: Any) -> list[tuple[str, str]]:
    """Returns names and values of an object; one pair for a value that is not an object, none without one."""
    if isinstance(recorded, dict):
        return [(_code(str(name)), _value(value)) for name, value in recorded.items()]
    if not has_value(recorded):
        return []
    return [(_code("value"), _value(recorded))]


def _command(command: Any) -> str:
    if not command:
        return ""
    if isinstance(command, list):
        line = " ".join(map(str, command))
    else:
        line = str(command)
    # A long line scrolls inside its box; the keyboard has to reach the box for that.
    box = element("pre", escape(line), tabindex=0)
    return element("h3", "Command") + box


def _differences(differences: Any) -> str:
    # No record and a record of no difference are not the same.
    if differences is None:
        return ""
    heading = element("h3", "What differs from the upstream preset")
    if not differences:
        return heading + element("p", "Nothing: this run follows the original procedure.")
    if isinstance(differences, list):
        entries = [_difference(entry) for entry in differences]
    else:
        entries = [f"{name}: {value}" for name, value in _pairs(differences)]
    return heading + element("ul", items(entries), class_="plain")


def _difference(entry: Any) -> str:
    if not isinstance(entry, dict):
        return escape(str(entry))
    parts = [f"{escape(str(name))}: {_value(value)}" for name, value in entry.items()]
    return "; ".join(parts)


def _configuration(config: Any) -> str:
    pairs = _pairs(config)
    if not pairs:
        return ""
    table = blocks.table(("Key", "Value"), pairs, kind="config")
    return blocks.fold(f"Configuration ({len(pairs)} values)", table)


def _item_table(title: str, recorded: Any) -> str:
    pairs = _pairs(recorded)
    if not pairs:
        return ""
    return blocks.fold(title, blocks.table(("Item", "Value"), pairs, kind="config"))
