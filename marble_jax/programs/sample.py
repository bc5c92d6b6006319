"""Images or clips of prompts from a model, or from a policy of a training run, as files."""

from __future__ import annotations

from collections.abc import Sequence

from marble_jax import platform
from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.programs.image_sampler import ImageSampler
from marble_jax.programs.policy_source import PolicySource, SamplingSettings
from marble_jax.storage.files import read_json_or_empty
from marble_jax.storage.images import ImageFolder, writable
from marble_jax.storage.mp4 import check_mp4
from marble_jax.storage.workdir import Workdir

_HASHES = "hashes.json"


def sample_images(
    prompts: Sequence[str],
    out: str,
    source: PolicySource,
    settings: SamplingSettings,
    with_grid: bool,
    with_mp4: bool = False,
) -> None:
    """Writes `out/00000.png` and so on; an image that is there is not drawn again.

    Args:
      prompts: N texts.
      out: directory.
      source: what draws.
      settings: how.
      with_grid: also write `grid.png`.
      with_mp4: also write each clip as MP4.

    Raises:
      InputError: see `ImageSampler` and `ImageFolder.check`; MP4 of images, or without an encoder.
    """
    if not prompts:
        raise InputError("prompts: expected at least one; received none")
    if with_mp4:
        check_mp4()
    platform.keep_compilations()
    console, folder = Console(), ImageFolder(out)
    sampler = ImageSampler(source, settings)
    frames_per_second = sampler.family.frames_per_second
    if with_mp4 and frames_per_second is None:
        raise InputError(f"--mp4: expected a model of clips; received {sampler.family.name}")
    fill_folder(folder, sampler, prompts, settings.batch, console, "sample")
    if with_grid:
        folder.save_grids(len(prompts))
    if with_mp4 and frames_per_second is not None:
        folder.save_mp4s(len(prompts), frames_per_second)
    console.say(f"{sampler.size.samples}: {folder.path}")


def fill_folder(
    folder: ImageFolder,
    sampler: ImageSampler,
    prompts: Sequence[str],
    batch: int,
    console: Console,
    what: str,
) -> int:
    """Draws the images that a folder lacks; a kill loses at most one batch.

    Returns:
      How many were drawn.

    Raises:
      InputError: the folder holds images of another making, or cannot be written to.
    """
    # Before any weights are read: what does not fit shows at once.
    folder.check(sampler.plan(), prompts, partial=True)
    missing = folder.missing(len(prompts))
    sampler.prepare([prompts[i] for i in missing], console)
    sampler.open(bool(missing))
    _claim(folder, sampler, prompts)
    console.say(
        f"{what}: {len(prompts)} {sampler.size.samples} of {sampler.size} px, {len(prompts) - len(missing)} already "
        f"in {folder.path}; {sampler.origin}"
    )
    with console.bar(len(missing), what, "img") as bar:
        for start in range(0, len(missing), batch):
            numbers = missing[start : start + batch]
            _draw(folder, sampler, prompts, numbers)
            bar.update(len(numbers))
    return len(missing)


def _draw(
    folder: ImageFolder, sampler: ImageSampler, prompts: Sequence[str], numbers: Sequence[int]
) -> None:
    """Draws and saves the images of some numbers."""
    images = sampler.draw([prompts[i] for i in numbers], numbers)
    for number, image in zip(numbers, images, strict=True):
        texts = sampler.texts(number, prompts[number])
        folder.save(number, image, texts, sampler.family.frames_per_second)


def _claim(folder: ImageFolder, sampler: ImageSampler, prompts: Sequence[str]) -> None:
    """Writes down what the folder's images are of, and the hashes of the files that say so."""
    hashes = folder.path / _HASHES
    known = read_json_or_empty(hashes)
    record, files = sampler.record(known)
    folder.claim(record, prompts)
    # Written once: another call may read while this one draws.
    if files != known:
        with writable(folder.path):
            Workdir(folder.path).write_json(_HASHES, files)
