"""Several models on the same prompts and seeds: images, scores, a summary and a page that compares them.

    OUT/evaluation.json      what was asked for
    OUT/prompts.jsonl        prompt i with its source and metadata
    OUT/MODEL/00000.png      image or clip i of a model, and settings.json
    OUT/MODEL/scores.jsonl   its scores
    OUT/summary.json         means, intervals, gains, GenEval's tags, composite
    OUT/index.html           all of it to look at

All models are drawn the same way (`shared_settings`). Generation and scoring may run apart, on different machines; each
goes on where a kill stopped it. Scores are those of the 8-bit images on disk: it does not matter when they are taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax import platform
from marble_jax.console import Console, shown
from marble_jax.errors import InputError
from marble_jax.evaluation.comparison import compare
from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.programs.evaluation_record import (
    new_record,
    read_evaluation,
    write_prompts,
    write_record,
)
from marble_jax.programs.evaluation_request import Request, requested_prompts
from marble_jax.programs.evaluation_scores import reward_entries, score_models
from marble_jax.programs.image_sampler import ImageSampler
from marble_jax.programs.pipeline_cache import PipelineCache
from marble_jax.programs.policy_source import SamplingSettings
from marble_jax.programs.sample import fill_folder
from marble_jax.programs.shared_settings import SharedSettings, check_alike, shared_settings
from marble_jax.prompts.files import Prompt
from marble_jax.report import write_comparison
from marble_jax.report.comparison_tables import COMPOSITE_MODELS
from marble_jax.storage.images import ImageFolder, writable
from marble_jax.storage.workdir import Workdir
from marble_jax.types import Scores


def evaluate(request: Request, out: str) -> dict[str, Any] | None:
    """Draws, scores and compares models; returns the summary, or None where scores are still missing.

    Raises:
      InputError: bad input, before anything is written; or images or scores that are missing.
    """
    platform.keep_compilations()
    console, workdir = Console(), Workdir(out, "--out")
    prompts = requested_prompts(request)
    rewards = reward_entries(request) if request.score else {}
    shared = None
    if request.draw:
        shared = shared_settings(request.models, request.settings, request.stated)
        request = dataclasses.replace(request, settings=shared.settings)
    samplers = _samplers(request)
    # Everything is checked before the first write: a mistake leaves the folder as it was.
    record = new_record(request, workdir, prompts, rewards, shared)
    _check_folders(request, workdir, samplers, prompts)
    if shared is not None:
        _announce_settings(shared, console)
    _announce_scoring(request, samplers, console)
    write_record(workdir, record)
    write_prompts(workdir, prompts)
    _draw(request, workdir, samplers, prompts, record, console)
    # Models and rewards may not fit into memory together.
    del samplers
    if request.score:
        columns = score_models(request, workdir, prompts, console)
        # Rewards of earlier calls keep their columns, in front.
        record["columns"] = list(dict.fromkeys([*record.get("columns", ()), *columns]))
        write_record(workdir, record)
    summary = _summarize(list(request.models), record, workdir, prompts)
    if summary is not None:
        _announce(summary, console)
    console.say(f"page: {write_comparison(str(workdir.path), request.num_images)}")
    return summary


def _samplers(request: Request) -> dict[str, ImageSampler]:
    """A sampler of every model that is to draw; they share the models that are the same."""
    if not request.draw:
        return {}
    pipelines = PipelineCache()
    samplers = {}
    for name, source in request.models.items():
        samplers[name] = ImageSampler(source, request.settings, pipelines)
    return samplers


def _check_folders(
    request: Request,
    workdir: Workdir,
    samplers: Mapping[str, ImageSampler],
    prompts: Sequence[Prompt],
) -> None:
    """Raises InputError where a model's folder holds other images, or lacks some that are not to be drawn."""
    texts = [prompt.text for prompt in prompts]
    drawn = {}
    for name in request.models:
        folder = ImageFolder(workdir.path / name)
        if name in samplers:
            # Images may be missing here: they are drawn next.
            folder.check(samplers[name].plan(), texts, partial=True)
            continue
        missing = folder.missing(len(prompts))
        if missing:
            raise InputError(
                f"--skip_generation: expected {len(prompts)} images of {name!r} in {folder.path}; "
                f"received {len(prompts) - len(missing)}, without {folder.file(missing[0]).name}"
            )
        record = folder.record() or {}
        drawn[name] = record.get("settings", {})
        folder.check(drawn[name], texts)
    # Images that are drawn now are alike; those of several earlier calls may not be.
    if drawn:
        check_alike(drawn)


def _announce_settings(shared: SharedSettings, console: Console) -> None:
    """Prints how all models are drawn, and for which of them that is not how they were made."""
    settings = shared.settings
    console.say(
        f"all models: {shared.size} px, {settings.max_sequence_length} text tokens, "
        f"{settings.num_steps} steps of {settings.solver}, guidance {settings.guidance:g}, "
        f"{settings.dtype}{_computed(settings)}; size: {shared.origins['size']}"
    )
    for name, size in shared.native_sizes.items():
        console.say(f"{name}: its own size is {size} px")


def _computed(settings: SamplingSettings) -> str:
    """How a run has its networks computed beyond what a plain model says, in words; empty for nothing."""
    words = ""
    if settings.stream_dtype not in (None, "compute", settings.dtype):
        words += f", streams {settings.stream_dtype}"
    if settings.integer_timesteps:
        words += ", whole timesteps"
    return words


def _announce_scoring(
    request: Request, samplers: Mapping[str, ImageSampler], console: Console
) -> None:
    """Says which runs trained on scores by other rules of OCR and GenEval than those that score here."""
    if not request.score or request.upstream_scoring:
        return
    for name, sampler in samplers.items():
        if sampler.run is not None and sampler.run.rewards.upstream_scoring:
            console.say(
                f"{name}: its run scored OCR and GenEval by upstream's rules, here the published ones score; "
                "--upstream_scoring follows the run"
            )


def _draw(
    request: Request,
    workdir: Workdir,
    samplers: Mapping[str, ImageSampler],
    prompts: Sequence[Prompt],
    record: dict[str, Any],
    console: Console,
) -> None:
    """Draws what is missing, model by model, and notes in the record what drew it."""
    texts = [prompt.text for prompt in prompts]
    for name, sampler in samplers.items():
        folder = ImageFolder(workdir.path / name)
        fill_folder(folder, sampler, texts, request.settings.batch, console, name)
        trained: list[str] = []
        if sampler.run is not None:
            trained += sampler.run.rewards.train
        record["models"][name] |= {"origin": sampler.origin, "trained": trained}
        # Closed before the next model is read: two may not fit into memory.
        sampler.close()
        write_record(workdir, record)


def add_scores(workdir: Workdir, scores: Mapping[str, Scores], num_images: int = 24) -> None:
    """Adds scores from elsewhere, such as people's votes, to an evaluation, and writes its summary and page anew.

    Args:
      workdir: the evaluation's folder.
      scores: by model, of all images; those of a reward that is there already are replaced.
      num_images: prompts shown on the page.

    Raises:
      InputError: it is no evaluation, or cannot be written to.
    """
    record, prompts = read_evaluation(workdir, "evaluation")
    with writable(workdir.path):
        for model, of_model in scores.items():
            file = ScoreFile(workdir.path / model / "scores.jsonl")
            file.append(range(len(prompts)), prompts, of_model)
            file.finish(prompts)
    names = next(iter(scores.values())).names
    record["columns"] = list(dict.fromkeys([*record.get("columns", ()), *names]))
    write_record(workdir, record)
    _summarize(list(record["models"]), record, workdir, prompts)
    write_comparison(str(workdir.path), num_images)


def _summarize(
    models: Sequence[str], record: Mapping[str, Any], workdir: Workdir, prompts: Sequence[Prompt]
) -> dict[str, Any] | None:
    """Writes `summary.json` of the rewards that have looked at every image of every model (failures are counted)."""
    trained = [name for model in record["models"].values() for name in model.get("trained", ())]
    names = record.get("columns", ())
    files = {}
    complete = set(names)
    for model in models:
        files[model] = ScoreFile(workdir.path / model / "scores.jsonl")
        complete &= files[model].known(len(prompts))
    names = [name for name in names if name in complete]
    if not names:
        return None
    scores = {model: file.scores(names, len(prompts)) for model, file in files.items()}
    summary = compare(scores, prompts, trained)
    with writable(workdir.path):
        workdir.write_json("summary.json", summary)
    return summary


def _announce(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the means of every reward and model."""
    console.say("\nmeans with 95 % bootstrap intervals over prompts:")
    console.table(_rows(summary), ("reward", *summary["scores"]))


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of means: rewards, GenEval's tags, and what they come to."""
    models = list(summary["scores"])
    rows: list[tuple[str, ...]] = []
    for name in summary["scores"][models[0]]:
        cells = [_mean_with_interval(summary["scores"][model][name]) for model in models]
        rows.append((name, *cells))
    for name, by_model in summary["geneval"].items():
        cells = [shown(by_model[model]["overall"]["mean"]) for model in models]
        rows.append((f"{name}, mean of tags", *cells))
    # Of two models the z-scores are +1 and -1 whatever the scores are.
    if len(models) >= COMPOSITE_MODELS:
        cells = [f"{summary['composite'][model]:+.3f}" for model in models]
        rows.append(("composite (mean z-score)", *cells))
    for which, by_model in summary["joint"].items():
        rows += _joint_rows(which, by_model, models)
    return rows


def _joint_rows(
    which: str, by_model: Mapping[str, Any], models: Sequence[str]
) -> list[tuple[str, ...]]:
    """Rows of the shares of images above, and below, the first model's on all rewards of a set at once."""
    rows = []
    for rate, words in (("domination", "images above"), ("collapse", "images below")):
        # The first model is what the others are compared with.
        cells = ["-"]
        for model in models[1:]:
            share = by_model[model][rate]
            cell = f"{share['mean']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
            cells.append(cell if by_model[model]["count"] else "-")
        if by_model:
            rows.append((f"{words} {models[0]} on {which} rewards", *cells))
    return rows


def _mean_with_interval(entry: Mapping[str, Any]) -> str:
    """A mean and its interval; a dash where no image has a valid score."""
    if not entry["count"]:
        return "-"
    return f"{shown(entry['mean'])} ({entry['low']:.4f} to {entry['high']:.4f})"
