"""Fixtures shared by many tests."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from solo_vlm.cli import main

# Unknown names are not looked up on the hub. Read when transformers is imported, so it comes first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Examples have no deadline. `make fuzz` selects the second profile by --hypothesis-profile.
settings.register_profile("test", deadline=None, derandomize=True)
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10000")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("test")


@pytest.fixture(scope="session")
def solo():
    """Return a small SOLO model with its processor."""
    from tests.factories import make_solo

    return make_solo()


@pytest.fixture(scope="session")
def solo_folder(tmp_path_factory):
    """Return a read-only folder with a small SOLO model."""
    from tests.factories import make_solo

    folder = tmp_path_factory.mktemp("models") / "solo"
    make_solo("qwen3").save(folder)
    return folder


@pytest.fixture
def picture():
    """Return a function that makes a reproducible image of noise."""

    def make(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs `solo` in this process: exit code, stdout, stderr."""

    def solo_command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["solo", *map(str, arguments)])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a new process
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return solo_command


@pytest.fixture
def run_data(run):
    """Return a function like `run` for the commands of `solo data`."""
    return lambda *arguments: run("data", *arguments)


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system with 12 KB of free space; skip the test if none can be mounted."""
    from tests.factories import SmallDisk

    try:
        disk = SmallDisk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield disk
    disk.close()
