"""Benchmark of packed layers: it runs and compares the ways to compute a row."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.factories import ROOT

SCRIPT = ROOT / "benchmarks" / "packed_layers.py"


def test_script_compares_grouped_documents_with_others(tmp_path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--tokens", "64", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert results == json.loads(out.read_text())
    assert set(results["qwen3_next"]["seconds"]) == {"grouped", "each alone"}
    assert set(results["gpt_oss"]["seconds"]) == {"grouped", "each alone", "dense mask"}
