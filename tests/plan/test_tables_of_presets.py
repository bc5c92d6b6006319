"""Tables of what presets take, in README, a guide and configs/: each row is what `marble-jax plan` says."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from marble_jax.cli.configuration import load_config
from marble_jax.config import settings_of
from marble_jax.console import Console
from marble_jax.distributed import accelerators
from marble_jax.plan.planner import plan
from marble_jax.plan.request import Request
from marble_jax.programs.step_flops import network_passes
from marble_jax.training.batch_sizes import derive_sizes

ROOT = Path(__file__).parents[2]
CHIP = r"(?:--devices=(?P<devices>\d+) )?--chip=(?P<chip>\w+)"
MEMORY = r"(?P<needed>[\d.]+) of (?P<usable>[\d.]+)"
SECONDS = r"(?P<seconds>\d+)"
IN_README = re.compile(
    rf"\| `(?P<preset>[\w:]+)` \| [^|]+ \| `{CHIP}` \| {MEMORY} \| (?P<samples>\d+) \| {SECONDS} \|"
)
IN_GUIDE = re.compile(rf"\| \S+ \| `{CHIP}`(?:, `(?P<options>[^`]+)`)? \| {MEMORY} \| {SECONDS} \|")
IN_CONFIGS = re.compile(
    rf"\| (?P<preset>\w+) +\| {CHIP} +\| {MEMORY} +\| (?P<samples>\d+ x \d+) +\| {SECONDS} +\|"
)


def rows(text: str, pattern: re.Pattern[str], file: str = "") -> list[dict[str, str]]:
    """Rows of a table; the preset with its file's name before it."""
    found = [match.groupdict() for match in pattern.finditer(text)]
    return [
        row | {"preset": file + row["preset"], "devices": row["devices"] or "1"} for row in found
    ]


def of_docstring(file: str) -> list[dict[str, str]]:
    docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{file}.py").read_text()))
    return rows(docstring or "", IN_CONFIGS, f"{file}:")


SD3 = rows((ROOT / "README.md").read_text(), IN_README)
FLUX = of_docstring("flux")
WAN = of_docstring("wan")
IN_OBJECTIVES = re.compile(r"\| `(\w+:\w+)`[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")
PASSES = IN_OBJECTIVES.findall((ROOT / "marble_jax" / "guides" / "objectives.md").read_text())
GUIDE = [
    match.groupdict()
    for match in IN_GUIDE.finditer((ROOT / "marble_jax/guides/devices.md").read_text())
]


def test_the_tables_are_found():
    assert (len(SD3), len(FLUX), len(WAN), len(GUIDE), len(PASSES)) == (6, 8, 12, 4, 5)


@pytest.mark.parametrize(("preset", "rollout", "forward", "backward"), PASSES)
def test_a_row_of_passes_is_what_they_come_to(preset, rollout, forward, backward):
    settings = settings_of(load_config([f"--config={preset}"]))
    passes = network_passes(settings, derive_sizes(settings.rollout, settings.training, 1))
    assert (passes.rollout, passes.forward, passes.backward) == (
        float(rollout),
        float(forward),
        float(backward),
    )


def most_of(record: Mapping[str, Any]) -> float:
    """Bytes of the largest program of a plan, with what lies beside it."""
    needed = []
    for program, sources in record["memory"].items():
        parts = [*sources.values(), *record["resident"][program].values()]
        needed.append(sum(part["bytes"] for part in parts))
    return max(needed)


@pytest.mark.parametrize("row", GUIDE, ids=lambda row: f"{row['chip']}-{row['devices']}")
def test_a_row_of_the_guide_is_what_plan_says_of_sd3(row):
    options = (row["options"] or "").split()
    settings = settings_of(load_config(["--config=sd3", *options]))
    record = plan(settings, Request(devices=int(row["devices"]), chip=row["chip"]), Console())
    assert row["needed"] == f"{most_of(record) / 1e9:.1f}"
    assert row["usable"] == f"{accelerators.by_name(row['chip']).usable / 1e9:.1f}"
    assert row["seconds"] == f"{record['seconds']['step']:.0f}"


@pytest.mark.parametrize("row", [*SD3, *FLUX, *WAN], ids=lambda row: row["preset"])
def test_a_row_is_what_plan_says(row):
    settings = settings_of(load_config([f"--config={row['preset']}"]))
    request = Request(devices=int(row["devices"]), chip=row["chip"])
    record = plan(settings, request, Console())
    prompts = settings.rollout.prompts_per_step
    samples = settings.rollout.images_per_prompt
    product = " x " in row["samples"]
    assert row == {
        "preset": row["preset"],
        "devices": row["devices"],
        "chip": row["chip"],
        "needed": f"{most_of(record) / 1e9:.1f}",
        "usable": f"{accelerators.by_name(row['chip']).usable / 1e9:.1f}",
        "samples": f"{prompts} x {samples}" if product else str(prompts * samples),
        "seconds": f"{record['seconds']['step']:.0f}",
    }
