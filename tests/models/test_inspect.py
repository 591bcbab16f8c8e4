"""Pictures of an image as the model sees it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from solo_vlm.models.inspect import _positions, draw_visibility, summarize_image
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor


@pytest.mark.parametrize(("attention", "dark"), [("causal", 7), ("bidirectional", 0)])
def test_patches_that_the_middle_one_does_not_see_are_dark(attention, dark):
    image = Image.new("RGB", (160, 96), "white")
    picture = draw_visibility(image, SoloImageProcessor(), SoloConfig(image_attention=attention))
    assert picture.size == (5 * 64, 3 * 64)
    corners = np.asarray(picture.convert("L"))[48::64, 48::64]  # below the text, right of it
    assert corners.shape == (3, 5)
    assert (corners < 128).flatten().tolist() == [False] * (15 - dark) + [True] * dark


def test_positions_are_those_of_the_decoder():
    layout = summarize_image(Image.new("RGB", (96, 64)), SoloImageProcessor())
    flat, _ = _positions(layout, SoloConfig())
    assert flat == [(1,), (2,), (3,), (5,), (6,), (7,)]  # a separator is at 4
    grid, _ = _positions(layout, SoloConfig(image_positions="2d"))
    assert grid == [(1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 1, 0), (1, 1, 1), (1, 1, 2)]
