"""How the run was made: command, differences from the upstream preset, configuration, versions and hardware."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from marble_jax.report import blocks
from marble_jax.report.records import Records


def _pairs(mapping: Any) -> list[tuple[str, str]]:
    if isinstance(mapping, dict):
        return [(f"<code>{escape(str(k))}</code>", _value(v)) for k, v in mapping.items()]
    return [("<code>value</code>", _value(mapping))] if mapping not in (None, "", []) else []


def _value(value: Any) -> str:
    return f"<code>{escape(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)}</code>"


def setup(records: Records) -> str:
    """Command, differences from the upstream preset, configuration, versions and hardware."""
    title, run = "How it was run", records.run
    if not run:
        return blocks.section("setup", title, blocks.absent("No <code>run.json</code> yet."))
    body = []
    if run.get("command"):
        command = run["command"]
        body.append(
            '<h3>Command</h3><pre tabindex="0">'
            f"{escape(' '.join(map(str, command)) if isinstance(command, list) else str(command))}</pre>"
        )
    differences = run.get("differences_from_upstream")
    if differences:
        items = []
        for entry in differences if isinstance(differences, list) else _pairs(differences):
            if isinstance(entry, dict):
                items.append("; ".join(f"{escape(str(k))}: {_value(v)}" for k, v in entry.items()))
            else:
                items.append(": ".join(entry) if isinstance(entry, tuple) else escape(str(entry)))
        body.append(
            '<h3>What differs from the upstream preset</h3><ul class="plain">'
            f"{''.join(f'<li>{item}</li>' for item in items)}</ul>"
        )
    elif differences is not None:
        body.append(
            "<h3>What differs from the upstream preset</h3><p>Nothing: this run follows the original procedure.</p>"
        )
    config = _pairs(run.get("config"))
    if config:
        body.append(
            blocks.fold(
                f"Configuration ({len(config)} values)",
                blocks.table(("Key", "Value"), config, kind="config"),
            )
        )
    for key, label in (("versions", "Versions"), ("hardware", "Hardware")):
        pairs = _pairs(run.get(key))
        if pairs:
            body.append(blocks.fold(label, blocks.table(("Item", "Value"), pairs, kind="config")))
    return blocks.section("setup", title, *body)
