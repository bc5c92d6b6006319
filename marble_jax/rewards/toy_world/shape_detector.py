"""A detector without weights for the small synthetic world: flat shapes of one ink on a plain background.

Pixels that differ from the border's colour are gathered into connected blobs; each blob is compared with the five
shapes, drawn where its area and centroid say the shape would lie. The agreement becomes a confidence on which
GenEval's thresholds keep their meaning: well-formed things lie above 0.9, blobs that could be several things below 0.3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from marble_jax.rewards.geneval import Detection

INKS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 200, 30),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
    "pink": (245, 150, 190),
    "brown": (130, 80, 40),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
"""RGB in [0, 255] of GenEval's ten colours in this world; a thing's colour is the nearest."""
MIN_CONTRAST = 45.0
"""RGB distance from the background below which a pixel belongs to it."""
MIN_AREA = 30.0
"""Pixels; smaller specks are no things."""
OVERLAP_RANGE = (0.72, 0.89)
"""Overlaps with the best shape that give confidence 0 and 1."""
MARGIN_RANGE = (0.02, 0.11)
"""Leads over the second-best shape that give confidence 0 and 1."""
SHARPEN = 2.0
"""Steepness at which edges are compared: shape counts for more than softness, yet what is blurred away costs."""
SPREAD_RANGE = (60.0, 20.0)
"""Root-mean-square RGB distances from one flat ink that give confidence 0 and 1."""
GRID = 97
"""Nodes per edge of the tables of signed distances, which span [-REACH, REACH] circumradii."""
REACH = 1.8


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 about (0, 0), y downwards; a circle has many."""
    if shape == "circle":
        return [(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, 64, endpoint=False)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if shape == "star":
        turns = [(math.pi * k / 5 - math.pi / 2, 0.48 if k % 2 else 1.12) for k in range(10)]
        return [(r * math.cos(t), r * math.sin(t)) for t, r in turns]
    arm = 0.34
    quarter = [(arm, -1), (arm, -arm), (1, -arm)]
    return [point for k in range(4) for point in (_turned(p, k) for p in quarter)]


def _turned(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    for _ in range(quarters):
        point = (-point[1], point[0])
    return point


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """A shape of radius 1.

    Attributes:
      area: its area.
      centroid: [2] x and y of its centre of mass.
      distance: float64 [GRID, GRID], rows along y: signed distance to the outline, positive inside.
    """

    area: float
    centroid: np.ndarray
    distance: np.ndarray

    def draw(self, centroid: np.ndarray, area: float, height: int, width: int) -> np.ndarray:
        """Coverage float64 [height, width] in [0, 1] of the shape with this centre of mass (x, y) and area.

        Pixels are the unit; edges are SHARPEN times as steep as a pixel would show them.
        """
        radius = math.sqrt(area / self.area)
        where = [
            (np.arange(n) + 0.5 - centroid[axis]) / radius + self.centroid[axis]
            for axis, n in ((1, height), (0, width))
        ]
        rows, columns = (
            np.clip((w + REACH) / (2 * REACH) * (GRID - 1), 0, GRID - 1.001) for w in where
        )
        top, left = rows.astype(int), columns.astype(int)
        down, right = (rows - top)[:, None], (columns - left)
        table = self.distance
        upper = table[top[:, None], left] * (1 - right) + table[top[:, None], left + 1] * right
        lower = (
            table[top[:, None] + 1, left] * (1 - right) + table[top[:, None] + 1, left + 1] * right
        )
        return np.clip((upper * (1 - down) + lower * down) * radius * SHARPEN + 0.5, 0, 1)


@functools.cache
def template(shape: str) -> Template:
    """The template of one of the five shapes."""
    corners = np.array(outline(shape))
    following = np.roll(corners, -1, 0)
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    area = cross.sum() / 2
    centroid = ((corners + following) * cross[:, None]).sum(0) / (6 * area)
    nodes = np.linspace(-REACH, REACH, GRID)
    points = np.stack(np.meshgrid(nodes, nodes), -1)[:, :, None]  # [y, x, 1, 2]
    along = following - corners
    t = np.clip(((points - corners) * along).sum(-1) / (along**2).sum(-1), 0, 1)
    gap = np.linalg.norm(points - corners - t[..., None] * along, axis=-1).min(-1)
    x, y = points[..., 0], points[..., 1]
    straddles = (corners[:, 1] > y) != (following[:, 1] > y)
    rise = np.where(along[:, 1] == 0, 1, along[:, 1])
    crossings = straddles & (x < corners[:, 0] + (y - corners[:, 1]) * along[:, 0] / rise)
    inside = crossings.sum(-1) % 2 == 1
    return Template(abs(area), centroid, np.where(inside, gap, -gap))


def _ramp(value: float, ends: tuple[float, float]) -> float:
    """0 at the first end, 1 at the second, linear between, clipped outside."""
    return float(min(max((value - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0))


def background(image: np.ndarray) -> np.ndarray:
    """[3] median colour of the two outermost pixels all around."""
    rim = np.ones(image.shape[:2], bool)
    rim[2:-2, 2:-2] = False
    return np.median(image[rim], axis=0)


class ShapeDetector:
    """Finds circles, squares, triangles, stars and crosses, with colour, box and mask."""

    SHAPES = ("circle", "square", "triangle", "star", "cross")

    def detect(self, images: np.ndarray) -> list[list[Detection] | None]:
        """See `geneval.Detector.detect`; never fails."""
        return [self.detect_one(image) for image in images]

    def detect_one(self, image: np.ndarray) -> list[Detection]:
        """Detections in one image uint8 [H, W, 3]; at most one class per blob, the likeliest."""
        from scipy import ndimage

        image = np.asarray(image, np.float64)
        plain = background(image)
        contrast = np.linalg.norm(image - plain, axis=-1)
        touching, count = ndimage.label(contrast > MIN_CONTRAST)
        cores, inks = [], []
        for k, (rows, columns) in enumerate(ndimage.find_objects(touching), 1):
            # Half of its own contrast bounds a blob, and parts what a blurred gap had joined.
            member = touching[rows, columns] == k
            if member.sum() < MIN_AREA:
                continue
            level = contrast[rows, columns]
            full = np.percentile(level[member], 75)
            parts, number = ndimage.label(member & (level > full / 2))
            for part in range(1, number + 1):
                core = np.zeros(contrast.shape, bool)
                core[rows, columns] = parts == part
                if core.sum() >= MIN_AREA:
                    cores.append(core)
                    inks.append(
                        np.median(
                            image[core & (contrast >= np.percentile(contrast[core], 50))], axis=0
                        )
                    )
        return [self._name(image, plain, core, ink, cores) for core, ink in zip(cores, inks)]

    def _name(
        self,
        image: np.ndarray,
        plain: np.ndarray,
        core: np.ndarray,
        ink: np.ndarray,
        cores: Sequence[np.ndarray],
    ) -> Detection:
        rows, columns = np.flatnonzero(core.any(1)), np.flatnonzero(core.any(0))
        top, bottom = max(rows[0] - 2, 0), min(rows[-1] + 3, core.shape[0])
        left, right = max(columns[0] - 2, 0), min(columns[-1] + 3, core.shape[1])
        window = np.s_[top:bottom, left:right]
        own = core[window]
        others = np.zeros_like(own)
        for other in cores:
            if other is not core:
                others |= other[window]
        direction = ink - plain
        offset = image[window] - plain
        coverage = np.clip(offset @ direction / (direction @ direction), 0, 1) * ~others
        spread = math.sqrt(
            np.mean(np.sum((offset - coverage[..., None] * direction)[own] ** 2, -1))
        )
        area = coverage.sum()
        height, width = coverage.shape
        x, y = (
            coverage.sum(axis) @ (np.arange(n) + 0.5) / area
            for axis, n in ((0, width), (1, height))
        )
        coverage = np.clip((coverage - 0.5) * SHARPEN + 0.5, 0, 1)
        area = coverage.sum()
        overlaps = []
        for shape in self.SHAPES:
            ideal = template(shape).draw(np.array([x, y]), area, height, width)
            overlaps.append(np.minimum(coverage, ideal).sum() / np.maximum(coverage, ideal).sum())
        order = np.argsort(overlaps)[::-1]
        best, second = overlaps[order[0]], overlaps[order[1]]
        score = (
            _ramp(best, OVERLAP_RANGE)
            * _ramp(best - second, MARGIN_RANGE)
            * _ramp(spread, SPREAD_RANGE)
        )
        colour = min(INKS, key=lambda name: float(np.sum((ink - INKS[name]) ** 2)))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        return Detection(self.SHAPES[order[0]], score, box, core, colour)
