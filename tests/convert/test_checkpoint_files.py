"""Converting a 2 GB checkpoint takes less than 1 GB of memory."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from tests.factories import ROOT

BENCHMARK = ROOT / "benchmarks" / "convert_memory.py"


@pytest.mark.slow
def test_conversion_peak_memory_is_bounded():
    result = subprocess.run(
        [sys.executable, BENCHMARK, "--gigabytes", "2"], check=True, capture_output=True, text=True
    )
    peaks = [float(peak) for peak in re.findall(r"peak memory +([\d.]+) GB", result.stdout)]
    assert len(peaks) == 4
    assert max(peaks) < 1.0, result.stdout
