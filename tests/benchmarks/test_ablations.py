"""The tables of the documentation are those that the benchmark prints of its published results."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.factories import ROOT


@pytest.mark.parametrize(
    ("results", "page"),
    [
        ("ablations-cpu", "ablations"),
        ("design-cpu", "designs"),
        ("cifar10-design-cpu", "designs"),
    ],
)
def test_documented_tables_are_those_of_the_results(results, page):
    file = ROOT / "benchmarks" / "results" / f"{results}.json"
    command = [sys.executable, "benchmarks/ablations.py", "--out", file, "--markdown"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    documented = (ROOT / "docs" / "science" / f"{page}.md").read_text(encoding="utf-8").splitlines()
    assert rows
    assert not set(rows) - set(documented)
