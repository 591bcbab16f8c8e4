"""Fixtures that many tests share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

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
