"""Where models, prompts and rewards lie: directories by path, or the ones that ship with the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from marble_jax import distributed
from marble_jax.config import EvaluationSettings, PromptSettings, RewardSettings
from marble_jax.errors import InputError
from marble_jax.families.descriptions import Size
from marble_jax.prompts import generated
from marble_jax.prompts.files import Prompt, read_directory
from marble_jax.prompts.groups import check_enough, shares, spread
from marble_jax.prompts.hub_sets import is_on_hub, local_copy
from marble_jax.rewards.function import is_function
from marble_jax.storage.files import is_remote, local_path

EMBEDDED = "embedded"
"""Names the directories of the image pipeline that ships with the package."""
EMBEDDED_VIDEO = "embedded_video"
"""Names those of the video pipeline."""
SHIPPED = {EMBEDDED: "embedded", EMBEDDED_VIDEO: "embedded/video"}
"""Folders in the package by name."""
SHIPPED_SIZES = {EMBEDDED: Size(64, 64), EMBEDDED_VIDEO: Size(48, 48, 5)}
"""What the shipped pipelines were made for; the video pipeline's files have no word for it."""

AUTO = "auto"
"""Value of `prompts.embedding_cache` that goes by how many processes a run has."""
OWN_EMBEDDINGS = "~/.cache/marble_jax/embeddings"
"""Folder of text embeddings that the runs of a machine share."""

_KEYS = {"pipeline": "model.path", "prompts": "prompts.path", "rewards": "rewards.path"}


def resolve_path(path: str, kind: str) -> Path:
    """Finds the directory of a model, prompts or rewards.

    Args:
      path: a path, in which `~` is this user's home, or a name of SHIPPED; prompts may lie on the Hub, at an
        `hf://` path.
      kind: "pipeline", "prompts" or "rewards": a folder of a shipped pipeline.

    Raises:
      InputError: an empty path, or one in a bucket.
    """
    if path in SHIPPED:
        return Path(str(resources.files("marble_jax") / SHIPPED[path] / kind))
    if is_remote(path):
        raise InputError(
            f"{_KEYS[kind]}: expected a directory of this machine; received {path} (copy it here first)"
        )
    if not path:
        raise InputError(f"{_KEYS[kind]}: expected a directory or 'embedded'; received nothing")
    if kind == "prompts" and is_on_hub(path):
        return local_copy(path)
    return local_path(path)


def model_location(path: str) -> Path | str:
    """Returns what `find_model` finds a model by: its directory, of this machine or in a bucket, or its Hub name.

    Raises:
      InputError: an empty path.
    """
    return path if is_remote(path) else resolve_path(path, "pipeline")


def embedding_folder(chosen: str, shared: str) -> str:
    """Returns the folder of a run's text embeddings; empty where the text encoders stay in memory.

    Args:
      chosen: `prompts.embedding_cache`.
      shared: a folder that all processes of the run see; empty for none.
    """
    if chosen != AUTO:
        return chosen
    if shared and not distributed.is_single_process():
        # In a folder of its own each host would encode what all the others encode, too.
        return shared
    return OWN_EMBEDDINGS


def reward_directory(settings: RewardSettings) -> Path | None:
    """Returns the directory of a run's rewards; None where there is none and all rewards are functions."""
    names = (*settings.train, *settings.heldout)
    # A path that is given is read even so: it may hold records that scores are compared with.
    if not settings.path and all(map(is_function, names)):
        return None
    return resolve_path(settings.path, "rewards")


def read_prompts(
    path: str, split: str, sources: Sequence[str] | None = None
) -> dict[str, list[Prompt]]:
    """Reads the prompts of a split, by source.

    Args:
      path: a directory with SOURCE/SPLIT files, also of the Hub by `hf://` path, a name of SHIPPED, or "generated" for
        the sets that need no files.
      split: "train" or "test".
      sources: those wanted; all when None.
    """
    wanted = sources if sources is None else tuple(sources)
    if path == generated.NAME:
        return generated.generate(split, wanted)
    return read_directory(resolve_path(path, "prompts"), split, wanted)


def held_out_prompts(prompts: PromptSettings, evaluation: EvaluationSettings) -> list[Prompt]:
    """Picks a run's held-out prompts: equal shares of every source's test prompts, sources in turn.

    Of a source they are its first prompts where these are of every kind that it has (GenEval's tags), else prompts
    evenly spaced over it: sets come sorted by kind, too, and their beginning would then lack whole kinds.

    Raises:
      InputError: fewer prompts than sources, or files that do not read.
    """
    sources = evaluation.sources or prompts.sources
    by_source = read_prompts(prompts.path, "test", sources)
    # In alphabetical order: the same prompts in the same order, however a run lists its sources.
    names = sorted(by_source)
    check_enough("evaluation.num_prompts", evaluation.num_prompts, names)
    chosen: list[Prompt] = []
    for name, count in shares(names, evaluation.num_prompts).items():
        chosen += _of_every_kind(by_source[name], count)
    return chosen


def _of_every_kind(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first `count` prompts, or as many evenly spaced ones where the first are not of every kind."""
    first = list(prompts[:count])
    if _kinds(first) == _kinds(prompts):
        return first
    return [prompts[index] for index in spread(len(prompts), count)]


def _kinds(prompts: Sequence[Prompt]) -> set[str]:
    """The kinds of prompts: their tags, in words, as a file may have anything there."""
    return {str(prompt.metadata.get("tag", "")) for prompt in prompts}
