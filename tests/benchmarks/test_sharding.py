"""Sharding benchmark: it runs on one process and compares all variants."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.factories import ROOT

SCRIPT = ROOT / "benchmarks" / "sharding.py"


def test_script_compares_three_ways_of_sharding(tmp_path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--warmup", "0", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert results == json.loads(out.read_text())
    assert set(results["milliseconds"]) == {"layer by layer", "units", "whole"}
    assert min(results["milliseconds"].values()) > 0
