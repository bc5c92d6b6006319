"""The notebook of a first run: as it is kept, and run from top to bottom in a kernel of its own."""

from __future__ import annotations

import importlib.resources
import json
import os
import time

import numpy as np
import pytest

FILE = importlib.resources.files("marble_jax") / "guides" / "first_run.ipynb"
LINES = 16
"""Of a cell at most."""


def _images(cells):
    """Outputs of the cells that are images."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_the_notebook_is_kept_short_and_without_an_error():
    notebook = json.loads(FILE.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    # Of one run from top to bottom, or of none.
    assert len(_images(code)) in (0, 3)
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "error" not in kinds
    assert all("".join(cell["source"]).count("\n") < LINES for cell in cells)
    # What it printed names no folder of whoever ran it.
    assert "/home/" not in json.dumps(notebook) and "/work/" not in json.dumps(notebook)
    assert len(json.dumps(notebook)) < 300_000


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    root = str(importlib.resources.files("marble_jax").joinpath(".."))
    before = filter(None, [root, os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(before))
    # Compiled quickly, and not to run fast: it takes three steps.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", flags.strip())
    notebook = nbformat.reads(FILE.read_text(encoding="utf-8"), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    began = time.monotonic()
    client.execute()
    print(f"notebook: {time.monotonic() - began:.0f} s")
    assert len(_images(notebook.cells)) == 3
    folder = tmp_path / "first-run"
    assert (folder / "run" / "report.html").is_file()
    assert (folder / "evaluation" / "index.html").is_file()
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "layers, rank 16" in printed and "aesthetic: " in printed
    # Three steps, each with its line of shares that sum to 1.
    lines = [line for line in printed.splitlines() if line.startswith(("0 {", "1 {", "2 {"))]
    assert len(lines) == 3
    for line in lines:
        shares = json.loads(line[2:].partition("}")[0].replace("'", '"') + "}")
        assert np.isclose(sum(shares.values()), 1.0, atol=0.02)
