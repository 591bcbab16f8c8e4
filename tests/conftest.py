"""Fixtures that many tests share."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from solo_vlm.cli import main
from solo_vlm.model.from_llm import SoloModelAndProcessor
from tiny import make_solo


@pytest.fixture(scope="session")
def solo() -> SoloModelAndProcessor:
    return make_solo()


@pytest.fixture
def picture():
    """Makes a reproducible image of noise."""

    def make(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def run_data(monkeypatch, capsys):
    """Run `solo data` in this process: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["solo", "data", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run
