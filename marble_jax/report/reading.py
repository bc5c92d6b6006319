"""Reads a training workdir forgivingly: a run that has just begun, or that is writing right now, is a valid run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.report import forms
from marble_jax.report.forms import well_formed
from marble_jax.report.intervals import number
from marble_jax.report.records import Records, Strip, step_of
from marble_jax.storage.files import location
from marble_jax.validation import parse_json

_STEP_DIRECTORY = re.compile(r"^step_([0-9]{1,15})$")
_PREFIXES_OF_REWARDS = ("rollout/score_mean/", "harmonize/alpha/")
_SHOWN_LINES = 5
SCORES = "scores.json"
"""Of the images beside it, in the order of `prompts.json`."""
MOST_STEPS = 2**53
"""Step of a record at most: what every JSON reader holds exactly."""


def parsed_json(path: epath.Path) -> tuple[Any, str]:
    """Returns a file's JSON value and what kept it from being read.

    Args:
      path: the file; it need not exist.

    Returns:
      The value, None if there is none, and a sentence without its full stop, empty if nothing went wrong.
    """
    if not path.exists():
        return None, ""
    try:
        # A damaged byte costs a character of one text, not the whole file.
        text = path.read_bytes().decode("utf-8", "replace")
        return parse_json(text, path.name, lenient=True), ""
    except InputError as error:
        return None, f"{path.name} could not be read ({str(error).removeprefix(f'{path.name}: ')})"
    except OSError as error:
        return None, f"{path.name} could not be read ({type(error).__name__})"


def _json_or_none(path: epath.Path, flaws: list[str]) -> Any:
    value, problem = parsed_json(path)
    if problem:
        flaws.append(f"{problem}; the page goes on without it.")
    return value


def _json_object(path: epath.Path, flaws: list[str]) -> dict[str, Any]:
    """Returns the file's JSON object; an empty one where there is none."""
    value = _json_or_none(path, flaws)
    if not isinstance(value, dict):
        return {}
    return value


def _step_record(line: str) -> dict[str, Any] | None:
    """Returns a line's object if it holds a step, else None."""
    try:
        record = parse_json(line, "record", lenient=True)
    except InputError:
        return None
    if not isinstance(record, dict):
        return None
    step = number(record.get("step"))
    # No run takes more steps than an index of an array can count, and NaN is no step at all.
    if not 0 <= step <= MOST_STEPS or step != int(step):
        return None
    return record


def _step_records(path: epath.Path, flaws: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file that hold a step."""
    if not path.exists():
        return []
    records, damaged = [], []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _step_record(line)
        if record is None:
            damaged.append(line_number)
        else:
            records.append(record)
    flaws.extend(_damage(path.name, damaged, len(lines)))
    return records


def _damage(name: str, line_numbers: list[int], num_lines: int) -> list[str]:
    """Returns sentences on the lines of a file that could not be read."""
    sentences = []
    lost = line_numbers
    # A last line cut short is normal while a run writes; one further up was lost for good.
    if line_numbers and line_numbers[-1] == num_lines:
        lost = line_numbers[:-1]
        sentences.append(
            f"The last line of {name} is incomplete, as while a run is writing; it was left out."
        )
    if lost:
        shown = ", ".join(map(str, lost[:_SHOWN_LINES]))
        if len(lost) > _SHOWN_LINES:
            shown += ", ..."
        sentences.append(f"{name}: {len(lost)} unreadable line(s) left out (line {shown}).")
    return sentences


def _step_directories(samples: epath.Path) -> list[tuple[int, epath.Path, set[str]]]:
    """Returns step, path and file names of every `step_*` directory, in increasing step."""
    directories = []
    for child in samples.iterdir():
        match = _STEP_DIRECTORY.match(child.name)
        if match and child.is_dir():
            # Listed once: asking a bucket for every single image would take a request each.
            names = {file.name for file in child.iterdir()}
            directories.append((int(match.group(1)), child, names))
    directories.sort(key=lambda entry: entry[0])
    return directories


def _strip(
    index: int,
    entry: Any,
    directories: list[tuple[int, epath.Path, set[str]]],
    scores: dict[int, list[Any]],
) -> Strip:
    """Returns the prompt at `index` of `prompts.json` with its images."""
    recorded = entry if isinstance(entry, dict) else {"prompt": entry}
    seed = recorded.get("seed")
    if not isinstance(seed, int):
        seed = None
    file_name = f"{index:02d}.png"
    images = []
    for step, directory, names in directories:
        if file_name in names:
            images.append((step, directory / file_name))
    of_image = {}
    for step, entries in scores.items():
        if index < len(entries) and isinstance(entries[index], dict):
            of_image[step] = entries[index]
    return Strip(str(recorded.get("prompt", "")), seed, tuple(images), of_image)


def _strips(samples: epath.Path, flaws: list[str]) -> tuple[Strip, ...]:
    """Returns the fixed prompts with their images; none before the first evaluation."""
    if not samples.is_dir():
        return ()
    prompts = _json_or_none(samples / "prompts.json", flaws)
    if not isinstance(prompts, list):
        return ()
    directories = _step_directories(samples)
    scores = {}
    for step, directory, names in directories:
        # Runs of earlier versions have none.
        if SCORES in names:
            entries = _json_or_none(directory / SCORES, flaws)
            scores[step] = entries if isinstance(entries, list) else []
    return tuple(_strip(index, entry, directories, scores) for index, entry in enumerate(prompts))


def _rewards_in_metrics(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Returns the rewards that the metric keys name, in the order they appear."""
    names: dict[str, None] = {}
    for row in rows:
        for key in row:
            for prefix in _PREFIXES_OF_REWARDS:
                if key.startswith(prefix):
                    names.setdefault(key.removeprefix(prefix))
    return list(names)


def _names(recorded: Any) -> list[str]:
    """Returns a recorded list of names; an empty one for null."""
    if not recorded:
        return []
    return [str(name) for name in recorded]


def _reward_names(
    run: dict[str, Any], rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the trained and the held-out rewards; where `run.json` is silent, from metrics and evaluations."""
    rewards = _names(run.get("rewards"))
    if not rewards:
        rewards = _rewards_in_metrics(rows)
    # A dict keeps the order of the run, which fixes the colours, and holds every name once.
    heldout = dict.fromkeys(_names(run.get("heldout_rewards")))
    for evaluation in evaluations:
        heldout.update(dict.fromkeys(_names(evaluation.get("scores"))))
    # Evaluations score the trained rewards too.
    for name in rewards:
        heldout.pop(name, None)
    return tuple(dict.fromkeys(rewards)), tuple(heldout)


def _run(workdir: epath.Path, flaws: list[str]) -> dict[str, Any]:
    """Returns `run.json`, with the configuration from `config.json` where it has none."""
    run = well_formed(_json_object(workdir / "run.json", flaws), forms.RUN, "run.json", flaws)
    if not run.get("config"):
        config = _json_or_none(workdir / "config.json", flaws)
        if isinstance(config, dict):
            run["config"] = config
    return run


def _metrics(workdir: epath.Path, flaws: list[str]) -> list[dict[str, Any]]:
    # A resumed run repeats the steps since its checkpoint: the later line is the one that counts.
    by_step = {}
    for row in _step_records(workdir / "metrics.jsonl", flaws):
        by_step[step_of(row)] = row
    return [by_step[step] for step in sorted(by_step)]


def _evaluations(workdir: epath.Path, flaws: list[str]) -> list[dict[str, Any]]:
    # One step may hold evaluations of several policies; of one policy the later line counts, as above.
    by_step_and_policy = {}
    for record in _step_records(workdir / "evaluation.jsonl", flaws):
        where = f"evaluation.jsonl, step {step_of(record)}"
        evaluation = well_formed(record, forms.EVALUATION, where, flaws)
        key = (step_of(evaluation), str(evaluation.get("policy")))
        by_step_and_policy[key] = evaluation
    return [by_step_and_policy[key] for key in sorted(by_step_and_policy)]


def _summaries(directory: epath.Path, flaws: list[str]) -> list[dict[str, Any]]:
    """Returns the summaries of other runs, in the order of their file names.

    Runs of one preset have one name: such runs are told apart by their files, which are called as their workdirs.
    """
    if not directory.is_dir():
        return []
    by_file = {}
    for file in sorted(directory.glob("*.json")):
        summary = _json_or_none(file, flaws)
        if isinstance(summary, dict):
            by_file[file.stem] = well_formed(summary, forms.SUMMARY, f"compare/{file.name}", flaws)
    counts = Counter(str(summary.get("name", "unnamed")) for summary in by_file.values())
    summaries = []
    for stem, summary in by_file.items():
        name = str(summary.get("name", "unnamed"))
        if counts[name] > 1:
            summary = summary | {"name": f"{name} ({stem})"}
        summaries.append(summary)
    return summaries


def _measurements(workdir: epath.Path, flaws: list[str]) -> list[dict[str, Any]]:
    """Returns what `tools.harmony` measured at the run's policies; none where it was not asked to."""
    measurements = _json_object(workdir / "harmony.json", flaws).get("measurements")
    if not isinstance(measurements, list):
        return []
    return [entry for entry in measurements if isinstance(entry, dict)]


def read_records(workdir: epath.PathLike) -> Records:
    """Reads what a training workdir holds so far.

    Args:
      workdir: a local or remote (`gs://`) directory; any of its records may be missing, partial or cut short.

    Raises:
      InputError: the directory does not exist.
    """
    root = location("report workdir", workdir)
    if not root.is_dir():
        raise InputError(
            f"report workdir: expected the directory of a training run; received {str(root)!r}"
        )
    flaws: list[str] = []
    run = _run(root, flaws)
    rows = _metrics(root, flaws)
    evaluations = _evaluations(root, flaws)
    compare = _summaries(root / "compare", flaws)
    strips = _strips(root / "samples", flaws)
    measurements = _measurements(root, flaws)
    rewards, heldout = _reward_names(run, rows, evaluations)
    return Records(
        workdir=root,
        run=run,
        rows=tuple(rows),
        evaluations=tuple(evaluations),
        strips=strips,
        compare=tuple(compare),
        rewards=rewards,
        heldout=heldout,
        flaws=tuple(flaws),
        harmony=tuple(measurements),
    )
