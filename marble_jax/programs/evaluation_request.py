"""What an evaluation is asked for: models, prompts, rewards, as the command line says them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from marble_jax.errors import InputError
from marble_jax.policies import POLICIES, check_policy
from marble_jax.programs.locations import EMBEDDED, SHIPPED, read_prompts
from marble_jax.programs.policy_source import PolicySource, SamplingSettings
from marble_jax.prompts import generated, groups
from marble_jax.prompts.files import Prompt, is_prompt_file, read_file
from marble_jax.prompts.groups import check_enough, shares, spread
from marble_jax.storage.files import location
from marble_jax.validation import short

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_TAKEN_NAMES = frozenset(
    ("evaluation.json", "prompts.jsonl", "summary.json", "index.html", "rating")
)
"""What an evaluation's folder has beside those of its models."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What an evaluation is asked for.

    Attributes:
      models: by name, the first being the reference of gains.
      prompts: where from, see `evaluation_prompts`.
      num_prompts: at most so many, in equal shares of the sources; 0: all.
      images: images of each prompt.
      rewards_path: directory with rewards.json, or "embedded".
      rewards: names; empty: all of the directory.
      frames: which frames of clips rewards of images see, unless their entry says otherwise; empty for no choice.
      frame_reduction: how they make one score of them.
      settings: how images are drawn; what it leaves open is settled for all models alike, see `shared_settings`.
      stated: which of "steps" and "solver" are asked for; the others of them are settled, too.
      draw: whether images are drawn; they are expected to be there otherwise.
      score: whether they are scored.
      num_workers: threads for host rewards; 0: as many as this process may use cores.
      num_images: images of each model on the page.
      command: as it was called, for the record.
      held_out: the prompts themselves where a run has picked them; `prompts` then says where they are from.
      upstream_scoring: score OCR and GenEval by the rules of MARBLE's released code instead of the published ones.
    """

    models: Mapping[str, PolicySource]
    prompts: str
    num_prompts: int = 0
    images: int = 1
    rewards_path: str = EMBEDDED
    rewards: tuple[str, ...] = ()
    frames: str = ""
    frame_reduction: str = "mean"
    settings: SamplingSettings = SamplingSettings()
    stated: frozenset[str] = frozenset()
    draw: bool = True
    score: bool = True
    num_workers: int = 0
    num_images: int = 24
    command: str = ""
    held_out: Sequence[Prompt] | None = None
    upstream_scoring: bool = False


def parse_models(text: str) -> dict[str, PolicySource]:
    """Models of `NAME=PLACE[:POLICY][+LORA[:weight]]...`, separated by commas.

    A PLACE is a diffusers-layout directory, a hub id, 'embedded' or 'embedded_video', or the workdir of a training run
    with one of its policies (ema unless given). Without `NAME=` the last part of PLACE names the model.

    Raises:
      InputError: an empty or repeated name or place, an unknown policy, or a policy of something that is no run.
    """
    models: dict[str, PolicySource] = {}
    for item in text.split(","):
        if not item.strip():
            continue
        name, source = _parse_model(item.strip())
        if name in models:
            raise InputError(f"--models: expected every name once; received {name!r} twice")
        models[name] = source
    if not models:
        raise InputError("--models: expected at least one NAME=PLACE; received none")
    return models


def _parse_model(item: str) -> tuple[str, PolicySource]:
    """One model of `--models`."""
    name, separator, value = item.partition("=")
    if not separator:
        value = item
    place, *loras = value.split("+")
    path, policy = _split_policy(place)
    name = name.strip() if separator else _name_of(path)
    check_model_name(name, item)
    if not path or not all(loras):
        raise InputError(f"--models: expected NAME=PLACE[:POLICY][+LORA]; received {item!r}")
    is_run = _is_run(path)
    if policy and not is_run:
        raise InputError(f"--models: expected a training run before ':{policy}'; received {path!r}")
    added = ",".join(loras)
    if not is_run:
        return name, PolicySource(model=path, loras=added)
    return name, PolicySource(workdir=path, policy=policy or "ema", loras=added)


def check_model_name(name: str, item: str, where: str = "--models") -> None:
    """Checks the name of a model, which becomes a folder's.

    Args:
      name: of the model.
      item: what was given, for the message.
      where: it was given, for the message.

    Raises:
      InputError: a name of other characters.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{where}: expected NAME=PLACE with a name of at most 100 letters, digits, '.', '-' and '_'; "
            f"received {short(item)}"
        )
    if name.lower() in _TAKEN_NAMES:
        raise InputError(
            f"{where}: expected a name that is free in the evaluation's folder; received {name!r}"
        )


def _name_of(path: str) -> str:
    """The last part of a path or hub id, as a name."""
    last = path.rstrip("/").rpartition("/")[2]
    # The name becomes a folder's: no dot or dash at its beginning.
    return re.sub(r"[^\w.-]+", "-", last).lstrip("-._")


def _is_run(path: str) -> bool:
    """Whether a place is the workdir of a training run: some model folders have a config.json too."""
    folder = location("--models", path)
    return (folder / "config.json").exists() and not (folder / "model_index.json").exists()


def _split_policy(place: str) -> tuple[str, str]:
    """(path, policy) of `PATH[:POLICY]`; a colon before anything else belongs to the path."""
    path, _, policy = place.rpartition(":")
    if not path:
        return place, ""
    if policy in POLICIES:
        return path, policy
    # A word behind a run's workdir is meant as a policy; behind anything else it is part of a path, as in gs://x.
    if re.fullmatch(r"[a-z]+", policy) and (location("--models", path) / "config.json").exists():
        check_policy("--models: policy", policy)
    return place, ""


def requested_prompts(request: Request) -> list[Prompt]:
    """The prompts that an evaluation is asked for; see `evaluation_prompts`."""
    if request.held_out is None:
        return evaluation_prompts(request.prompts, request.num_prompts, request.images)
    return _chosen(groups.by_source(request.held_out), request.num_prompts, request.images)


def evaluation_prompts(text: str, num_prompts: int = 0, images: int = 1) -> list[Prompt]:
    """The prompts of an evaluation, each repeated for its images.

    Args:
      text: files (one prompt a line, GenEval's `.jsonl`, or a table's FILE#COLUMN) or directories with SOURCE/test
        files, separated by commas, each perhaps on the Hub by its `hf://` path; or 'embedded', 'embedded_video'
        or 'generated'.
      num_prompts: at most so many, in equal shares of the sources, evenly from each; 0: all.
      images: images of each prompt.

    Raises:
      InputError: no prompt, fewer of them than sources, or a malformed file.
    """
    by_source = _prompts_by_source(text)
    if not by_source:
        raise InputError(
            "--prompts_path: expected a file, a directory, 'embedded', 'embedded_video' or 'generated'; "
            "received none"
        )
    return _chosen(by_source, num_prompts, images)


def _chosen(
    by_source: Mapping[str, Sequence[Prompt]], num_prompts: int, images: int
) -> list[Prompt]:
    """At most `num_prompts` (0: all) of the prompts, by source, each repeated for its images."""
    if num_prompts:
        by_source = _in_equal_shares(by_source, num_prompts)
    prompts: list[Prompt] = []
    for name in sorted(by_source):
        for prompt in by_source[name]:
            prompts += [prompt] * images
    return prompts


def _prompts_by_source(text: str) -> dict[str, list[Prompt]]:
    """The prompts of all places named, by source; a source of two places has the prompts of both."""
    by_source: dict[str, list[Prompt]] = {}
    for place in text.split(","):
        place = place.strip()
        if not place:
            continue
        for source, prompts in _prompts_at(place).items():
            by_source.setdefault(source, []).extend(prompts)
    return by_source


def _prompts_at(place: str) -> dict[str, list[Prompt]]:
    """The prompts of a file, a directory or a shipped set, by source."""
    # A file that happens to be called like a shipped set does not hide it.
    if place not in (*SHIPPED, generated.NAME) and is_prompt_file(place):
        prompts = read_file(place)
        return {prompts[0].source: prompts}
    return read_prompts(place, "test")


def _in_equal_shares(
    by_source: Mapping[str, Sequence[Prompt]], num_prompts: int
) -> dict[str, list[Prompt]]:
    """At most `num_prompts` prompts, evenly from each source and not the first ones: files come sorted by kind."""
    names = sorted(by_source)
    check_enough("--num_prompts", num_prompts, names)
    chosen = {}
    for name, count in shares(names, num_prompts).items():
        indices = spread(len(by_source[name]), count)
        chosen[name] = [by_source[name][i] for i in indices]
    return chosen
