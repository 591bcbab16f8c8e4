"""Notebook from a folder of images to a served model: every cell runs, and the model answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.factories import ROOT

NOTEBOOK = ROOT / "examples" / "folder_to_server.ipynb"


@pytest.fixture
def notebook():
    return pytest.importorskip("nbformat").read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name") != "stderr")


def check(cells: list) -> None:
    """Require ten cells with the outputs of a run in which the model learned its task."""
    assert len(cells) == 10
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    evaluated, _, asked, stopped = map(printed, cells[-4:])
    correct, total = map(int, evaluated.replace(" correct", "").split(" of "))
    assert total == 40
    assert correct >= 36
    assert asked.strip() == "blue"
    assert stopped.strip() == "exit code 0"


def test_stored_outputs_are_of_a_run(notebook):
    check(code_cells(notebook))


@pytest.mark.slow
def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    where = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    check(code_cells(notebook))
