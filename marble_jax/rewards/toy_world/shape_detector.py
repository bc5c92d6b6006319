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

from marble_jax.rewards.geneval_rules import Detection

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


Point = tuple[float, float]


def _circle() -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    return [(math.cos(turn), math.sin(turn)) for turn in turns]


def _square() -> list[Point]:
    return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]


def _triangle() -> list[Point]:
    return [(0, -1), (1, 0.8), (-1, 0.8)]


def _star() -> list[Point]:
    corners = []
    for number in range(10):
        # Tips and notches in turn, the first tip up.
        radius = 1.12
        if number % 2:
            radius = 0.48
        turn = math.pi * number / 5 - math.pi / 2
        x, y = radius * math.cos(turn), radius * math.sin(turn)
        corners.append((x, y))
    return corners


def _cross() -> list[Point]:
    arm = 0.34
    quarter: list[Point] = [(arm, -1), (arm, -arm), (1, -arm)]
    corners: list[Point] = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


def outline(shape: str) -> list[Point]:
    """Returns the corners of a shape of radius 1 about (0, 0), y downwards; a circle has many."""
    return OUTLINES[shape]()


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
        rows = self._nodes(height, centroid[1], self.centroid[1], radius)
        columns = self._nodes(width, centroid[0], self.centroid[0], radius)
        top, left = rows.astype(int), columns.astype(int)
        # Rows vary along the first axis of the result, columns along the second.
        down, right = (rows - top)[:, None], columns - left
        top = top[:, None]
        table = self.distance
        # Bilinear interpolation between the four nodes around a pixel.
        not_right, not_down = 1 - right, 1 - down
        upper = table[top, left] * not_right + table[top, left + 1] * right
        lower = table[top + 1, left] * not_right + table[top + 1, left + 1] * right
        distance = (upper * not_down + lower * down) * radius
        return np.clip(distance * SHARPEN + 0.5, 0, 1)

    @staticmethod
    def _nodes(number: int, centre: float, template_centre: float, radius: float) -> np.ndarray:
        """Returns float64 [number]: where the centres of pixels lie among the table's nodes, along one axis."""
        from_centre = np.arange(number) + 0.5 - centre
        places = from_centre / radius + template_centre
        nodes = (places + REACH) / (2 * REACH) * (GRID - 1)
        # Just below the last node, so that every place has a next one to interpolate to.
        return np.clip(nodes, 0, GRID - 1.001)


@functools.cache
def template(shape: str) -> Template:
    """Returns the template of one of the five shapes."""
    corners = np.array(outline(shape))
    following = np.roll(corners, -1, 0)
    # Area and centre of mass of a polygon, by the shoelace formula.
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    area = cross.sum() / 2
    moment = ((corners + following) * cross[:, None]).sum(0)
    centroid = moment / (6 * area)
    nodes = np.linspace(-REACH, REACH, GRID)
    # [y, x, 1, 2]: the third axis is for the edges of the outline.
    points = np.stack(np.meshgrid(nodes, nodes), -1)[:, :, None]
    gap = _distance_to_edges(points, corners, following)
    inside = _is_inside(points, corners, following)
    return Template(abs(area), centroid, np.where(inside, gap, -gap))


def _distance_to_edges(
    points: np.ndarray, corners: np.ndarray, following: np.ndarray
) -> np.ndarray:
    """Returns float64 [y, x]: how far each point is from the nearest edge."""
    edges = following - corners
    along = ((points - corners) * edges).sum(-1)
    share = along / (edges**2).sum(-1)
    # Beyond its ends the nearest point of an edge is a corner.
    share = np.clip(share, 0, 1)
    nearest = points - corners - share[..., None] * edges
    return np.linalg.norm(nearest, axis=-1).min(-1)


def _is_inside(points: np.ndarray, corners: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Returns bool [y, x]: points from which a ray to the right crosses the outline an odd number of times."""
    edges = following - corners
    x, y = points[..., 0], points[..., 1]
    straddles = (corners[:, 1] > y) != (following[:, 1] > y)
    # A level edge straddles no ray; the 1 only keeps the division from failing.
    rise = np.where(edges[:, 1] == 0, 1, edges[:, 1])
    above_corner = y - corners[:, 1]
    crossing_x = corners[:, 0] + above_corner * edges[:, 0] / rise
    crossings = straddles & (x < crossing_x)
    return crossings.sum(-1) % 2 == 1


def _ramp(value: float, ends: tuple[float, float]) -> float:
    """Returns 0 at the first end, 1 at the second, linear between, clipped outside."""
    share = (value - ends[0]) / (ends[1] - ends[0])
    return float(min(max(share, 0.0), 1.0))


def background(image: np.ndarray) -> np.ndarray:
    """Returns [3] the median colour of the two outermost pixels all around."""
    rim = np.ones(image.shape[:2], bool)
    rim[2:-2, 2:-2] = False
    return np.median(image[rim], axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Blob:
    """Connected pixels that differ from the background.

    Attributes:
      core: bool [H, W] of the pixels.
      ink: [3] their colour.
    """

    core: np.ndarray
    ink: np.ndarray


class ShapeDetector:
    """Finds circles, squares, triangles, stars and crosses, with colour, box and mask."""

    SHAPES = ("circle", "square", "triangle", "star", "cross")

    @property
    def labels(self) -> tuple[str, ...]:
        """See `geneval_rules.Detector.labels`."""
        return self.SHAPES

    def detect(self, images: np.ndarray) -> list[list[Detection] | None]:
        """See `geneval_rules.Detector.detect`; never fails."""
        return [self.detect_one(image) for image in images]

    def detect_one(self, image: np.ndarray) -> list[Detection]:
        """Returns the detections in one image uint8 [H, W, 3]; at most one class per blob, the likeliest."""
        image = np.asarray(image, np.float64)
        plain = background(image)
        blobs = _blobs(image, plain)
        return [self._name(image, plain, blob, blobs) for blob in blobs]

    def _name(
        self, image: np.ndarray, plain: np.ndarray, blob: _Blob, blobs: Sequence[_Blob]
    ) -> Detection:
        """Returns the detection of a blob: the shape that it overlaps with most."""
        rows, columns = np.flatnonzero(blob.core.any(1)), np.flatnonzero(blob.core.any(0))
        window = _window(rows, columns, blob.core.shape)
        coverage, spread = _coverage(image, plain, blob, blobs, window)
        overlaps = self._overlaps(coverage)
        order = np.argsort(overlaps)[::-1]
        best, second = overlaps[order[0]], overlaps[order[1]]
        score = (
            _ramp(best, OVERLAP_RANGE)
            * _ramp(best - second, MARGIN_RANGE)
            * _ramp(spread, SPREAD_RANGE)
        )
        # A pixel is a square: the last one ends where the next would begin.
        right, bottom = columns[-1] + 1, rows[-1] + 1
        box = (float(columns[0]), float(rows[0]), float(right), float(bottom))
        return Detection(self.SHAPES[order[0]], score, box, blob.core, _colour_name(blob.ink))

    def _overlaps(self, coverage: np.ndarray) -> list[float]:
        """Returns intersection over union of a blob's coverage with each shape drawn in its place."""
        height, width = coverage.shape
        area = coverage.sum()
        x_of_pixels, y_of_pixels = np.arange(width) + 0.5, np.arange(height) + 0.5
        x = coverage.sum(0) @ x_of_pixels / area
        y = coverage.sum(1) @ y_of_pixels / area
        # As steep as the shapes are drawn; the centre of mass above is that of the soft edges, which are unbiased.
        coverage = np.clip((coverage - 0.5) * SHARPEN + 0.5, 0, 1)
        area = coverage.sum()
        overlaps = []
        for shape in self.SHAPES:
            ideal = template(shape).draw(np.array([x, y]), area, height, width)
            union = np.maximum(coverage, ideal).sum()
            intersection = np.minimum(coverage, ideal).sum()
            overlaps.append(intersection / union)
        return overlaps


def _colour_name(ink: np.ndarray) -> str:
    """Returns the name of the ink nearest to a colour [3]."""

    def distance(name: str) -> float:
        difference = ink - INKS[name]
        return float(np.sum(difference**2))

    return min(INKS, key=distance)


def _blobs(image: np.ndarray, plain: np.ndarray) -> list[_Blob]:
    """Returns the blobs of an image float64 [H, W, 3] on a background of colour `plain` [3]."""
    from scipy import ndimage

    contrast = np.linalg.norm(image - plain, axis=-1)
    touching, _ = ndimage.label(contrast > MIN_CONTRAST)
    blobs = []
    for number, place in enumerate(ndimage.find_objects(touching), 1):
        member = touching[place] == number
        if member.sum() < MIN_AREA:
            continue
        # Half of its own contrast bounds a blob, and parts what a blurred gap had joined.
        level = contrast[place]
        full = np.percentile(level[member], 75)
        parts, num_parts = ndimage.label(member & (level > full / 2))
        for part in range(1, num_parts + 1):
            core = np.zeros(contrast.shape, bool)
            core[place] = parts == part
            if core.sum() >= MIN_AREA:
                blobs.append(_Blob(core, _ink(image, contrast, core)))
    return blobs


def _ink(image: np.ndarray, contrast: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Returns [3] the median colour of a blob's more contrasting half, which soft edges do not reach."""
    middle = np.percentile(contrast[core], 50)
    return np.median(image[core & (contrast >= middle)], axis=0)


def _window(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Returns a blob's bounding box with two pixels around it for its soft edges."""
    top, left = rows[0] - 2, columns[0] - 2
    bottom, right = rows[-1] + 3, columns[-1] + 3
    # A slice may end beyond the image, but a negative start would count from its far side.
    return slice(max(top, 0), min(bottom, shape[0])), slice(max(left, 0), min(right, shape[1]))


def _coverage(
    image: np.ndarray,
    plain: np.ndarray,
    blob: _Blob,
    blobs: Sequence[_Blob],
    window: tuple[slice, slice],
) -> tuple[np.ndarray, float]:
    """Returns how much of each pixel a blob covers, and how far its colours are from one flat ink.

    Returns:
      (coverage float64 of the window in [0, 1], root-mean-square RGB distance of the blob's pixels).
    """
    neighbours = np.zeros_like(blob.core[window])
    for neighbour in blobs:
        if neighbour is not blob:
            neighbours |= neighbour.core[window]
    # A pixel's place on the line from the background's colour to the ink is the part of it that is covered.
    direction = blob.ink - plain
    offset = image[window] - plain
    coverage = np.clip(offset @ direction / (direction @ direction), 0, 1) * ~neighbours
    from_line = offset - coverage[..., None] * direction
    distance = np.sum(from_line[blob.core[window]] ** 2, -1)
    return coverage, math.sqrt(np.mean(distance))
