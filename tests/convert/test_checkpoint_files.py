"""Headers of safetensors files; converting a 2 GB checkpoint takes less than 1 GB of memory."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys

import pytest
from tests.factories import ROOT

from solo_vlm.convert.checkpoint_files import open_safetensors
from solo_vlm.utils.errors import SoloError

WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
BENCHMARK = ROOT / "benchmarks" / "convert_memory.py"


def write(file, header, data=bytes(24)):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return file


def test_header_locates_tensors(tmp_path):
    (tensor,) = open_safetensors(write(tmp_path / "x.safetensors", {"a": WEIGHT})).values()
    assert tensor.read().shape == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"7",
        b"[" * 10**5,
        b"\xff",
        {"a": None},
        {"a": {}},
        {"a": [1]},
        {"a": {**WEIGHT, "dtype": "F1"}},
        {"a": {**WEIGHT, "dtype": ["F32"]}},
        {"a": {**WEIGHT, "shape": "23"}},
        {"a": {**WEIGHT, "shape": [-2, -3]}},
        {"a": {**WEIGHT, "shape": [2.0, 3]}},
        {"a": {**WEIGHT, "shape": [2**62, 2**62]}},
        {"a": {**WEIGHT, "data_offsets": [-24, 0]}},
        {"a": {**WEIGHT, "data_offsets": [24, 0]}},
        {"a": {**WEIGHT, "data_offsets": [0, 24, 48]}},
        {"a": {**WEIGHT, "data_offsets": [2**40, 2**40 + 24]}},
        {"a": {**WEIGHT, "data_offsets": "xy"}},
        {"a": WEIGHT, "b": {**WEIGHT, "data_offsets": [None, 1]}},
    ],
    ids=lambda header: str(header)[:60],
)
def test_malformed_header_is_rejected_by_the_name_of_the_file(tmp_path, header):
    with pytest.raises(SoloError, match=r"x\.safetensors"):
        open_safetensors(write(tmp_path / "x.safetensors", header))


@pytest.mark.slow
def test_conversion_peak_memory_is_bounded():
    result = subprocess.run(
        [sys.executable, BENCHMARK, "--gigabytes", "2"], check=True, capture_output=True, text=True
    )
    peaks = [float(peak) for peak in re.findall(r"peak memory +([\d.]+) GB", result.stdout)]
    assert len(peaks) == 4
    assert max(peaks) < 1.0, result.stdout
