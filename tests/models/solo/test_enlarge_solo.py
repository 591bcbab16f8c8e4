"""What is compiled gives OpenCV's pixels, or says that somebody else must."""

from __future__ import annotations

import platform
import shutil
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_vlm import SoloImageProcessor
from solo_vlm.models.solo import enlarge_solo
from solo_vlm.models.solo.enlarge_solo import LIBRARY, enlarge_to_patches

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform == "win32" or not shutil.which("cc"),
    reason="compiled on x86-64 by a C compiler",
)


def by_opencv(pixels: np.ndarray, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """Resized by OpenCV, then cut by the definition of a patch."""
    size = (columns * patch_size, rows * patch_size)
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    patches = resized.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return patches.reshape(rows * columns, -1)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_it_was_compiled() -> None:
    assert LIBRARY.exists(), "installed before there was something to compile: `make venv` again"


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(6, 400),
    larger=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    patch_size=st.sampled_from([32, 64, 96]),
    extremes=st.booleans(),
)
def test_the_pixels_are_opencvs(height, width, larger, patch_size, extremes) -> None:
    pixels = noise(height, width)
    if extremes:
        pixels = (pixels >> 7) * np.uint8(255)
    rows, columns = -(-height // patch_size) + larger[0], -(-width // patch_size) + larger[1]
    patches = enlarge_to_patches(pixels, rows, columns, patch_size)
    np.testing.assert_array_equal(patches, by_opencv(pixels, rows, columns, patch_size))


def test_pixels_that_lie_apart_in_memory() -> None:
    pixels = noise(90, 100)[::2, 10:60]
    np.testing.assert_array_equal(enlarge_to_patches(pixels, 2, 2, 32), by_opencv(pixels, 2, 2, 32))


@pytest.mark.parametrize(
    ("height", "width", "patch_size"),
    [(65, 20, 32), (20, 65, 32), (20, 5, 32), (20, 20, 16), (20, 20, 48)],
    ids=["lower", "narrower", "five-pixels-wide", "half-lines", "lines-and-a-half"],
)
def test_what_it_leaves_to_others(height, width, patch_size) -> None:
    assert enlarge_to_patches(noise(height, width), 2, 2, patch_size) is None


def test_an_image_has_the_same_patches_where_nothing_was_compiled(monkeypatch) -> None:
    images = [noise(*size) for size in ((375, 500), (64, 96), (33, 65), (1, 1), (700, 1100))]
    here = [SoloImageProcessor().encode(image)[0] for image in images]
    monkeypatch.setattr(enlarge_solo, "_library", None)
    for image, patches in zip(images, here, strict=True):
        np.testing.assert_array_equal(SoloImageProcessor().encode(image)[0], patches)
