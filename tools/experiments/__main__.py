"""Trains the embedded pipeline with many methods and seeds, and compares what they come to.

    python -m tools.experiments --suite=main --seeds=3 --steps=60 --jobs=2 --out=runs/experiments

The same command again skips what is finished, in --out or on record in --results, and goes on with the rest. `--help`
prints the options.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from marble_jax.cli.help import verb_help
from marble_jax.cli.kinds import Place, Switch, Whole, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.cli.parsing import parse
from marble_jax.errors import InputError
from marble_jax.storage.files import write_whole
from tools.experiments import fronts, results, runner, table
from tools.experiments.methods import FILES, VIDEO, Job, choose, jobs, pool_of

VERB = Verb(
    about="Trains the embedded pipeline with many methods and seeds, and compares what they come to.",
    usage=("[options] [--config=FILE] [--config.key=value ...]",),
    options=(
        Option(
            "suite",
            "which methods: main, sweeps, ablations, balancers, objectives, all of these, or video, which is of the "
            "video pipeline",
            default="main",
        ),
        Option(
            "methods",
            "only these, whatever the suite (of the video pipeline with --suite=video)",
            Words(),
            "A,B",
        ),
        Option("seeds", "runs a method, seeds 1, 2, ...", Whole(1), default="3"),
        Option(
            "steps",
            "optimiser steps of every run (those of the configuration file)",
            Whole(1),
            "N",
        ),
        Option(
            "jobs",
            "runs at a time, 1 or 2, each on its share of the cores",
            Whole(1),
            default="1",
        ),
        Option(
            "out",
            "the runs' folders, logs/, and unless --results says otherwise what they come to",
            Place(),
            default="runs/experiments",
        ),
        Option(
            "results",
            "results.json, table.md and fronts.svg, of these methods and all others finished in --out; runs that "
            "results.json has already, with the same configuration, are not trained again",
            Place(),
            "DIR",
        ),
        Option(
            "pairs",
            f"rewards against each other in fronts.svg; {fronts.PAIRS} unless given, of the video pipeline "
            f"{fronts.VIDEO_PAIRS}",
        ),
        Option("list", "names the methods and their runs", Switch()),
        Option("dry_run", "prints the commands", Switch()),
        Option("collect", "trains nothing: results of what is finished", Switch()),
    ),
    config=True,
    notes="--config=FILE is the file with the presets, configs/embedded.py (of the suite video "
    "configs/embedded_video.py) unless given; keys change in all runs.",
)


def main(argv: Sequence[str], train: Sequence[str] = runner.TRAIN) -> int:
    """Returns the exit status: 0 all runs are there, 1 some are not, 2 bad input."""
    if any(a in ("-h", "--help") for a in argv):
        print(
            verb_help("experiments", VERB).replace(
                "marble-jax experiments", "python -m tools.experiments"
            )
        )
        return 0
    try:
        return _main(argv, train)
    except InputError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2


def _main(argv: Sequence[str], train: Sequence[str]) -> int:
    options = parse("experiments", VERB, argv)
    files = [a.split("=", 1)[1] for a in options.config if a.startswith("--config=")]
    overrides = [a for a in options.config if not a.startswith("--config=")]
    if options.steps:
        overrides.append(f"--config.training.num_steps={options.steps}")
    num_jobs = options.jobs
    if num_jobs > 2:
        raise InputError(f"--jobs: expected 1 or 2; received {num_jobs}")
    methods = choose(options.suite, options.methods)
    out = Path(options.out)
    target = Path(options.results) if options.results else out
    file = files[-1] if files else FILES[methods[0].suite]
    pool = pool_of(methods[0].suite)
    on_record = target / "results.json"
    # Seeds that nobody asks for now stay on record.
    num_seeds = max(options.seeds, results.last_seed(on_record))
    everything = jobs(pool, num_seeds, out, file, overrides)
    names = {method.name for method in methods}
    planned = [job for job in everything if job.seed <= options.seeds and names & set(job.methods)]
    config = planned[0].config
    usual = fronts.VIDEO_PAIRS if pool[0].suite == VIDEO else fronts.PAIRS
    pairs = fronts.parse_pairs(
        options.pairs or usual, [*config["rewards.train"], *config["rewards.heldout"]]
    )
    if options.list:
        for suite in FILES:
            for method in (m for m in pool if m.suite == suite and m in methods):
                own = ", ".join(job.name for job in planned if method.name in job.methods)
                print(f"{suite:10} {method.name:16} {method.title:52} {own}")
        return 0
    kept, others = results.kept_results(on_record, everything)
    if options.dry_run:
        for job in planned:
            done = job.name in kept or runner.finished(job)
            print(("# finished: " if done else "") + shlex.join([*train, *job.arguments]))
        return 0
    if kept:
        _say(f"{len(kept)} runs are on record in {on_record}")
    if others:
        _say(f"runs in {on_record} of other configurations, left out: {', '.join(others)}")
    failed = []
    if not options.collect:
        missing = [job for job in planned if job.name not in kept]
        failed = runner.run(missing, num_jobs, out / "logs", train, say=_say)
    there = [job for job in everything if job in planned or job.name in kept or _is_there(job)]
    command = shlex.join(["python", "-m", "tools.experiments", *argv])
    found = results.collect(there, command, kept)
    results.write_json(on_record, found)
    write_whole(target / "table.md", table.markdown(found))
    written = ["results.json", "table.md"]
    if (main_rows := table.rows(found, VIDEO if pool[0].suite == VIDEO else "main")) and pairs:
        fronts.draw(main_rows, table.columns(found), pairs, target / "fronts.svg")
        written.append("fronts.svg")
    _say(f"{len(found['runs'])} of {len(there)} runs in {target}: {', '.join(written)}")
    if failed:
        _say(f"not finished: {', '.join(failed)}; the same command goes on with them")
    return 1 if failed else 0


def _is_there(job: Job) -> bool:
    """Whether a run that nobody asked for is finished; one under its name with other settings is another run."""
    try:
        return runner.finished(job)
    except InputError:
        return False


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
