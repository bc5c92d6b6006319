"""Forms of the fields that the report reads: what has another form is left out, with a sentence, like what is missing.

A record may come from another version, another program or a disk that failed. Everything behind this door can rely on
an object being an object and a list being a list; numbers and texts are asked for one by one where they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Form = Any
"""A type, `[form]` for a list of a form, `{}` for an object, `{"*": form}` for an object of a form."""

NUMBER = int | float
WORDS = str | int | float
_JOINT: Form = {"*": {}}

RUN: Mapping[str, Form] = {
    "name": WORDS,
    "method": WORDS,
    "rewards": [str],
    "heldout_rewards": [str],
    "num_steps": NUMBER,
    "config": {},
    "started": WORDS,
}
EVALUATION: Mapping[str, Form] = {
    "policy": str,
    "scores": {"*": {}},
    "gain": {"*": {}},
    "failed": {"*": NUMBER},
    "joint": _JOINT,
}
SUMMARY: Mapping[str, Form] = {
    "name": WORDS,
    "method": WORDS,
    "gain": {"*": {}},
    "joint": _JOINT,
    "setting": {},
    "curves": {"*": {}},
}
"""Of `run.json`, a line of `evaluation.jsonl` and a file in `compare`."""
COMPARISON: Mapping[str, Form] = {
    "rewards": {"*": {}},
    "settings": {},
    "settings_from": {},
    "native_sizes": {},
    "num_images": NUMBER,
}
COMPARED_MODEL: Mapping[str, Form] = {"source": {}, "trained": [str]}
DRAWING: Mapping[str, Form] = {"size": [NUMBER]}
"""Of `evaluation.json`, of one of its models and of its settings."""
COMPARED: Mapping[str, Form] = {
    "scores": {"*": {"*": {}}},
    "gains": {"*": {"*": {}}},
    "joint": {"*": {"*": {}}},
    "sources": {"*": {"*": {"*": {}}}},
    "geneval": {"*": {"*": {"*": {}}}},
    "composite": {},
    "composite_of": [str],
    "paper": {},
}
PAPER: Mapping[str, Form] = {"metrics": [str], "rows": {"*": [NUMBER]}, "composite": [NUMBER]}
"""Of the `summary.json` of an evaluation, and of the paper's table in it."""


def well_formed(
    record: Mapping[str, Any], forms: Mapping[str, Form], what: str, flaws: list[str]
) -> dict[str, Any]:
    """Returns a record without the fields that have another form than the one declared for them.

    Args:
      record: an object as parsed.
      forms: by name of the field; other fields are kept as they are, and null is no value of any form.
      what: names the record in the sentences.
      flaws: gets a sentence for each field that is left out.
    """
    kept = {}
    for name, value in record.items():
        if value is not None and name in forms and not _fits(value, forms[name]):
            flaws.append(f"{what}: {name} is not what it should be; the page goes on without it.")
            continue
        kept[name] = value
    return kept


def _fits(value: Any, form: Form) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(part, form[0]) for part in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        return all(_fits(part, form["*"]) for part in value.values()) if form else True
    return isinstance(value, form)
