"""Rewards by name: a directory's `rewards.json` says what each is made of, and this module makes it.

    {"alignment": {"kind": "clip", "formula": "clipscore", "model": "alignment"},
     "aesthetic": {"kind": "aesthetic", "model": "alignment", "head": "aesthetic/model.safetensors"},
     "ocr": {"kind": "ocr", "detect": false, "scale": 3},
     "geneval": {"kind": "geneval", "detector": "shapes"}}

`model` is a folder beside the file or a Hub name, `head` a file. Rewards that name the same model share it. An entry
of any kind may say `"sources": ["ocr"]`, the sources of the prompts that its reward is for, and `"frames": "count:3"`
with `"frame_reduction": "min"`, how it scores clips (`frames`) where that is not as `rewards.frames` has it. The
published models and the rewards of clips that need none (`published.ENTRIES`, `published.CLIP_ENTRIES`) need no entry
and no file; a name `module:function` needs no entry either. Each kind's options stand beside its class, see
`registration`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from marble_jax.errors import InputError, nearest, one_of
from marble_jax.platform import host_threads
from marble_jax.rewards.base import CLIPS, IMAGES, Reward
from marble_jax.rewards.frames import REDUCTIONS, FrameChoice, Reduction, parse_frames
from marble_jax.rewards.function import FunctionReward, import_module, is_function, load_function
from marble_jax.rewards.http.judge_numbers import expand
from marble_jax.rewards.models import published
from marble_jax.rewards.models.shared_encoders import SharedEncoders
from marble_jax.rewards.registration import (
    DTYPES,
    BuildContext,
    RewardKind,
    kinds_of,
    parse_options,
)
from marble_jax.storage.files import read_json
from marble_jax.validation import validated

FILE = "rewards.json"
BUILT_IN_KINDS = {
    "clip": "models.clip_reward",
    "aesthetic": "models.aesthetic",
    "imagereward": "models.imagereward",
    "ocr": "ocr",
    "geneval": "geneval",
    "jpeg_compressibility": "image_statistics",
    "jpeg_incompressibility": "image_statistics",
    "brightness": "image_statistics",
    "colourfulness": "image_statistics",
    "video_ocr": "ocr",
    "motion": "video.clip_statistics",
    "smoothness": "video.clip_statistics",
    "flicker": "video.clip_statistics",
    "motion_as_told": "video.motion_as_told",
    "feature_consistency": "video.feature_consistency",
    "block_dynamic_degree": "video.block_metrics",
    "block_motion_smoothness": "video.block_metrics",
    "remote": "external",
    "openai": "external",
    "hpsv3": "hpsv3",
    "function": "function",
}
"""Modules of `marble_jax.rewards` that register each kind; imported when an entry asks for it."""

Entries = Mapping[str, Mapping[str, Any]]


def entries_of(directory: Path | str) -> dict[str, dict[str, Any]]:
    """Returns the entries of a directory's `rewards.json`; the published models without such a file, or for "hub".

    A judge of several numbers comes as an entry for each, see `judge_numbers`.

    Raises:
      InputError: missing directory, or a file that does not hold objects by name.
    """
    directory = Path(directory)
    if str(directory) == published.HUB and not directory.is_dir():
        return dict(published.ENTRIES)
    if not directory.is_dir():
        raise InputError(
            f"rewards.path: expected a directory with {FILE}; received {str(directory)!r}"
        )
    file = directory / FILE
    # A link to nothing is a file that the user meant to be there.
    if not file.exists() and not file.is_symlink():
        return dict(published.ENTRIES)
    return expand(validated(dict[str, dict[str, Any]], read_json(file), file), file)


def load_rewards(
    directory: Path | str | None,
    names: Sequence[str],
    num_workers: int = 0,
    dtype: Any = "float32",
    upstream: bool = False,
    frames: str = "",
    frame_reduction: str = "mean",
) -> list[Reward]:
    """Builds the rewards `names` of a directory.

    Args:
      directory: holds the folders of models and perhaps `rewards.json`; "hub" where there is none and all models come
        from the Hub; None will do when all names are functions.
      names: rewards wanted, in the order of the reward axis.
      num_workers: images a host reward works on at the same time; 0: as many as this process may use cores.
      dtype: of the networks on the device, unless an entry says otherwise.
      upstream: score OCR and GenEval as MARBLE's released code does where our rules differ.
      frames: which frames of a clip rewards that take images see, unless their entry says otherwise; empty for no
        choice, without which they refuse clips. It has no meaning for images.
      frame_reduction: how they make one score of a clip's frames.

    Raises:
      InputError: missing directory, file or folder; an unknown reward, kind or option; a reward named twice.
    """
    default = _frame_choice("rewards.frames", frames)
    one_of("rewards.frame_reduction", frame_reduction, REDUCTIONS)
    entries = _known_entries(directory, names)
    context = _context(directory, num_workers, str(dtype), upstream)
    _check_names(names, entries, context.source)
    rewards = [build_reward(name, entries, context) for name in names]
    for reward in rewards:
        _set_frames(reward, entries.get(reward.name, {}), context.source, default, frame_reduction)
    return rewards


def check_rewards(directory: Path | str | None, names: Sequence[str]) -> None:
    """Checks, before work of hours, what can be known of rewards without loading them; arguments as `load_rewards`.

    Raises:
      InputError: an unknown reward, kind or option, or a package that a reward needs and that is not installed.
    """
    entries = _known_entries(directory, names)
    context = _context(directory, 1, "float32", False)
    _check_names(names, entries, context.source)
    for name in names:
        if name in entries:
            kind, options, _ = _parse_entry(name, entries[name], context)
            kind.check(options)


def _known_entries(directory: Path | str | None, names: Sequence[str]) -> Entries:
    """Returns the entries of a directory and, behind them, those of the published rewards."""
    entries: dict[str, Mapping[str, Any]] = {**published.ENTRIES, **published.CLIP_ENTRIES}
    # Functions alone need no directory, and none is asked for.
    if all(is_function(name) for name in names):
        return entries
    from_directory = entries_of(directory or "")
    # The directory's own names come first in error messages, and win.
    return {**from_directory, **entries, **from_directory}


def _frame_choice(what: str, text: str) -> FrameChoice | None:
    return parse_frames(what, text) if text else None


def _set_frames(
    reward: Reward,
    entry: Mapping[str, Any],
    source: str,
    default: FrameChoice | None,
    default_reduction: str,
) -> None:
    """Sets which frames of clips a reward sees, by its entry or else by the default.

    Raises:
      InputError: an entry that names no choice, or a reduction for a reward that scores clips as such.
    """
    what = f"{source}: frames of {reward.name}"
    own = _frame_choice(what, validated(str, entry.get("frames", ""), what))
    what = f"{source}: frame_reduction of {reward.name}"
    reduction = validated(str, entry.get("frame_reduction", ""), what)
    if reduction and reward.takes == CLIPS:
        raise InputError(f"{what}: expected none, as it takes clips; received {reduction!r}")
    if reduction:
        one_of(what, reduction, REDUCTIONS)
    # A kind may bring a choice of its own, which an entry replaces and the default does not.
    chosen = own or reward.frames
    if reward.takes == IMAGES:
        chosen = chosen or default
        reward.reduction = cast(Reduction, reduction or default_reduction)
    reward.frames = chosen


def _context(
    directory: Path | str | None, num_workers: int, dtype: str, upstream: bool
) -> BuildContext:
    folder, source = None, "the published rewards"
    if directory and Path(directory).is_dir():
        folder = Path(directory)
        source = str(folder / FILE)
    one_of("dtype of rewards", dtype, DTYPES)
    threads = host_threads(num_workers)
    return BuildContext(folder, source, threads, dtype, upstream, SharedEncoders(folder))


def _check_names(names: Sequence[str], entries: Entries, source: str) -> None:
    for name in names:
        if name not in entries and not is_function(name):
            raise InputError(
                f"reward: expected one of {', '.join(entries)} of {source}; received "
                f"{name!r}{nearest(name, entries)}"
            )
        times = list(names).count(name)
        if times > 1:
            raise InputError(f"reward: expected every name once; received {name!r} {times} times")


def build_reward(name: str, entries: Entries, context: BuildContext) -> Reward:
    """Builds the reward of a name, which is an entry or a function.

    Raises:
      InputError: an unknown kind, an option that is unknown or does not fit, or whatever the builder misses.
    """
    if name not in entries:
        return FunctionReward(name, load_function(name, context.directory))
    kind, options, sources = _parse_entry(name, entries[name], context)
    reward = kind.build(name, options, context)
    reward.sources = sources
    return reward


def _parse_entry(
    name: str, entry: Mapping[str, Any], context: BuildContext
) -> tuple[RewardKind, Any, tuple[str, ...]]:
    """Returns the kind of an entry, its options, and the sources of prompts that it is for.

    Raises:
      InputError: an unknown kind, or an option that is unknown or does not fit.
    """
    entry = dict(entry)
    kind = find_kind(name, validated_kind(name, entry.pop("kind", None), context), context)
    # Which prompts a reward is for is no matter of its kind, nor is which frames of clips it sees (`_set_frames`).
    entry.pop("frames", None)
    entry.pop("frame_reduction", None)
    sources = validated(
        tuple[str, ...], entry.pop("sources", []), f"{context.source}: sources of {name}"
    )
    return kind, parse_options(kind, name, entry, context.source), sources


def validated_kind(name: str, kind: Any, context: BuildContext) -> str:
    """Returns the kind that an entry names. Raises InputError for anything but a text."""
    return validated(str, kind, f"{context.source}: kind of {name}")


def find_kind(name: str, kind: str, context: BuildContext) -> RewardKind:
    """Returns a kind, importing the module that registers it.

    Args:
      name: key of the reward that asks for it.
      kind: a key of BUILT_IN_KINDS, or `module:kind` for one of a user's own.
      context: of the rewards.

    Raises:
      InputError: no such kind, or a module that does not import or does not register it.
    """
    module_name, _, short_name = kind.rpartition(":")
    if module_name:
        import_module(kind, module_name, context.directory)
    else:
        one_of(f"{context.source}: kind of {name}", kind, BUILT_IN_KINDS)
        # Imported only now: each kind brings its own heavy libraries.
        module_name = f"{__package__}.{BUILT_IN_KINDS[kind]}"
        importlib.import_module(module_name)
    registered = kinds_of(module_name)
    if short_name not in registered:
        raise InputError(
            f"{context.source}: kind of {name}: expected one that {module_name} registers "
            f"({', '.join(registered) or 'none so far'}); received {short_name!r}"
            f"{nearest(short_name, registered)}"
        )
    return registered[short_name]
