"""`marble-jax reward check` scores golden images with every reward; `marble-jax reward serve` puts rewards online."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marble_jax.cli.options import boolean, load_settings, number, split
from marble_jax.errors import InputError, one_of

CHECK = {"path": "", "rewards": "", "size": "", "batch": "16", "timeout": "120", "write": "false"}
SERVE = {
    "path": "",
    "rewards": "",
    "host": "127.0.0.1",
    "port": "8810",
    "token": "",
    "token_file": "",
    "workers": "2",
    "timeout": "300",
    "max_mb": "64",
    "max_images": "256",
    "max_side": "2048",
}


def help_text() -> str:
    return """usage: marble-jax reward check (--config=FILE[:preset] | --path=DIR) [--rewards=a,b]
       marble-jax reward serve (--config=FILE[:preset] | --path=DIR) [--rewards=a,b] [--host=127.0.0.1] [--port=8810]

  --path=DIR         directory with rewards.json, or 'embedded'
  --rewards=a,b      rewards of it, or functions as module:function; all of them by default

check: loads each reward, scores images whose scores (or whose order) are known, measures speed; 2 if one is broken
  --size=PIXELS      of the golden images (the run's own with --config; 64 for 'embedded', else 512)
  --batch=16         images at once when the speed is measured
  --timeout=120      seconds a call may take
  --write            record the scores as the expected ones, in golden.json beside rewards.json

serve: answers POST /score and GET /health; the format is described in marble_jax/rewards/http/protocol.py
  --host=127.0.0.1 --port=8810   any other than a loopback address needs a token
  --token_file=FILE  (or --token=TEXT, which other users of this machine can see) clients have to know it
  --workers=2        requests scored at the same time
  --timeout=300      seconds a request's scores may take
  --max_mb=64 --max_images=256 --max_side=2048   of a request; pixels of an image's side"""


def run(argv: Sequence[str]) -> int:
    action, *rest = argv or [""]
    one_of("reward", action, ("check", "serve"))
    values, config_args = split(rest, CHECK if action == "check" else SERVE)
    settings = load_settings(config_args) if config_args else None
    if (settings is None) == (not values["path"]):
        raise InputError(
            "reward: expected either --config or --path; received "
            f"{'neither' if settings is None else 'both'}"
        )
    return (_check if action == "check" else _serve)(values, settings)


def _load(
    values: dict[str, str], settings: Any, one_by_one: bool = False
) -> tuple[list[Any], Path | None, dict]:
    """The rewards that were asked for, their directory, and why each of the others does not load."""
    from marble_jax.programs.locations import resolve_path
    from marble_jax.rewards.function import is_function
    from marble_jax.rewards.registry import entries_of, load_rewards

    names = [name for name in values["rewards"].split(",") if name]
    if settings is not None:
        names = names or [*settings.rewards.train, *settings.rewards.heldout]
    path = values["path"] if settings is None else settings.rewards.path
    functions_only = bool(names) and all(is_function(name) for name in names)
    directory = resolve_path(path, "rewards") if path or not functions_only else None
    names = names or list(entries_of(directory))
    try:
        return load_rewards(directory, names), directory, {}
    except InputError as error:
        if not one_by_one or len(names) == 1:
            raise
        rewards, problems = [], {"": str(error)}
    for name in names:
        try:
            rewards += load_rewards(directory, [name])
        except InputError as error:
            problems[name] = str(error)
    if not rewards:
        raise InputError(problems[""])
    del problems[""]
    return rewards, directory, problems


def _check(values: dict[str, str], settings: Any) -> int:
    size = number(values, "size", int, 16) if values["size"] else 0
    batch, timeout = number(values, "batch", int, 1), number(values, "timeout", float, 0.1)
    write = boolean("write", values["write"])
    from marble_jax import platform
    from marble_jax.console import Console
    from marble_jax.rewards import checks, throughput
    from marble_jax.rewards.toy_world import golden_images

    platform.keep_compilations()
    console = Console()
    rewards, directory, problems = _load(values, settings, one_by_one=True)
    embedded = (values["path"] if settings is None else settings.rewards.path) == "embedded"
    size = size or (settings.model.height if settings is not None else 64 if embedded else 512)
    expected = {} if write else golden_images.read_expected(directory, size)
    findings = checks.run_checks(rewards, size, expected, timeout)
    rows = []
    for reward, finding in zip(rewards, findings):
        rate = throughput.throughput(reward, size, batch, timeout)
        weights = throughput.weight_bytes(reward) / 1e6
        rows.append(
            (
                finding.name,
                finding.status,
                f"{finding.mean(True):.4g}",
                f"{finding.mean(False):.4g}",
                f"{rate:.3g}",
                f"{weights:.3g}" if weights else "-",
                finding.kind,
                finding.note,
            )
        )
    rows += [
        (name, "not loaded", "-", "-", "-", "-", "-", problem) for name, problem in problems.items()
    ]
    console.say(
        f"{len(rewards) + len(problems)} rewards on {2 * golden_images.COUNT} golden images of {size} px "
        f"(own prompts, then each other's), speed in batches of {batch}; {throughput.peak_memory()}"
    )
    console.table(rows, ("reward", "status", "own", "other", "img/s", "weights MB", "runs on", ""))
    bad = [f"{f.name} ({f.status})" for f in findings if not f.passed] + [
        f"{n} (not loaded)" for n in problems
    ]
    if write and directory is not None:
        if any(f.status == "failed" for f in findings):
            raise InputError(f"--write: expected scores of every reward; received {', '.join(bad)}")
        file = golden_images.write_expected(directory, size, checks.recorded_scores(findings))
        console.say(f"expected scores: {file}")
    if bad:
        raise InputError(f"check: expected every reward to pass; received {', '.join(bad)}")
    return 0


def _serve(values: dict[str, str], settings: Any) -> int:
    port, workers = number(values, "port", int, 0), number(values, "workers", int, 1)
    limits = {
        "body": number(values, "max_mb", int, 1) * 10**6,
        "images": number(values, "max_images", int, 1),
        "side": number(values, "max_side", int, 1),
    }
    timeout = number(values, "timeout", float, 0.1)
    from marble_jax import platform
    from marble_jax.console import Console
    from marble_jax.rewards.http.access import read_token
    from marble_jax.rewards.http.connections import ServerOptions
    from marble_jax.rewards.http.images import Limits
    from marble_jax.rewards.http.server import RewardServer

    if values["token"] and values["token_file"]:
        raise InputError("serve: expected --token or --token_file; received both")
    token = values["token"] or read_token("server", "", values["token_file"])
    platform.keep_compilations()
    rewards, _, _ = _load(values, settings)
    options = ServerOptions(
        token=token, workers=workers, score_seconds=timeout, limits=Limits(**limits)
    )
    stop = threading.Event()
    before = {n: signal.signal(n, lambda *_: stop.set()) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        with RewardServer(rewards, values["host"], port, options) as server:
            Console().say(
                f"serving {', '.join(r.name for r in rewards)} at {server.url} "
                f"({'with' if token else 'without'} a token); Ctrl-C stops"
            )
            stop.wait()
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    return 0
