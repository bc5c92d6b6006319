"""`base_scores.json`: the base model's scores in a run, which all its evaluations are compared with, image by image.

They are taken once and read back on resume. A gain is a mean of differences over pairs of images of one prompt, so the
record says of which prompts it is, and a run whose held-out prompts are others by then does not go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.storage.files import read_json
from marble_jax.storage.workdir import Workdir, jsonable
from marble_jax.types import Scores
from marble_jax.validation import parse_json, validated, validated_fields

BASE_SCORES = "base_scores.json"
_FIELDS = {
    "names": list[str],
    "values": list[list[float]],
    "valid": list[list[bool]],
    "failed": list[list[bool]],
}
_PROMPTS = "prompts"


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Returns a hash of prompts in their order: of texts, sources and metadata."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = [prompt.text, prompt.source, jsonable(dict(prompt.metadata))]
        # Escaped, as a text may hold half a surrogate pair, which is no valid UTF-8.
        digest.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def base_score_record(scores: Scores, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Returns the record of the base model's scores on held-out prompts."""
    return {
        "names": scores.names,
        "values": scores.values,
        "valid": scores.valid,
        "failed": scores.failed,
        _PROMPTS: prompts_digest(prompts),
    }


def read_base_scores(file: epath.Path) -> dict[str, Any] | None:
    """Returns the record in a file; None where there is none, or a damaged one."""
    if not file.exists():
        return None
    try:
        record = validated_fields(_FIELDS | {_PROMPTS: str}, read_json(file), file)
    except InputError:
        # A kill while it was written: the scores are taken anew.
        return None
    # Records of older runs do not say which prompts they are of.
    if set(record) - {_PROMPTS} != set(_FIELDS):
        return None
    # One row an image, one number a reward: another shape is no record of these scores.
    for field in ("values", "valid", "failed"):
        if len(record[field]) != len(record["values"]):
            return None
        for row in record[field]:
            if len(row) != len(record["names"]):
                return None
    return record


def scores_of(record: Mapping[str, Any]) -> Scores:
    """Returns the scores of a record."""
    return Scores(
        tuple(record["names"]),
        np.asarray(record["values"], np.float32),
        np.asarray(record["valid"], bool),
        np.asarray(record["failed"], bool),
    )


def check_base_scores(
    workdir: Workdir,
    prompts: Sequence[Prompt],
    images_per_prompt: int,
    names: Sequence[str],
    say: Callable[[str], object],
) -> None:
    """Checks, before anything is computed, that a run's held-out prompts are those of its base model's scores.

    Args:
      workdir: of the run, which may have none yet.
      prompts: held-out prompts as they are now.
      images_per_prompt: images of each.
      names: of the rewards that score them.
      say: called with a line where an older record leaves the prompts open.

    Raises:
      InputError: other prompts, or other rewards.
    """
    record = read_base_scores(workdir.path / BASE_SCORES)
    if record is None:
        return
    where = f"workdir {workdir.path}: {BASE_SCORES}"
    if record["names"] != list(names):
        raise InputError(
            f"{where}: expected scores of {', '.join(names)}; received {', '.join(record['names'])}; choose another "
            "--workdir"
        )
    num_images, recorded = len(prompts) * images_per_prompt, len(record["values"])
    if num_images != recorded:
        raise InputError(
            f"{where}: expected the {recorded} held-out images that the base model was scored on; received "
            f"{num_images} by the test prompts as they are now; put those back, or choose another --workdir"
        )
    if _PROMPTS in record:
        same = record[_PROMPTS] == prompts_digest(prompts)
    else:
        same = _shown_prompts_fit(workdir, prompts)
        if same:
            say(
                f"{BASE_SCORES} is older than the record of its prompts: taken to be of the {len(prompts)} held-out "
                "prompts as they are now"
            )
    if not same:
        raise InputError(
            f"{where}: expected the held-out prompts that the base model was scored on; received {len(prompts)} others "
            "(test files were changed); put those back, or choose another --workdir"
        )


def _shown_prompts_fit(workdir: Workdir, prompts: Sequence[Prompt]) -> bool:
    """Whether the prompts whose images are kept, all that an older run has on record of them, are where they were."""
    file = workdir.samples / "prompts.json"
    try:
        shown = validated(list[dict[str, Any]], parse_json(file.read_bytes(), file), file)
    except (OSError, InputError):
        # Without that record, the number of prompts is all there is to go by.
        return True
    # As words: a damaged record may have anything for a number.
    texts = {str(index): prompt.text for index, prompt in enumerate(prompts)}
    return all(texts.get(str(entry.get("seed"))) == entry.get("prompt") for entry in shown)
