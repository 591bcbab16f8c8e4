"""The benchmark of hostile requests measures each of them, and variations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tests.factories import ROOT

SCRIPT = ROOT / "benchmarks" / "hostile.py"


@pytest.mark.slow
def test_costs_of_requests_are_measured(tmp_path):
    out = tmp_path / "results.json"
    options = ["--only", "^costly body: empty parts$|^body: ", "--fuzz", "5", "--json", "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert results == json.loads(out.read_text())
    assert results["requests"]["costly body: empty parts"]["status"] == 400
    assert results["requests"]["fuzzed"]["requests"] == 5
    assert min(results["worst"].values()) > 0
