"""The colours of rewards: told apart by readers who lack a kind of cone, and seen on the page, in both themes."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import marble_jax.report
from marble_jax.report.marks import NUM_COLOURS

STYLE = (Path(marble_jax.report.__file__).parent / "style.css").read_text(encoding="utf-8")
THEMES = dict(zip(("light", "dark"), re.findall(r":root {(.*?)}", STYLE, re.DOTALL)))
# Machado, Oliveira and Fernandes 2009, severity 1.0, for linear light.
DEUTERANOPE = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
PROTANOPE = np.array(
    [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
)
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def colour(theme, name):
    """Linear light of a colour of the style sheet."""
    code = re.search(rf"--{name}: #([0-9a-f]{{6}})", THEMES[theme]).group(1)
    value = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(linear):
    """CIELAB under D65."""
    xyz = TO_XYZ @ linear / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(theme, name):
    """Ratio of WCAG 2 to the paper."""
    bright, dim = sorted((TO_XYZ[1] @ colour(theme, of) for of in (name, "paper")), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(
    "sees", [np.eye(3), DEUTERANOPE, PROTANOPE], ids=["all", "deutan", "protan"]
)
def test_no_two_colours_are_alike(theme, sees):
    seen = [lab(np.clip(sees @ colour(theme, f"r{i}"), 0, 1)) for i in range(NUM_COLOURS)]
    # A difference of 2 is just noticed side by side; these lines are thin and far apart.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


@pytest.mark.parametrize("theme", THEMES)
def test_lines_and_texts_are_seen_on_the_page(theme):
    assert all(contrast(theme, f"r{i}") >= 3 for i in range(NUM_COLOURS))
    assert all(
        contrast(theme, name) >= 4.5 for name in ("ink", "soft", "link", "good", "bad", "mild")
    )
