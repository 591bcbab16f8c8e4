"""Image files and data URLs mutated by structure are read right, or rejected by the documented error."""

from __future__ import annotations

import base64
import io
import time
from unittest import mock
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.serve.hostile_images import saved
from tests.serve.mutated_images import SEEDS, mutated, picture

from solo_vlm.models.solo import image_loading_solo
from solo_vlm.models.solo.image_loading_solo import ImageError, ImageFetchError, load_image, load_pixels

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

MAX_PIXELS = 1_000_000
MAX_SECONDS = 5.0  # of CPU time; an ordinary example takes milliseconds


def outcome(data: bytes) -> np.ndarray | str:
    """Return the pixels of a file, or why it is rejected."""
    started = time.thread_time()
    try:
        pixels = load_pixels(data, max_pixels=MAX_PIXELS, name="image")
    except ImageError as error:
        assert not isinstance(error, ImageFetchError)
        assert str(error).startswith("image: ")
        assert "\n" not in str(error)
        return str(error)
    finally:
        assert time.thread_time() - started < MAX_SECONDS
    height, width, channels = pixels.shape
    assert pixels.dtype == np.uint8
    assert channels == 3
    assert 1 <= width * height <= MAX_PIXELS
    assert max(width, height) <= 200 * min(width, height)
    return pixels


def check(data: bytes) -> None:
    """Check that a file is rejected, or read as Pillow reads it."""
    pixels = outcome(data)
    with mock.patch.object(image_loading_solo, "simplejpeg", None):
        by_pillow = outcome(data)
    if isinstance(pixels, str):
        assert pixels == by_pillow
        return
    np.testing.assert_array_equal(pixels, by_pillow)
    image = Image.open(io.BytesIO(data))
    if image.mode in ("L", "RGB") and not image.has_transparency_data and "icc_profile" not in image.info:
        image.load()
        try:
            turned = image.getexif().get(0x0112) in range(2, 9)
        except Exception:  # broken EXIF, which is ignored
            turned = False
        upright = ImageOps.exif_transpose(image) if turned else image
        np.testing.assert_array_equal(pixels, upright.convert("RGB"))


@pytest.mark.parametrize("file_format", SEEDS)
@given(random=st.randoms(use_true_random=False), number=st.integers(0, 10**6))
def test_mutated_file(file_format, random, number):
    seeds = SEEDS[file_format]
    check(mutated(random, seeds[number % len(seeds)], seeds))


# --- data URLs ------------------------------------------------------------------------------------

FILE = saved(picture(), "PNG")
TYPES = ["image/png", "image/jpeg", "text/plain", "application/octet-stream", "", "image", "IMAGE/PNG", "é/ü"]
PARAMETERS = ["charset=utf-8", "charset=utf-16", "name=a.png", "base64=no", "", "q", "x=%3B", "base64"]
PIECES = [
    " ",
    "\n",
    "\r\n",
    "\t",
    "=",
    "==",
    "%",
    "%0",
    "%0A",
    "%3D",
    "%zz",
    "é",
    "\0",
    "+",
    "-",
    "_",
    "/",
    ",",
]


@st.composite
def data_urls(draw: st.DrawFn) -> tuple[str, bool]:
    """A data URL of `FILE`, and whether anything of its text was changed."""
    parameters = draw(st.lists(st.sampled_from(PARAMETERS), max_size=3))
    encoded = draw(st.sampled_from(["base64", "url-safe", "percent", "lines", "both"]))
    text = base64.b64encode(FILE).decode()
    body = {
        "base64": text,
        "url-safe": base64.urlsafe_b64encode(FILE).decode(),
        "percent": quote(FILE),
        "lines": base64.encodebytes(FILE).decode(),
        "both": quote(text, safe=""),
    }[encoded]
    parameters = [name for name in parameters if encoded != "percent" or name.strip() != "base64"]
    header = ";".join(
        [draw(st.sampled_from(TYPES)), *parameters, *([] if encoded == "percent" else ["base64"])]
    )
    changed = draw(st.booleans())
    if changed:
        at = draw(st.integers(0, len(body)))
        cut = draw(st.integers(0, 3))
        body = body[:at] + draw(st.sampled_from(PIECES) | st.text(max_size=5)) + body[at + cut :]
    return f"{draw(st.sampled_from(['data', 'DATA', 'Data']))}:{header},{body}", changed


@given(data_urls())
def test_mutated_data_url(made):
    url, changed = made
    try:
        image = load_image(url, allow_paths=False, allow_urls=False, max_pixels=MAX_PIXELS, name="image")
    except ImageError as error:
        assert changed, url[:60]
        assert "\n" not in str(error)
    else:
        if not changed:
            np.testing.assert_array_equal(image, picture())


@given(st.text(max_size=200) | st.text("data:;,base64/%=+-_ \n", max_size=200))
def test_any_text_is_read_or_rejected(text):
    with pytest.raises(ImageError):
        load_image(text, allow_paths=False, allow_urls=False)
