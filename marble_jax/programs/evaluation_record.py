"""`evaluation.json` and `prompts.jsonl`: whose evaluation a folder holds, and what it was asked for so far."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax.errors import InputError
from marble_jax.programs.evaluation_request import Request, check_model_name
from marble_jax.programs.shared_settings import SharedSettings
from marble_jax.prompts.files import Prompt
from marble_jax.storage.files import read_json
from marble_jax.storage.images import writable
from marble_jax.storage.workdir import Workdir, jsonable
from marble_jax.validation import Natural, parse_json_object, validated, validated_fields

RECORD, PROMPTS = "evaluation.json", "prompts.jsonl"
_FIELDS: dict[str, Any] = {
    "models": dict[str, dict[str, Any]],
    "rewards": dict[str, dict[str, Any]],
    "settings": dict[str, Any],
    "settings_from": dict[str, str],
    "native_sizes": dict[str, str],
    "columns": list[str],
    "num_images": Natural,
}
_MODEL_FIELDS: dict[str, Any] = {
    "source": dict[str, str],
    "origin": str | None,
    "trained": list[str],
}
"""Of `evaluation.json`, and of each of its models."""


def new_record(
    request: Request,
    workdir: Workdir,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Any],
    shared: SharedSettings | None = None,
) -> dict[str, Any]:
    """Returns the record of an evaluation, with what earlier calls put into its folder; writes nothing.

    Args:
      request: what is asked for.
      workdir: the folder.
      prompts: of every image.
      rewards: entries of the rewards asked for, by name.
      shared: how images are drawn; None where they are not drawn in this call.

    Raises:
      InputError: the folder holds something else, or an evaluation of other prompts, models or rewards.
    """
    earlier = _earlier_record(workdir)
    if earlier is None:
        earlier = {}
        _check_empty(workdir)
    else:
        _check_prompts(workdir, prompts)
    _check_rewards(workdir, earlier.get("rewards", {}), rewards)
    # A call that only scores does not know how the images were drawn.
    drawing = {}
    if shared is not None:
        drawing = {
            "settings": jsonable(dataclasses.asdict(shared.settings)),
            "settings_from": dict(shared.origins),
            "native_sizes": dict(shared.native_sizes),
        }
    return (
        {"settings": {}}
        | earlier
        | {
            "models": _models(request, workdir, earlier.get("models", {})),
            "rewards": {**earlier.get("rewards", {}), **rewards},
            "prompts": request.prompts,
            "images": request.images,
            "num_images": len(prompts),
            "command": request.command,
        }
        | drawing
    )


def _models(
    request: Request, workdir: Workdir, earlier: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Entries of the models asked for. Raises InputError where a name would mean another model than before."""
    models = {}
    for name, source in request.models.items():
        model = earlier.get(name, {})
        asked = dataclasses.asdict(source)
        if model.get("source", asked) != asked:
            raise InputError(
                f"--models: expected the {name!r} of {workdir.path} ({model['source']}); received {asked}"
            )
        models[name] = model | {"source": asked}
    return models


def write_record(workdir: Workdir, record: Mapping[str, Any]) -> None:
    """Writes the record, whole or not at all."""
    with writable(workdir.path):
        workdir.write_json(RECORD, dict(record))


def write_prompts(workdir: Workdir, prompts: Sequence[Prompt]) -> None:
    """Writes the prompts down, unless an earlier call did."""
    if (workdir.path / PROMPTS).exists():
        return
    with writable(workdir.path):
        workdir.write_text(PROMPTS, "".join(_line(prompt) + "\n" for prompt in prompts))


def read_evaluation(workdir: Workdir, what: str) -> tuple[dict[str, Any], list[Prompt]]:
    """Returns the record of an evaluation, and the prompt of every image.

    Args:
      workdir: its folder.
      what: names it in errors.

    Raises:
      InputError: it is no such folder, or what is in it is damaged.
    """
    record = _earlier_record(workdir)
    if record is None or not record["models"]:
        raise InputError(f"{what}: expected a folder made by evaluate; received {workdir.path}")
    file = workdir.path / PROMPTS
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"{file}: expected the prompts of an evaluation; received {error.strerror or error}"
        ) from None
    prompts = []
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        content = parse_json_object(line, where)
        kinds = {"prompt": str, "source": str, "metadata": dict[str, Any]}
        values = [
            validated(kind, content.get(key), f"{where}: {key}") for key, kind in kinds.items()
        ]
        prompts.append(Prompt(*values))
    if not prompts:
        raise InputError(f"{file}: expected at least one prompt; received none")
    return record, prompts


def _earlier_record(workdir: Workdir) -> dict[str, Any] | None:
    """The record that earlier calls left; None where there is none."""
    file = workdir.path / RECORD
    if not file.exists():
        return None
    record = read_json(file)
    if not isinstance(record.get("models"), dict):
        raise InputError(f"{file}: expected the record of an evaluation; received something else")
    checked = validated_fields(_FIELDS, record, file)
    for name, model in checked["models"].items():
        where = f"{file}: models[{name!r}]"
        # Names of folders in this one, wherever the file comes from.
        check_model_name(name, name, where)
        validated_fields(_MODEL_FIELDS, model, where)
    return record | checked


def _check_empty(workdir: Workdir) -> None:
    """Raises InputError where a folder that no evaluation made would be written to."""
    path = workdir.path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out: expected a new folder or one made by evaluate; received {path}")


def _check_prompts(workdir: Workdir, prompts: Sequence[Prompt]) -> None:
    """Raises InputError unless the folder's prompts, if it has any, are these."""
    file = workdir.path / PROMPTS
    if not file.exists():
        return
    # Bytes that are no text make another line, which is then told.
    lines = file.read_bytes().decode("utf-8", "replace").splitlines()
    for number, (expected, prompt) in enumerate(zip(lines, prompts), 1):
        received = _line(prompt)
        if expected != received:
            raise InputError(
                f"--out: {workdir.path} holds an evaluation of other prompts: line {number} of "
                f"{PROMPTS}: expected {expected[:80]}; received {received[:80]}"
            )
    # The lines compared above are the shorter of the two.
    if lines and len(lines) != len(prompts):
        raise InputError(
            f"--out: {workdir.path} holds an evaluation of other prompts: expected {len(lines)} "
            f"images; received {len(prompts)}"
        )


def _check_rewards(workdir: Workdir, earlier: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises InputError where a name would mean another reward than before."""
    for name, entry in asked.items():
        # As it was after a round through JSON, where a tuple is a list.
        if name in earlier and earlier[name] != jsonable(entry):
            raise InputError(
                f"--rewards_path: expected the {name!r} that {workdir.path} was scored with "
                f"({earlier[name]}); received {jsonable(entry)}"
            )


def _line(prompt: Prompt) -> str:
    """A prompt as one line of `prompts.jsonl`."""
    return json.dumps(
        {"prompt": prompt.text, "source": prompt.source, "metadata": dict(prompt.metadata)}
    )
