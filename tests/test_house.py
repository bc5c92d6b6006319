"""The house's drawing: who may import whom, and where the heavy libraries are let in."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "marble_jax"
ROWS = (
    (
        "vocabulary",
        (
            "errors",
            "validation",
            "types",
            "version",
            "platform",
            "process_end",
            "tree",
            "batches",
            "streams",
            "compiling",
            "console",
            "agreement",
            "policies",
        ),
    ),
    ("settings", ("config",)),
    ("ground", ("distributed", "storage", "weights")),
    ("networks", ("networks",)),
    ("mechanisms", ("flow", "prompts")),
    ("families", ("families",)),
    ("methods", ("objectives", "harmonize", "balancing", "trainable", "rewards", "convert")),
    ("procedures", ("training", "evaluation", "report", "rating")),
    ("programs", ("programs", "plan")),
    ("command line", ("cli", "__main__")),
    ("Python interface", ("api",)),
    ("front door", ("",)),
)
ROW = {room: number for number, (_, rooms) in enumerate(ROWS) for room in rooms}
LIBRARIES = {
    "jaxopt": {"harmonize.qp"},
    "orbax": {"storage"},
    "optax": {"training", "programs.build", "balancing"},
    "ml_collections": {"config", "cli.configuration"},
    "rapidocr": {"rewards.workers.ocr_engines"},
    "paddleocr": {"rewards.workers.ocr_engines"},
    "tensorboardX": {"training.event_file"},
    "torch": {"programs.verify", "weights.torch_pickle", "rewards.models.mask2former"},
    "diffusers": {"programs.verify"},
    "peft": {"programs.verify"},
    "pyarrow": {"prompts.parquet_files"},
    "wandb": set(),
    "trackio": set(),
    "matplotlib": set(),
}


def module_name(path: Path) -> str:
    """Dotted name below marble_jax; the package itself is the empty string."""
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip(".")
    )


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [
        node for node in ast.walk(parsed(path)) if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def imports(name: str) -> set[str]:
    """Full names of everything a module imports, also inside functions; `from a import b` gives `a.b` if a module."""
    found = set()
    for node in import_statements(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("marble_jax.") in MODULES else node.module)
    return found


def inside(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    own = {i for i in imports(name) if i.split(".")[0] == "marble_jax"}
    return {i.removeprefix("marble_jax").lstrip(".") for i in own}


def room(name: str) -> str:
    return name.split(".")[0]


def violations() -> list[str]:
    return [
        f"{name} ({ROWS[ROW[room(name)]][0]}) imports {other} ({ROWS[ROW[room(other)]][0]})"
        for name in MODULES
        for other in sorted(inside(name))
        if ROW[room(other)] > ROW[room(name)]
    ]


def test_every_module_has_its_place():
    assert {room(name) for name in MODULES} == set(ROW)


def test_no_module_imports_from_a_higher_row():
    assert not violations()


def test_rooms_of_a_row_do_not_import_each_other_in_a_circle():
    graph = {r: set() for r in ROW}
    for name in MODULES:
        graph[room(name)] |= {room(other) for other in inside(name)} - {room(name)}
    done: set[str] = set()
    while ready := {r for r in graph if r not in done and graph[r] <= done}:
        done |= ready
    assert done == set(graph), f"circle among {sorted(set(graph) - done)}"


FAMILIES = sorted(
    {name.split(".")[1] for name in MODULES if name.startswith("families.") and name.count(".") > 1}
)


def test_no_module_outside_a_family_imports_from_inside_one():
    assert FAMILIES == ["flux1", "sd3", "wan"]
    for family in FAMILIES:
        prefix = f"families.{family}"
        strays = {
            name
            for name in MODULES
            for other in inside(name)
            if f"{other}.".startswith(f"{prefix}.") and not f"{name}.".startswith(f"{prefix}.")
        }
        assert not strays, family


OWN_FOLDERS = tuple(f"families.{family}" for family in FAMILIES)


def test_no_module_outside_a_family_knows_what_it_is_made_of():
    """The names of families' parts stand in their folders alone, in networks that are nobody's, and in their table.

    What options and keys were called once is answered with what they are called now: old names stand there too.
    """
    strays = []
    for name, path in MODULES.items():
        if name.startswith(OWN_FOLDERS) or name in ("families.registry", "config.renamed"):
            continue
        text = path.read_text(encoding="utf-8")
        words = ["MMDiT", "mmdit", "StableDiffusion3", "SD3Transformer"]
        words += [
            "FluxPipeline",
            "FluxTransformer",
            "FluxNetworks",
            "single_blocks",
            "double_blocks",
        ]
        words += ["WanPipeline", "WanTransformer", "WanNetworks", "blocks_all"]
        if room(name) != "networks":
            words += ["T5", "text_encoder_2"]
        for word in words:
            if re.search(rf"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9])", text):
                strays.append((name, word))
    assert not strays


def test_harmonize_and_training_know_the_protocol_of_objectives_alone():
    for name in MODULES:
        if room(name) in ("harmonize", "training"):
            known = {other for other in inside(name) if room(other) == "objectives"}
            allowed = {"objectives.base", "objectives.advantages", "objectives.advantage_shape"}
            assert known <= allowed, name


@pytest.mark.parametrize(
    ("one", "other"), [("training", "evaluation"), ("training", "report"), ("evaluation", "report")]
)
def test_procedures_do_not_know_each_other(one, other):
    crossing = [n for n in MODULES for o in inside(n) if {room(n), room(o)} == {one, other}]
    assert not crossing


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_are_imported_where_they_belong(library):
    allowed = LIBRARIES[library]
    users = {name for name in MODULES if any(i.split(".")[0] == library for i in imports(name))}
    strays = {
        name for name in users if not any(name == a or name.startswith(a + ".") for a in allowed)
    }
    assert not strays


def test_the_report_needs_no_jax():
    reached, waiting = (
        set(),
        {"cli.main", "cli.report", *(n for n in MODULES if room(n) == "report")},
    )
    while waiting:
        name = waiting.pop()
        reached.add(name)
        assert not any(
            i.split(".")[0] in ("jax", "flax", "optax", "orbax") for i in imports(name)
        ), name
        waiting |= inside(name) - reached - {""}
    code = "import sys, marble_jax.cli.main, marble_jax.cli.report, marble_jax.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_heavy_libraries_are_imported_inside_functions():
    for name, path in MODULES.items():
        for node in parsed(path).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else ([node.module] if isinstance(node, ast.ImportFrom) else [])
            )
            heavy = {n.split(".")[0] for n in names} & {
                "rapidocr",
                "onnxruntime",
                "transformers",
                "scipy",
                "jaxopt",
                "tensorboardX",
                "wandb",
            }
            assert not heavy, f"{name} imports {heavy} at the top"


PRIVATE_JAX = {"plan.gpu_compiler"}
"""Modules that reach behind JAX's public interface, each with the reason beside the place."""


def test_the_private_parts_of_jax_are_used_where_there_is_no_public_way():
    assert {name for name, path in MODULES.items() if "jax._src" in path.read_text()} == PRIVATE_JAX


def test_a_wrong_import_is_found(monkeypatch, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from marble_jax.programs import build\n")
    monkeypatch.setitem(MODULES, "flow.bad", bad)
    assert violations() == ["flow.bad (mechanisms) imports programs.build (programs)"]
