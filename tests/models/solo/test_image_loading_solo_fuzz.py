"""Image files and data URLs mutated by structure are read right, or rejected by the documented error."""

from __future__ import annotations

import base64
import io
import re
import struct
import time
import zlib
from unittest import mock
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.serve.hostile_images import bmp_rle, saved

from solo_vlm.models.solo import image_loading_solo
from solo_vlm.models.solo.image_loading_solo import ImageError, ImageFetchError, load_image, load_pixels

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

MAX_PIXELS = 1_000_000
MAX_SECONDS = 5.0  # of CPU time; an ordinary example takes milliseconds

Parts = list[bytes]


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size)
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


def frames(file_format: str) -> bytes:
    several = [picture(), picture("L").convert("RGB"), picture()]
    return saved(several[0], file_format, save_all=True, append_images=several[1:], duration=50)


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = 6, "a description"
    return tags


def png_parts(data: bytes) -> Parts:
    parts, place = [data[:8]], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        parts.append(data[place:end])
        place = end
    return parts


def jpeg_parts(data: bytes) -> Parts:
    return [part for part in re.split(rb"(?s)(?=\xff[\xc0-\xfe])", data) if part]


def gif_parts(data: bytes) -> Parts:
    colors = 3 << (data[10] & 7) + 1 if data[10] & 128 else 0
    blocks = re.split(rb"(?s)(?=!\xf9|!\xff|!\xfe|,\0\0\0\0)", data[13 + colors :])
    return [data[:6], data[6:13], data[13 : 13 + colors], *blocks]


def webp_parts(data: bytes) -> Parts:
    parts, place = [data[:12]], 12
    while place < len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        parts.append(data[place : place + 8 + size + size % 2])
        place += len(parts[-1])
    return parts


def bmp_parts(data: bytes) -> Parts:
    start = struct.unpack_from("<I", data, 10)[0]
    fields = [data[place : place + 4] for place in range(14, 54, 4)]
    return [data[:2], data[2:6], data[6:10], data[10:14], *fields, data[54:start], data[start:]]


def tiff_parts(data: bytes) -> Parts:
    place = struct.unpack_from("<I", data, 4)[0]
    end = place + 2 + 12 * struct.unpack_from("<H", data, place)[0]
    entries = [data[at : at + 12] for at in range(place + 2, end, 12)]
    return [data[:4], data[4:8], data[8:place], data[place : place + 2], *entries, data[end:]]


JPEG_OPTIONS = [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"exif": exif()}, {"subsampling": 0}]
SEEDS: dict[str, list[Parts]] = {
    "JPEG": [
        jpeg_parts(saved(picture(mode), "JPEG", **options))
        for mode in ("L", "RGB", "CMYK")
        for options in JPEG_OPTIONS
    ],
    "PNG": [
        png_parts(saved(picture(mode), "PNG", exif=exif())) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    ]
    + [png_parts(frames("PNG"))],
    "GIF": [gif_parts(saved(picture(mode), "GIF")) for mode in ("P", "L")] + [gif_parts(frames("GIF"))],
    "WEBP": [
        webp_parts(saved(picture(mode), "WEBP", lossless=lossless, exif=exif()))
        for mode in ("RGB", "RGBA")
        for lossless in (False, True)
    ]
    + [webp_parts(frames("WEBP"))],
    "BMP": [bmp_parts(saved(picture(mode), "BMP")) for mode in ("1", "L", "P", "RGB")]
    + [bmp_parts(bmp_rle(16, 2, b"\x10\x07\0\0\x08\x01\x08\x02", bits)) for bits in (4, 8)],
    "TIFF": [
        tiff_parts(saved(picture(mode), "TIFF", compression=compression))
        for mode in ("L", "P", "RGB", "CMYK")
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        if (mode, compression) != ("P", "jpeg")
    ],
}
EXTREMES = [0, 1, 2, 255, 256, 32_767, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


@st.composite
def mutated(draw: st.DrawFn, file_format: str) -> bytes:
    """A file whose parts are dropped, repeated, moved, cut, taken from another file, or changed."""
    parts = list(draw(st.sampled_from(SEEDS[file_format])))
    for _ in range(draw(st.integers(0, 4))):
        if not parts:
            break
        place = draw(st.integers(0, len(parts) - 1))
        match draw(st.sampled_from(["drop", "repeat", "move", "cut", "foreign", "number", "bytes"])):
            case "drop":
                del parts[place]
            case "repeat":
                parts[place:place] = [parts[place]] * draw(st.sampled_from([1, 2, 300]))
            case "move":
                parts.insert(draw(st.integers(0, len(parts) - 1)), parts.pop(place))
            case "cut":
                parts[place] = parts[place][: draw(st.integers(0, len(parts[place])))]
            case "foreign":
                parts.insert(place, draw(st.sampled_from(draw(st.sampled_from(SEEDS[file_format])))))
            case "number":
                size, order = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from(["big", "little"]))
                value = draw(st.sampled_from(EXTREMES) | st.integers(0, 2**32 - 1)) % 256**size
                at = draw(st.integers(0, len(parts[place])))
                number = value.to_bytes(size, order)
                parts[place] = parts[place][:at] + number + parts[place][at + size :]
            case "bytes":
                at = draw(st.integers(0, len(parts[place])))
                parts[place] = parts[place][:at] + draw(st.binary(max_size=9)) + parts[place][at:]
    if file_format == "PNG" and draw(st.booleans()):
        parts = parts[:1] + [with_checksum(part) for part in parts[1:]]
    if file_format == "WEBP" and draw(st.booleans()):
        size = sum(map(len, parts)) - 8
        parts[:1] = [b"RIFF" + struct.pack("<I", max(0, size)) + b"WEBP"]
    data = b"".join(parts)
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


def with_checksum(chunk: bytes) -> bytes:
    return chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk


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


@given(mutated("JPEG"))
def test_mutated_jpeg(data):
    check(data)


@given(mutated("PNG"))
def test_mutated_png(data):
    check(data)


@given(mutated("GIF"))
def test_mutated_gif(data):
    check(data)


@given(mutated("WEBP"))
def test_mutated_webp(data):
    check(data)


@given(mutated("BMP"))
def test_mutated_bmp(data):
    check(data)


@given(mutated("TIFF"))
def test_mutated_tiff(data):
    check(data)


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
