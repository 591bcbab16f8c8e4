"""Benchmark of the checks: it runs and measures every part."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tests.factories import ROOT


@pytest.mark.slow
def test_script_measures_every_part(tmp_path) -> None:
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/check.py"),
        "--layers",
        "1",
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert results == json.loads(out.read_text())
    assert set(results["seconds"]) == {"init", "checks of init", "check before training", "solo check"}
