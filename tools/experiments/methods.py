"""What is compared: methods as presets of a configuration file with changes, and the runs they come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marble_jax.cli.configuration import load_config
from marble_jax.config import flatten
from marble_jax.errors import InputError, one_of
from marble_jax.storage.workdir import jsonable

SUITES = ("main", "sweeps", "ablations", "balancers", "objectives")
VIDEO = "video"
"""The suite of the video pipeline, whose presets and rewards are those of another file; not among "all"."""
FILES = dict.fromkeys(SUITES, "configs/embedded.py") | {VIDEO: "configs/embedded_video.py"}
"""Configuration files of the suites, unless another is asked for."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
      name: short, names the run's folder.
      title: what the table says.
      suite: one of FILES.
      preset: of the configuration file.
      changes: configuration keys that differ from the preset, as on the command line.
    """

    name: str
    title: str
    suite: str
    preset: str
    changes: tuple[tuple[str, str], ...] = ()


def _sweep(what: str, key: str, values: Sequence[str], title: str) -> tuple[Method, ...]:
    return tuple(
        Method(f"{what}_{v}", f"{title} {v}", "sweeps", "amortized", ((key, v),)) for v in values
    )


def _other_objectives(suite: str, before: str) -> tuple[Method, ...]:
    """Objectives besides DiffusionNFT, each on the sum of scores and with MARBLE; `before` their presets' names."""
    return tuple(
        Method(f"{before}{name}{behind}", f"{title}, {how}", suite, f"{name}{behind}")
        for name, title in (
            ("flow_grpo", "Flow-GRPO"),
            ("flow_grpo_fast", "Flow-GRPO-Fast"),
            ("grpo_guard", "GRPO-Guard"),
            ("awm", "advantage-weighted matching"),
        )
        for behind, how in (("", "weighted sum"), ("_marble", "MARBLE"))
    )


METHODS = (
    Method("exact", "MARBLE, exact", "main", "exact"),
    Method("amortized", "MARBLE, amortized", "main", "amortized"),
    Method("upstream", "MARBLE, upstream", "main", "upstream"),
    Method("weighted_sum", "weighted sum", "main", "weighted_sum"),
    Method("weighted_sum_raw", "weighted sum of raw scores", "main", "weighted_sum_raw"),
    Method("equal", "equal alpha", "main", "equal"),
    Method("upweighted", "weighted sum, specialists x 2", "main", "upweighted"),
    Method("gdpo", "GDPO", "main", "gdpo"),
    Method("dropout", "MARBLE, reward dropout", "main", "dropout"),
    Method("sequential", "sequential", "main", "sequential"),
    *(
        Method(f"only_{name}", f"only {name}", "main", f"only_{name}")
        for name in ("alignment", "preference", "aesthetic", "ocr", "geneval")
    ),
    # The paper's values (MARBLE, arXiv 2605.06507, ablations of N and rho), and 2, as these runs are short.
    *_sweep("refresh", "harmonize.refresh_every", ("2", "5", "10", "20"), "amortized, N ="),
    *_sweep("rho", "harmonize.rho", ("0.1", "0.3", "0.5", "0.7", "0.9"), "amortized, rho ="),
    Method(
        "unit_weights",
        "exact, every reward weight 1",
        "ablations",
        "exact",
        (("harmonize.reward_weights", ""),),
    ),
    Method(
        "raw_exact",
        "exact, without normalisation",
        "ablations",
        "exact",
        (("harmonize.normalize", "False"),),
    ),
    Method(
        "raw_amortized",
        "amortized, without normalisation",
        "ablations",
        "amortized",
        (("harmonize.normalize", "False"),),
    ),
    Method(
        "cleaned",
        "exact, cleaned of noise over 20 steps, alpha averaged",
        "ablations",
        "cleaned",
        (("harmonize.window", "20"),),
    ),
    Method(
        "cleaned_signal",
        "the same, on gradients of unit signal",
        "ablations",
        "cleaned",
        (("harmonize.window", "20"), ("harmonize.unit", "signal")),
    ),
    Method(
        "solve_micro",
        "a solve a step, on one micro-batch (upstream's step, N = 1)",
        "ablations",
        # The step alone is upstream's, so that nothing else differs from the row below.
        "exact",
        (("harmonize.mode", "upstream"), ("harmonize.refresh_every", "1")),
    ),
    Method("solve_batch", "a solve a step, on the whole batch (exact)", "ablations", "exact"),
    Method(
        "solve_smooth",
        "the same, alpha averaged over steps",
        "ablations",
        "exact",
        (("harmonize.smooth_exact", "True"),),
    ),
    *(
        Method(
            f"rollouts_{kind}",
            f"exact, products of rollouts in {kind}",
            "ablations",
            "exact",
            # Folded into weights of eight bits, the adapter would be rounded away.
            (("rollout.products", kind), ("rollout.merge_adapter", "False")),
        )
        for kind in ("int8", "fp8")
    ),
    # Rivals have no reward weights: beside them MARBLE is without, too.
    Method(
        "unweighted",
        "MARBLE, every reward weight 1",
        "balancers",
        "exact",
        (("harmonize.reward_weights", ""),),
    ),
    *(
        Method(
            name,
            title,
            "balancers",
            "exact",
            (("harmonize.balancer", name), ("harmonize.reward_weights", "")),
        )
        for name, title in (
            ("upgrad", "UPGrad"),
            ("pcgrad", "PCGrad"),
            ("cagrad", "CAGrad"),
            ("imtl", "IMTL-G"),
            ("nash", "Nash-MTL"),
        )
    ),
    # What the others are compared with; the runs are those of the main suite.
    Method("nft_marble", "DiffusionNFT, MARBLE", "objectives", "exact"),
    Method("nft", "DiffusionNFT, weighted sum", "objectives", "weighted_sum"),
    *_other_objectives("objectives", ""),
)


VIDEO_METHODS = (
    Method("video_marble", "MARBLE", VIDEO, ""),
    Method("video_weighted_sum", "weighted sum", VIDEO, "weighted_sum"),
    Method("video_equal", "equal alpha", VIDEO, "equal"),
    *(
        Method(f"video_only_{name}", f"only {name}", VIDEO, f"only_{name}")
        for name in ("motion", "smoothness", "ocr", "geneval", "colourfulness")
    ),
    *_other_objectives(VIDEO, "video_"),
)


def pool_of(suite: str) -> tuple[Method, ...]:
    """The methods that are compared with those of a suite: one configuration file's."""
    return VIDEO_METHODS if suite == VIDEO else METHODS


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
      name: of its folder, method and seed.
      methods: names of the methods whose run it is: several where their configurations are the same.
      seed: of the run.
      workdir: where it lives.
      config: flat configuration, as JSON knows it.
      arguments: of `marble-jax train`.
    """

    name: str
    methods: tuple[str, ...]
    seed: int
    workdir: Path
    config: dict[str, Any]
    arguments: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        return self.config["training.num_steps"]


def choose(suite: str, names: Sequence[str]) -> tuple[Method, ...]:
    """The methods of a suite ("all" for every one of images), or those named, in the order of their pool.

    Raises:
      InputError: an unknown suite or method.
    """
    one_of("--suite", suite, (*FILES, "all"))
    pool = pool_of(suite)
    for name in names:
        one_of("--methods", name, [m.name for m in pool])
    return tuple(m for m in pool if (m.name in names if names else suite in (m.suite, "all")))


def jobs(
    methods: Sequence[Method], num_seeds: int, out: Path, file: str, overrides: Sequence[str] = ()
) -> tuple[Job, ...]:
    """Every run that `methods` need, seed by seed, so that a part of them compares all methods.

    Methods with the same configuration share a run, under the name of the first of their pool that has it.

    Args:
      methods: what to compare.
      num_seeds: runs a method, with seeds 1, 2, ...
      out: folder of the runs' folders.
      file: configuration file with the presets.
      overrides: `--config.key=value` arguments for all runs; a method's own come after them.

    Raises:
      InputError: a preset or key that is not there, or a value out of range.
    """
    if num_seeds < 1:
        raise InputError(f"--seeds: expected at least 1; received {num_seeds}")
    owner: dict[str, str] = {}
    users: dict[str, list[str]] = {}
    made: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {}
    for method in pool_of(methods[0].suite):
        arguments = (
            f"--config={file}:{method.preset}",
            *overrides,
            *(f"--config.{key}={value}" for key, value in method.changes),
        )
        config = jsonable(flatten(load_config(arguments)))
        first = owner.setdefault(
            repr(sorted((k, v) for k, v in config.items() if k != "name")), method.name
        )
        made.setdefault(first, (config, arguments))
        if method in methods:
            users.setdefault(first, []).append(method.name)
    found = []
    for seed in range(1, num_seeds + 1):
        for name, own in users.items():
            config, arguments = made[name]
            workdir = out / f"{name}-{seed}"
            found.append(
                Job(
                    workdir.name,
                    tuple(own),
                    seed,
                    workdir,
                    config | {"seed": seed},
                    (*arguments, f"--config.seed={seed}", f"--workdir={workdir}"),
                )
            )
    return tuple(found)
