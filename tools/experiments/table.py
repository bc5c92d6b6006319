"""Tables of the results: a row a method, means over its seeds with the interval across them, in Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from marble_jax.evaluation.statistics import composite
from tools.experiments import equal_cost
from tools.experiments.results import OUT_OF_SAMPLE

HEADINGS = {
    "main": "Methods",
    "sweeps": "Sweeps of N and rho, amortized",
    "ablations": "Ablations",
    "balancers": "Balancers from the literature, exact mode, no reward weights in any row",
    "objectives": "Other objectives",
    "video": "Methods on clips",
}

SETS = {"trained": "all {} trained rewards", "all": "all evaluated rewards"}
"""Sets of rewards that joint rates are on record for, and what a table calls them."""

EXPLAINED = {
    "passes": "",
    "seconds": " without compiling, of a run's median step, with other runs beside it",
}
"""What a table says of the unit of its budget."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One method over its seeds; S seeds, C columns (the rewards, then those never trained on by any method).

    Attributes:
      name: of the method.
      title: what the table says.
      seeds: the S seeds there are.
      trained: the rewards it trains on.
      gain: float64 [S, C] paired gain over the base model on held-out prompts; NaN where there is none.
      clear: int8 [S, C] 1 or -1 where the run's own interval over prompts lies above or below 0.
      joint: by set of rewards, float64 [S, 2]: shares of images above and below the base model's on all of the set;
        NaN where a run has no such set on record.
      conflict_rate: [S], NaN for a single reward.
      worst_cos: [S], likewise.
      least_cos: [S], likewise.
      out_of_sample: [S, 4] means over steps, in the order of `results.OUT_OF_SAMPLE`; NaN where not on record.
      seconds: [S] of all optimiser steps.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    trained: tuple[str, ...]
    gain: np.ndarray
    clear: np.ndarray
    joint: dict[str, np.ndarray]
    conflict_rate: np.ndarray
    worst_cos: np.ndarray
    least_cos: np.ndarray
    out_of_sample: np.ndarray
    seconds: np.ndarray


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % Student interval, which is NaN with fewer than two.

    With three seeds that is 2.48 standard deviations: seeds are few, and the interval says so.

    Args:
      values: [S].
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()) if len(values) else float("nan"), float("nan")
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _joint(run: dict[str, Any], which: str) -> list[float]:
    """Shares of a run's images above and below the base model's on all rewards of a set."""
    rates = run.get("joint", {}).get(which, {})
    return [_number(rates.get(rate, {}).get("mean")) for rate in equal_cost.JOINT_RATES]


def _joint_at(point: equal_cost.Reached, which: str) -> list[float]:
    """The same of a run where it has spent a budget."""
    rates = point.joint.get(which, {})
    return [_number(rates.get(rate)) for rate in equal_cost.JOINT_RATES]


def _later(run: dict[str, Any]) -> list[float]:
    """What a run's updates are to later steps' gradients; results of earlier versions have no such field: NaN."""
    return [_number(run.get("out_of_sample", {}).get(name)) for name in OUT_OF_SAMPLE]


def columns(results: dict[str, Any]) -> tuple[str, ...]:
    """The rewards that some method trains on, in their order, then the others."""
    runs = list(results["runs"].values())
    widest = max((run["trained"] for run in runs), key=len, default=[])
    trained = dict.fromkeys([*widest, *(n for run in runs for n in run["trained"])])
    return tuple(dict.fromkeys([*trained, *(n for run in runs for n in run["gain"])]))


def rows(results: dict[str, Any], suite: str | None = None) -> list[Row]:
    """The methods (of one suite) that have at least one finished run."""
    names, found = columns(results), []
    for method in results["methods"]:
        if suite is not None and method["suite"] != suite:
            continue
        runs = sorted(
            (r for r in results["runs"].values() if method["name"] in r["methods"]),
            key=lambda r: r["seed"],
        )
        if not runs:
            continue

        def gain(run: dict[str, Any], field: str) -> list[float]:
            return [_number(run["gain"].get(name, {}).get(field)) for name in names]

        def each(key: str, runs: Sequence[dict[str, Any]] = tuple(runs)) -> np.ndarray:
            return np.array([_number(run[key]) for run in runs])

        low, high = (np.array([gain(run, field) for run in runs]) for field in ("low", "high"))
        found.append(
            Row(
                method["name"],
                method["title"],
                tuple(run["seed"] for run in runs),
                tuple(runs[0]["trained"]),
                np.array([gain(run, "mean") for run in runs]),
                np.where(low > 0, 1, np.where(high < 0, -1, 0)),
                {which: np.array([_joint(run, which) for run in runs]) for which in SETS},
                each("conflict_rate"),
                each("worst_cos"),
                each("least_cos"),
                np.array([_later(run) for run in runs]),
                each("seconds"),
            )
        )
    return found


def composites(found: Sequence[Row]) -> list[tuple[float, float]]:
    """The paper's composite of each row: mean over columns of z-scores among the rows, of the means over seeds.

    Its interval is that of the composites of single seeds, among the rows' runs of that seed; NaN unless all rows
    have the same seeds. Gains rank as scores do, as all runs share the base model's images.

    Source: MARBLE (arXiv 2605.06507), Table 1.
    """
    middle = composite(np.array([row.gain.mean(axis=0) for row in found]))
    half = np.full(len(found), np.nan)
    if len({row.seeds for row in found}) == 1 and len(found[0].seeds) > 1:
        single = np.array(
            [
                composite(np.array([row.gain[s] for row in found]))
                for s in range(len(found[0].seeds))
            ]
        )
        half = np.array([t_interval(values)[1] for values in single.T])
    return [(float(m), float(h)) for m, h in zip(middle, half, strict=True)]


def shown(mean: float, half: float = float("nan"), digits: int = 4) -> str:
    """`+0.0123 ± 0.0045`, without what is NaN."""
    if not np.isfinite(mean):
        return "-"
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def joint_cell(joint: np.ndarray) -> str:
    """`12.3 ± 4.5 / 6.7 ± 8.9 %`: images above and below the base model's on all rewards of a set, over seeds.

    Args:
      joint: [S, 2].
    """
    cells = []
    for shares in 100 * joint.T:
        mean, half = t_interval(shares)
        if not np.isfinite(mean):
            return "-"
        cells.append(f"{mean:.1f}" + (f" ± {half:.1f}" if np.isfinite(half) else ""))
    return " / ".join(cells) + " %"


def joint_sets(found: Sequence[Row]) -> list[str]:
    """The sets of rewards on which some method has joint rates on record; results of earlier runs have none."""
    return [which for which in SETS if any(np.isfinite(row.joint[which]).any() for row in found)]


def _has_set(row: Row, which: str, trained: Sequence[str]) -> bool:
    """Whether a method's set of rewards is that of a method with these: one that trains on fewer has an easier one."""
    return which == "all" or row.trained == tuple(trained)


def verdict(row: Row, rewards: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """In how many seeds all rewards have gone up, and in how many that is clear within the run."""
    index = [names.index(name) for name in rewards]
    up, clear = np.all(row.gain[:, index] > 0, axis=1), np.all(row.clear[:, index] > 0, axis=1)
    return f"{up.sum()}/{len(up)}", f"{clear.sum()}/{len(clear)}"


def later_cells(row: Row) -> tuple[str, str]:
    """`38 %, -0.02` of single updates and of means of updates, against gradients of steps that come later."""
    means = row.out_of_sample.mean(axis=0)
    if not np.isfinite(means).all():
        return "-", "-"
    single, mean = means[:2], means[2:]
    return tuple(f"{100 * share:.0f} %, {cosine:+.3f}" for share, cosine in (single, mean))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *(_line(row) for row in body)]


def gains_table(found: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Gains, composite, verdict and diagnostics, a row a method."""
    rewards = max((row.trained for row in found), key=len)
    sets = joint_sets(found)
    header = [
        "method",
        "seeds",
        *(f"{n} (never trained)" if n not in rewards else n for n in names),
        "composite",
        f"all {len(rewards)} up",
        "clearly",
        *(_joint_heading(which, rewards) for which in sets),
        "conflict rate",
        "worst cosine: mean (least)",
        "next step: conflict, worst cosine",
        "mean update, later steps: conflict, worst cosine",
        "minutes",
    ]
    body = []
    for row, (middle, half) in zip(found, composites(found), strict=True):
        conflict, cosine = row.conflict_rate.mean(), row.worst_cos.mean()
        body.append(
            [
                row.title,
                str(len(row.seeds)),
                *(shown(*t_interval(row.gain[:, c])) for c in range(len(names))),
                shown(middle, half, 2),
                *verdict(row, rewards, names),
                *(
                    joint_cell(row.joint[which]) if _has_set(row, which, rewards) else "-"
                    for which in sets
                ),
                f"{100 * conflict:.0f} %" if np.isfinite(conflict) else "-",
                f"{cosine:+.2f} ({row.least_cos.min():+.2f})" if np.isfinite(cosine) else "-",
                *later_cells(row),
                f"{row.seconds.mean() / 60:.1f}",
            ]
        )
    return _grid(header, body)


def differences_table(found: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Gain of each method minus that of the first row, paired by seed: the same prompts and starting noise."""
    first, body, sets = found[0], [], joint_sets(found)
    for row in found[1:]:
        both = [s for s in row.seeds if s in first.seeds]
        if both:
            own, other = ([r.seeds.index(s) for s in both] for r in (row, first))
            gap = row.gain[own] - first.gain[other]
            cells = [shown(*t_interval(gap[:, c])) for c in range(len(names))]
            for which in sets:
                # Above minus below: what remains of both is not chance.
                net, net_of_first = (r.joint[which] @ [1, -1] for r in (row, first))
                comparable = _has_set(row, which, first.trained)
                points = 100 * (net[own] - net_of_first[other]) if comparable else np.array([])
                cells.append(shown(*t_interval(points), 1))
            body.append([row.title, *cells])
    heads = [f"above - below on {SETS[which].format(len(first.trained))}, points" for which in sets]
    return _grid([f"minus {first.title}", *names, *heads], body)


def equal_cost_table(
    runs: Sequence[dict[str, Any]],
    found: Sequence[Row],
    names: Sequence[str],
    unit: str,
    limit: float,
) -> list[str]:
    """Gains of the methods within a budget, a row a method.

    Empty where fewer than two have evaluations within it, and where all enter with the ends of their runs, which the
    other tables have.
    """
    body = []
    means = []
    all_whole = True
    rewards = max((row.trained for row in found), key=len)
    sets = joint_sets(found)
    for row in found:
        own = [run for run in runs if row.name in run["methods"]]
        points = [p for run in own if (p := equal_cost.reached(run, unit, limit)) is not None]
        if not points:
            continue
        all_whole = all_whole and all(point.whole for point in points)
        steps = sorted({f"{point.step:.3g}" for point in points}, key=float)
        gains = np.array([[_number(point.gain.get(name)) for name in names] for point in points])
        up = np.all(gains[:, [names.index(name) for name in row.trained]] > 0, axis=1)
        means.append(gains.mean(axis=0))
        joint = {which: np.array([_joint_at(point, which) for point in points]) for which in sets}
        body.append(
            [
                row.title,
                str(len(points)),
                " to ".join(dict.fromkeys((steps[0], steps[-1]))),
                f"{100 * np.mean([point.cost for point in points]) / limit:.0f} %",
                *(shown(*t_interval(gains[:, c])) for c in range(len(names))),
                f"{up.sum()}/{len(up)}",
                *(
                    joint_cell(joint[which]) if _has_set(row, which, rewards) else "-"
                    for which in sets
                ),
            ]
        )
    if len(body) < 2 or all_whole:
        return []
    # Behind the gains; it takes all methods to say.
    place = 4 + len(names)
    for cells, middle in zip(body, composite(np.array(means)), strict=True):
        cells.insert(place, shown(float(middle), digits=2))
    header = [
        "method",
        "seeds",
        "at step",
        "of the budget",
        *names,
        "composite",
        "all up",
        *(_joint_heading(which, rewards) for which in sets),
    ]
    return _grid(header, body)


def _joint_heading(which: str, rewards: Sequence[str]) -> str:
    """Heading of a set's joint rates."""
    return f"above / below base on {SETS[which].format(len(rewards))}"


def _equal_cost_sections(
    runs: Sequence[dict[str, Any]], found: Sequence[Row], names: Sequence[str]
) -> list[str]:
    """Lines of a suite's tables at equal cost, each under its heading."""
    methods = {row.name for row in found}
    own = [run for run in runs if methods & set(run["methods"])]
    lines = []
    for unit, what in equal_cost.COSTS.items():
        limit = equal_cost.budget(own, unit, methods)
        grid = equal_cost_table(own, found, names, unit, limit)
        if not grid:
            continue
        lines += [
            f"At equal {what}: every run where it has spent what the cheapest method's whole run takes, "
            f"{limit:,.0f} {unit}{EXPLAINED[unit]}; between two evaluations, on the straight line through both.",
            "",
            *grid,
            "",
        ]
    return lines


def markdown(results: dict[str, Any]) -> str:
    """All tables with what they mean and the command that makes them."""
    names = columns(results)
    runs = list(results["runs"].values())
    steps, prompts = (sorted({run[k] for run in runs}) for k in ("num_steps", "num_prompts"))
    suites = {method["suite"] for method in results["methods"]}
    pipeline = "video pipeline" if suites == {"video"} else "embedded pipeline"
    text = [f"# Experiments on the {pipeline}", "", "```", results["command"], "```", ""]
    if not runs:
        return "\n".join([*text, "No run is finished yet.", ""])
    text += [
        f"Every run has the same budget: {'/'.join(map(str, steps))} optimiser steps, "
        f"{'/'.join(map(str, prompts))} held-out prompts. Numbers are gains over the base model, on the same prompts "
        f"and noise: mean over seeds ± half the 95 % Student interval over seeds, which is wide for so few "
        "(nothing after a mean: one seed).",
        "",
        "`composite`: the paper's, mean over the columns of z-scores among the rows of its table; its ± is over seeds. "
        "`all up`: seeds in which every reward gained; `clearly`: seeds in which every gain's own bootstrap interval "
        "over prompts lies above 0. `above / below base`: share of held-out images that are at least as high as the "
        "base model's image of the same prompt and noise on every reward that applies and higher on one (joint "
        "domination), and of those for which the reverse holds (joint collapse, arXiv 2605.13155); of models that "
        "differ by chance both are alike. `conflict rate`: share of the steps looked at in which the update pointed "
        "against a reward's gradient. `worst cosine`: smallest cosine of the update with a reward's gradient, mean "
        "over steps (and the least of all). Only steps that solve for alpha are looked at, on what they solve on: this "
        "is in sample. `next step`: the same of an update with the gradients of the step after it, on samples that it "
        "was not made from; `mean update`: of the mean of a window of updates, which is what Adam follows, with the "
        "gradients of later steps. "
        "`minutes`: of optimiser steps, compilation included, with other runs beside them.",
        "",
    ]
    if results["missing"]:
        text += [f"Not finished: {', '.join(results['missing'])}.", ""]
    for suite, heading in HEADINGS.items():
        found = rows(results, suite)
        if not found:
            continue
        text += [f"## {heading}", "", *gains_table(found, names), ""]
        if len(found) > 1:
            text += [
                "Difference to the first row, paired by seed:",
                "",
                *differences_table(found, names),
                "",
            ]
        text += _equal_cost_sections(runs, found, names)
    return "\n".join(text)
