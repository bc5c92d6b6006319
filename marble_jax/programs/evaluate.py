"""Several models on the same prompts and seeds: images, scores, a summary and a page that compares them.

    OUT/evaluation.json      what was asked for
    OUT/prompts.jsonl        prompt i with its source and metadata
    OUT/MODEL/00000.png      image i of a model, and settings.json
    OUT/MODEL/scores.jsonl   its scores
    OUT/summary.json         means, intervals, gains, GenEval's tags, composite
    OUT/index.html           all of it to look at

Generation and scoring may run apart, on different machines; each goes on where a kill stopped it. Scores are those of
the 8-bit images on disk, so it does not matter when they are taken.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from marble_jax import platform
from marble_jax.console import Console, shown
from marble_jax.errors import InputError
from marble_jax.evaluation.comparison import compare
from marble_jax.evaluation.judgements import with_accuracy
from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.flow.policy_sampler import batches
from marble_jax.programs import build
from marble_jax.programs.sample import Models, Painter, Settings, Source, fill_album
from marble_jax.prompts.files import Prompt, read_file
from marble_jax.prompts.groups import shares
from marble_jax.report import write_comparison
from marble_jax.rewards.function import is_function
from marble_jax.rewards.registry import entries_of, load_rewards
from marble_jax.rewards.scorer import Scorer
from marble_jax.storage.files import location
from marble_jax.storage.images import ImageFolder, writable
from marble_jax.storage.workdir import Workdir, jsonable

POLICIES = ("base", "current", "rollout", "ema", "best")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Request:
    """What an evaluation is asked for.

    Attributes:
      models: by name, the first being the reference of gains.
      prompts: where from, see `read_prompts`.
      num_prompts: at most so many, in equal shares of the sources; 0: all.
      images: images of each prompt.
      rewards_path: directory with rewards.json, or "embedded".
      rewards: names; empty: all of the directory.
      settings: how images are drawn.
      draw: whether images are drawn; they are expected to be there otherwise.
      score: whether they are scored.
      num_workers: threads for host rewards.
      num_images: images of each model on the page.
      command: as it was called, for the record.
    """

    models: Mapping[str, Source]
    prompts: str
    num_prompts: int = 0
    images: int = 1
    rewards_path: str = build.EMBEDDED
    rewards: tuple[str, ...] = ()
    settings: Settings = Settings()
    draw: bool = True
    score: bool = True
    num_workers: int = 2
    num_images: int = 24
    command: str = ""


def parse_models(text: str) -> dict[str, Source]:
    """Models of `NAME=PLACE[:POLICY][+LORA[:weight]]...`, separated by commas.

    A PLACE is a diffusers-layout directory, a hub id or 'embedded', or the workdir of a training run with one of its
    policies (ema unless given). Without `NAME=` the last part of PLACE names the model.

    Raises:
      InputError: an empty or repeated name or place, or a policy of something that is no run.
    """
    found: dict[str, Source] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, given, rest = item.partition("=")
        place, *loras = (rest if given else item).split("+")
        where, _, policy = place.rpartition(":")
        if not where or policy not in POLICIES:
            where, policy = place, ""
        name = (
            name.strip()
            if given
            else re.sub(r"[^\w.-]+", "-", where.rstrip("/").rpartition("/")[2]).lstrip("-._")
        )
        if not _NAME.fullmatch(name):
            raise InputError(
                "--models: expected NAME=PLACE with a name of letters, digits, '.', '-' and '_'; "
                f"received {item!r}"
            )
        if name in found:
            raise InputError(f"--models: expected every name once; received {name!r} twice")
        if not where or not all(loras):
            raise InputError(f"--models: expected NAME=PLACE[:POLICY][+LORA]; received {item!r}")
        there = location("--models", where)
        run = (there / "config.json").exists() and not (there / "model_index.json").exists()
        if policy and not run:
            raise InputError(
                f"--models: expected a training run before ':{policy}'; received {where!r}"
            )
        found[name] = Source(
            model="" if run else where,
            workdir=where if run else "",
            policy=policy or "ema",
            loras=",".join(loras),
        )
    if not found:
        raise InputError("--models: expected at least one NAME=PLACE; received none")
    return found


def read_prompts(text: str, num_prompts: int = 0, images: int = 1) -> list[Prompt]:
    """The prompts of an evaluation, each repeated for its images.

    Args:
      text: files (one prompt a line, or GenEval's `.jsonl`) or directories with SOURCE/test files, separated by commas;
        or 'embedded' or 'generated'.
      num_prompts: at most so many, in equal shares of the sources, evenly from each; 0: all.
      images: images of each prompt.

    Raises:
      InputError: no prompt, or a malformed file.
    """
    by_source: dict[str, list[Prompt]] = {}
    for place in filter(None, (part.strip() for part in text.split(","))):
        if place not in (build.EMBEDDED, "generated") and Path(place).is_file():
            prompts = read_file(place)
            by_source.setdefault(prompts[0].source, []).extend(prompts)
        else:
            for source, prompts in build.read_prompts(place, "test").items():
                by_source.setdefault(source, []).extend(prompts)
    if not by_source:
        raise InputError(
            "--prompts: expected a file, a directory, 'embedded' or 'generated'; received none"
        )
    if num_prompts:
        counts = shares(sorted(by_source), num_prompts)
        # Not the first ones: files come sorted by kind.
        by_source = {
            name: [by_source[name][i] for i in _spread(len(by_source[name]), count)]
            for name, count in counts.items()
        }
    return [p for name in sorted(by_source) for p in by_source[name] for _ in range(images)]


def _spread(total: int, count: int) -> list[int]:
    """`count` indices (all, if there are fewer) evenly from `total`."""
    return [i * total // min(count, total) for i in range(min(count, total))]


def evaluate(request: Request, out: str) -> dict[str, Any] | None:
    """Draws, scores and compares; returns the summary, or None where scores are still missing.

    Raises:
      InputError: bad input, before anything is written; or images or scores that are missing.
    """
    platform.keep_compilations()
    console, place = Console(), Workdir(out, "--out")
    prompts = read_prompts(request.prompts, request.num_prompts, request.images)
    entries = _rewards(request) if request.score else {}
    models = Models()
    painters = (
        {name: Painter(source, request.settings, models) for name, source in request.models.items()}
        if request.draw
        else {}
    )
    record = _record(request, place, prompts, entries)
    for name in () if request.draw else request.models:
        _all_there(ImageFolder(place.path / name), name, prompts)
    for name, painter in painters.items():
        ImageFolder(place.path / name).check(
            painter.plan(), [p.text for p in prompts], partial=True
        )
    with writable(place.path):
        place.write_json("evaluation.json", record)
        if not (place.path / "prompts.jsonl").exists():
            place.write_text("prompts.jsonl", "".join(_line(p) for p in prompts))
    for name, painter in painters.items():
        fill_album(
            ImageFolder(place.path / name),
            painter,
            [p.text for p in prompts],
            request.settings.batch,
            console,
            name,
        )
        record["models"][name] |= {"origin": painter.origin, "trained": _trained(painter)}
        painter.close()
        with writable(place.path):
            place.write_json("evaluation.json", record)
    del painters, models  # the memory is the rewards' now
    if request.score:
        record["columns"] = list(
            dict.fromkeys([*record.get("columns", ()), *_score(request, place, prompts, console)])
        )
        with writable(place.path):
            place.write_json("evaluation.json", record)
    found = _summarise(list(request.models), record.get("columns", ()), place, prompts)
    if found is not None:
        _announce(found, console)
    console.say(f"page: {write_comparison(str(place.path), request.num_images)}")
    return found


def _rewards(request: Request) -> dict[str, Any]:
    """The entries of the rewards asked for."""
    path = build.place_of(request.rewards_path, "rewards")
    entries = {} if request.rewards and all(map(is_function, request.rewards)) else entries_of(path)
    names = request.rewards or tuple(entries)
    # What has no entry is refused by the catalogue now, not after hours of drawing, unless it is known there.
    load_rewards(path, [name for name in names if name not in entries], request.num_workers)
    return {name: entries.get(name, {}) | {"path": str(path)} for name in names}


def _record(
    request: Request, place: Workdir, prompts: Sequence[Prompt], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """`evaluation.json`, with what earlier calls put there; refuses another evaluation's place."""
    file, listed = place.path / "evaluation.json", place.path / "prompts.jsonl"
    there: dict[str, Any] = {}
    if file.exists():
        try:
            there = json.loads(file.read_text())
        except ValueError:
            there = {}
        if not isinstance(there.get("models"), dict):
            raise InputError(
                f"{file}: expected the record of an evaluation; received something else"
            )
        lines = listed.read_text().splitlines() if listed.exists() else []
        for i, (own, given) in enumerate(zip(lines, map(_line, prompts))):
            if own != given.rstrip("\n"):
                raise InputError(
                    f"--out: {place.path} holds an evaluation of other prompts: line {i + 1} of "
                    f"prompts.jsonl: expected {own[:80]}; received {given.strip()[:80]}"
                )
        if lines and len(lines) != len(prompts):
            raise InputError(
                f"--out: {place.path} holds an evaluation of other prompts: expected {len(lines)} "
                f"images; received {len(prompts)}"
            )
    elif place.path.exists() and (not place.path.is_dir() or any(place.path.iterdir())):
        raise InputError(
            f"--out: expected a new folder or one made by evaluate; received {place.path}"
        )
    rewards = there.get("rewards", {})
    for name, entry in entries.items():
        if name in rewards and rewards[name] != jsonable(entry):
            raise InputError(
                f"--rewards_path: expected the {name!r} that {place.path} was scored with "
                f"({rewards[name]}); received {jsonable(entry)}"
            )
    models = there.get("models", {})
    for name, source in request.models.items():
        own = models.get(name, {}).get("source")
        given = dataclasses.asdict(source)
        if own is not None and own != given:
            raise InputError(
                f"--models: expected the {name!r} of {place.path} ({own}); received {given}"
            )
    ordered = {
        name: models.get(name, {}) | {"source": dataclasses.asdict(source)}
        for name, source in request.models.items()
    }
    return there | {
        "models": ordered,
        "rewards": {**rewards, **entries},
        "prompts": request.prompts,
        "images": request.images,
        "num_images": len(prompts),
        "command": request.command,
        "settings": there.get("settings", {})
        if not request.draw
        else jsonable(dataclasses.asdict(request.settings)),
    }


def _trained(painter: Painter) -> list[str]:
    return [] if painter.config is None else list(painter.config.rewards.train)


def _all_there(album: ImageFolder, name: str, prompts: Sequence[Prompt]) -> None:
    missing = album.missing(len(prompts))
    if missing:
        raise InputError(
            f"--skip_generation: expected {len(prompts)} images of {name!r} in {album.path}; received "
            f"{len(prompts) - len(missing)}, without {album.file(missing[0]).name}"
        )
    album.check((album.record() or {}).get("settings", {}), [p.text for p in prompts])


def _score(
    request: Request, place: Workdir, prompts: Sequence[Prompt], console: Console
) -> list[str]:
    """Scores what lacks a score; returns the names of all columns."""
    wanted = request.rewards or tuple(entries_of(build.place_of(request.rewards_path, "rewards")))
    rewards = with_accuracy(
        load_rewards(build.place_of(request.rewards_path, "rewards"), wanted, request.num_workers)
    )
    names = [r.name for r in rewards]
    for model in request.models:
        album, file = (
            ImageFolder(place.path / model),
            ScoreFile(place.path / model / "scores.jsonl"),
        )
        lacking, todo = file.missing(names, len(prompts))
        console.say(
            f"{model}: {len(todo)} images to score" + (f" by {', '.join(lacking)}" if todo else "")
        )
        if not todo:
            continue
        scorer = Scorer([r for r in rewards if r.name in lacking], request.num_workers, "retry")
        size = min(request.settings.batch, len(todo))
        under_way: deque[tuple[list[int], Any]] = deque()

        def collect(file=file, under_way=under_way) -> int:
            chosen, pending = under_way.popleft()
            with writable(place.path):
                file.append(chosen, [prompts[i] for i in chosen], pending.result())
            return len(chosen)

        try:
            with console.bar(len(todo), f"scores of {model}", "img") as bar:
                for rows in batches(len(todo), size):
                    index = [todo[r] for r in rows]
                    images = np.stack([album.read(i) for i in index]).astype(np.float32) / 255
                    under_way.append(
                        (
                            list(dict.fromkeys(index)),
                            scorer.submit(jnp.asarray(images), [prompts[i] for i in index]),
                        )
                    )
                    if len(under_way) > 2:
                        bar.update(collect())
                while under_way:
                    bar.update(collect())
        finally:
            scorer.close()
        with writable(place.path):
            file.finish(prompts)
    return names


def _summarise(
    models: Sequence[str], names: Sequence[str], place: Workdir, prompts: Sequence[Prompt]
) -> dict[str, Any] | None:
    """Writes `summary.json` of the rewards that have looked at every image of every model (failures are counted)."""
    files = {model: ScoreFile(place.path / model / "scores.jsonl") for model in models}
    known = set.intersection(*(file.known(len(prompts)) for file in files.values()))
    names = [name for name in names if name in known]
    if not names:
        return None
    scores = {model: file.scores(names, len(prompts)) for model, file in files.items()}
    found = compare(scores, prompts)
    with writable(place.path):
        place.write_json("summary.json", found)
    return found


def _announce(found: Mapping[str, Any], console: Console) -> None:
    models = list(found["scores"])
    rows = []
    for name in found["scores"][models[0]]:
        cells = []
        for model in models:
            entry = found["scores"][model][name]
            cells.append(
                "-"
                if not entry["count"]
                else f"{shown(entry['mean'])} ({entry['low']:.4f} to {entry['high']:.4f})"
            )
        rows.append((name, *cells))
    for name, by_model in found["geneval"].items():
        rows.append(
            (f"{name}, mean of tags", *(shown(by_model[m]["overall"]["mean"]) for m in models))
        )
    if len(models) > 1:
        rows.append(
            ("composite (mean z-score)", *(f"{found['composite'][m]:+.3f}" for m in models))
        )
    console.say("\nmeans with 95 % bootstrap intervals over prompts:")
    console.table(rows, ("reward", *models))


def _line(prompt: Prompt) -> str:
    return (
        json.dumps(
            {"prompt": prompt.text, "source": prompt.source, "metadata": dict(prompt.metadata)}
        )
        + "\n"
    )
