"""Pareto fronts: which methods no other beats on two rewards at once, drawn for chosen pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from marble_jax.errors import InputError, one_of
from tools.experiments.table import Row

PAIRS = "aesthetic+alignment,ocr+geneval,preference+ocr,aesthetic+judge"
VIDEO_PAIRS = "motion+smoothness,smoothness+colourfulness,ocr+motion,ocr+geneval"
MARKERS = "osD^v<>pPXh*8d"


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats, more being better, by increasing first coordinate.

    A point is beaten by one that is at least as good in both coordinates and better in one; points with NaN are never
    on the front.

    Args:
      points: [n, 2].
    """
    points = np.asarray(points, np.float64)
    finite = np.isfinite(points).all(axis=1)
    at_least = (points[:, None] >= points[None]).all(axis=2) & finite[:, None]
    better = at_least & (points[:, None] > points[None]).any(axis=2)
    front = np.flatnonzero(finite & ~better.any(axis=0))
    return front[np.lexsort((-points[front, 1], points[front, 0]))]


def parse_pairs(text: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """`x+y,x+z` as pairs of column names.

    Raises:
      InputError: another form or an unknown name.
    """
    found = []
    for pair in filter(None, text.split(",")):
        parts = pair.split("+")
        if len(parts) != 2 or parts[0] == parts[1]:
            raise InputError(f"--pairs: expected reward+reward,...; received {pair!r}")
        for name in parts:
            one_of("--pairs", name, names)
        found.append((parts[0], parts[1]))
    return found


def draw(
    found: Sequence[Row], names: Sequence[str], pairs: Sequence[tuple[str, str]], path: Path
) -> None:
    """One panel a pair: a small mark a seed, a large one for their mean, and the front of the means.

    The same results give the same file: SVG's ids and date are fixed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("tab20")(np.linspace(0, 1, 20))
    width = min(len(pairs), 2)
    height = -(-len(pairs) // width)
    with plt.rc_context({"svg.hashsalt": "fronts", "font.size": 8}):
        figure, axes = plt.subplots(
            height, width, figsize=(5.2 * width, 4.2 * height), squeeze=False
        )
        for axis, (x, y) in zip(axes.flat, pairs, strict=False):
            index = [names.index(x), names.index(y)]
            means = np.array([row.gain[:, index].mean(axis=0) for row in found])
            for i, row in enumerate(found):
                style = {
                    "color": colours[i % 20],
                    "marker": MARKERS[i % len(MARKERS)],
                    "linestyle": "none",
                }
                axis.plot(*row.gain[:, index].T, markersize=3, alpha=0.5, **style)
                axis.plot(*means[i], markersize=8, label=row.title, **style)
            front = pareto_front(means)
            axis.plot(*means[front].T, color="0.5", linewidth=1, zorder=0)
            for value, line in ((0, axis.axvline), (0, axis.axhline)):
                line(value, color="0.8", linewidth=0.8, zorder=-1)
            axis.set_xlabel(f"gain in {x}")
            axis.set_ylabel(f"gain in {y}")
        for axis in axes.flat[len(pairs) :]:
            axis.set_visible(False)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.03 + 0.035 * -(-len(labels) // 4), 1, 1))
        partial = path.with_name(f".partial-{path.name}")
        figure.savefig(partial, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
    partial.replace(path)
