"""Scoring the images of an evaluation: what lacks a score is scored, a few batches under way at a time."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from marble_jax.batches import batch_indices, pack_groups
from marble_jax.console import Console, joined
from marble_jax.errors import InputError
from marble_jax.evaluation.judgements import with_accuracy
from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.families.descriptions import Size
from marble_jax.programs.evaluation_request import Request
from marble_jax.programs.locations import resolve_path
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.rewards.function import is_function
from marble_jax.rewards.registry import check_rewards, entries_of, load_rewards
from marble_jax.rewards.scorer import Scorer
from marble_jax.storage.images import ImageFolder, writable
from marble_jax.storage.workdir import Workdir

UNDER_WAY = 2
"""Batches that host rewards score while the next one is read."""


def reward_entries(request: Request) -> dict[str, Any]:
    """Returns the entries of the rewards asked for, by name, each with the directory it is from.

    Raises:
      InputError: a reward that is neither in the directory nor known to the package, or that lacks a package.
    """
    path = resolve_path(request.rewards_path, "rewards")
    entries: dict[str, Any] = {}
    only_functions = bool(request.rewards) and all(map(is_function, request.rewards))
    # Functions need no directory, and there may be none.
    if not only_functions:
        entries = entries_of(path)
    names = request.rewards or tuple(entries)
    # What has no entry, or lacks a package, is refused now, not after hours of drawing.
    check_rewards(path, names)
    without_entry = [name for name in names if name not in entries]
    _load(request, path, without_entry)
    # What decides a score stands in the record: scores of other frames or rules are others.
    about: dict[str, Any] = {"path": str(path)}
    if request.frames:
        about |= {"default_frames": request.frames, "default_reduction": request.frame_reduction}
    if request.upstream_scoring:
        about["upstream_scoring"] = True
    return {name: entries.get(name, {}) | about for name in names}


def _load(request: Request, path: Path | str, names: Sequence[str]) -> list[Reward]:
    return load_rewards(
        path,
        names,
        request.num_workers,
        upstream=request.upstream_scoring,
        frames=request.frames,
        frame_reduction=request.frame_reduction,
    )


def score_models(
    request: Request, workdir: Workdir, prompts: Sequence[Prompt], console: Console
) -> list[str]:
    """Scores the images that lack a score; returns the names of all columns."""
    path = resolve_path(request.rewards_path, "rewards")
    wanted = request.rewards or tuple(entries_of(path))
    # GenEval's graded score brings the share of images that are right in all respects.
    rewards = with_accuracy(_load(request, path, wanted))
    for reward in rewards:
        reward.inquire()
    _say_groups(rewards, prompts, console)
    names = [reward.name for reward in rewards]
    for model in request.models:
        _score_model(request, workdir, model, rewards, prompts, console)
    return names


def _say_groups(rewards: Sequence[Reward], prompts: Sequence[Prompt], console: Console) -> None:
    """Says how many images are compared by rewards that compare those of a prompt."""
    names = [reward.name for reward in rewards if reward.needs_full_group]
    if not names:
        return
    sizes = sorted(set(Counter(prompt.text for prompt in prompts).values()))
    told = f"scored on the {joined([str(size) for size in sizes])} images of each"
    if sizes == [1]:
        told = "scored on single images (--images=N draws several)"
    console.say(f"{joined(names)}, which compare the images of a prompt: {told}")


def _score_model(
    request: Request,
    workdir: Workdir,
    model: str,
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    console: Console,
) -> None:
    """Scores what lacks a score of one model."""
    file = ScoreFile(workdir.path / model / "scores.jsonl")
    is_scored = True
    for compares in (False, True):
        # What another call has scored already is not scored again.
        names = [reward.name for reward in rewards if reward.needs_full_group == compares]
        lacking, missing = file.missing(names, len(prompts))
        if not missing:
            continue
        is_scored = False
        batches = _batches(missing, request.settings.batch)
        if compares:
            batches = _whole_groups(missing, prompts, request.settings.batch)
        count = len(set(itertools.chain(*batches)))
        console.say(f"{model}: {count} images to score by {', '.join(lacking)}")
        chosen = [reward for reward in rewards if reward.name in lacking]
        scorer = Scorer(chosen, request.num_workers, "retry")
        with closing(scorer), console.bar(count, f"scores of {model}", "img") as bar:
            _score_images(scorer, file, workdir, model, prompts, batches, bar)
        with writable(workdir.path):
            file.finish(prompts)
    if is_scored:
        console.say(f"{model}: 0 images to score")


def _batches(missing: Sequence[int], size: int) -> list[list[int]]:
    """The missing images in batches of one size; the last one repeats an image until it is full."""
    batches = []
    for rows in batch_indices(len(missing), min(size, len(missing))):
        batches.append([missing[row] for row in rows])
    return batches


def _whole_groups(missing: Sequence[int], prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """The missing images with all others of their prompts, in batches that take no prompt apart nor repeat an image."""
    texts = {prompts[number].text for number in missing}
    numbers = [number for number, prompt in enumerate(prompts) if prompt.text in texts]
    parts = pack_groups([prompts[number].text for number in numbers], size)
    return [[numbers[row] for row in part] for part in parts]


def _score_images(
    scorer: Scorer,
    file: ScoreFile,
    workdir: Workdir,
    model: str,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int]],
    bar: Any,
) -> None:
    """Scores batches of images of one model, and appends them to its file."""
    folder = ImageFolder(workdir.path / model)
    under_way: deque[tuple[list[int], Any]] = deque()

    def collect() -> None:
        """Waits for the oldest batch, and writes it."""
        numbers, pending = under_way.popleft()
        scores = pending.result()
        with writable(workdir.path):
            file.append(numbers, [prompts[i] for i in numbers], scores)
        bar.update(len(numbers))

    for numbers in batches:
        # From the 8-bit files: scores do not depend on whether images were drawn in this call.
        pixels = _read_alike(folder, numbers)
        images = pixels.astype(np.float32) / 255
        pending = scorer.submit(jnp.asarray(images), [prompts[i] for i in numbers])
        # The last batch repeats an image until it is full; each is written once.
        under_way.append((list(dict.fromkeys(numbers)), pending))
        if len(under_way) > UNDER_WAY:
            collect()
    while under_way:
        collect()


def _read_alike(folder: ImageFolder, numbers: Sequence[int]) -> np.ndarray:
    """Images uint8 [n, H, W, 3], or clips [n, F, H, W, 3], of a folder.

    Raises:
      InputError: one is missing or damaged, or not of the first one's size and frames.
    """
    samples = [folder.read(i) for i in numbers]
    for number, sample in zip(numbers, samples, strict=True):
        if sample.shape != samples[0].shape:
            raise InputError(
                f"{folder.file(number)}: expected {_size(samples[0])}, as of {folder.file(numbers[0]).name}; "
                f"received {_size(sample)}"
            )
    return np.stack(samples)


def _size(sample: np.ndarray) -> str:
    """Frames and size of an image [H, W, 3] or a clip [F, H, W, 3], in words."""
    *frames, height, width, _ = sample.shape
    return str(Size(height, width, *frames)) + " px"
