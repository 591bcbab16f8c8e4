"""Data path benchmark: it runs on its own photographs and on given ones."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from tests.factories import ROOT

BENCHMARK = ROOT / "benchmarks" / "data_path.py"
TINY = [
    "--photographs",
    "4",
    "--rounds",
    "1",
    "--sequences",
    "1",
    "--length",
    "1024",
    "--growth",
    "1",
    "2",
    "--shards",
    "9",
]


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_script_prints_its_results(tmp_path, own):
    for index in range(2):
        Image.effect_noise((500, 375), 50).convert("RGB").save(tmp_path / f"{index}.jpg")
    images = ["--images", str(tmp_path)] if own else []
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *TINY, "--json", *images], capture_output=True, text=True, check=True
    )
    results = json.loads(done.stdout)
    assert results["photographs"] == (2 if own else 4)
    for name in ("images_per_second", "whole_over_decode_only", "whole_over_pillow"):
        assert results[name] > 0
    assert (
        0.9 < results["bytes_on_disk_over_jpeg"] < 1.1
    )  # the file's metadata is not negligible for four images
    assert results["most_levels_from_pillow"] <= 1
    assert set(results["loader_images_per_second"]) == {"0", "1", "2"}
    assert len(results["loader_memory_mb"]) == 2
    assert results["packers_of_eight_sources"]["decoded_over_compressed"] > 2
    assert results["packers_of_eight_sources"]["encoded_on_resume"] == 0
    assert results["many_shards"]["shards"] == 9
