"""Limits on the cost of an image file, checked on its structure before decoding."""

from __future__ import annotations

import gc
import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tests.serve import hostile_images
from tests.serve.hostile_images import (
    bmp_rle,
    color_profile,
    exif_that_overlaps,
    gif_file,
    jpeg_before_scan,
    jpeg_of_baseline_scans,
    jpeg_of_scans,
    jpeg_segment,
    png_chunk,
    png_file,
    saved,
)

from solo_vlm import SoloImageProcessor
from solo_vlm.models.solo import image_colors_solo, image_loading_solo
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image, load_pixels


@pytest.fixture(params=["simplejpeg", "pillow"])
def _decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(image_loading_solo, "simplejpeg", None)


def photo(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (1, 50_000_000, "1 x 50000000 exceeds the limit of 65,535 pixels per side"),
        (50_000_000, 1, "50000000 x 1 exceeds the limit of 65,535 pixels per side"),
        (3, 16_000_000, "3 x 16000000 exceeds the limit of 65,535 pixels per side"),
        (2, 500, r"aspect ratio 250 \(500 x 2 pixels\) exceeds max_aspect_ratio=200"),
        (500, 2, r"aspect ratio 250 \(500 x 2 pixels\) exceeds max_aspect_ratio=200"),
        (20_000, 20_000, "20000 x 20000 is more than the limit of 100,000,000 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_is_checked_in_the_header(monkeypatch, width, height, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = png_file(width, height, pixels=b"")  # there is nothing to decode
    for load in (load_image, load_pixels, SoloImageProcessor().encode_image):
        with pytest.raises(ImageError, match=message):
            load(data)


@pytest.mark.usefixtures("_decoder")
def test_height_of_a_jpeg_is_checked_in_its_header():
    with pytest.raises(ImageError, match="max_aspect_ratio=200"):
        load_pixels(saved(Image.new("RGB", (201, 1)), "JPEG"))
    assert load_pixels(saved(Image.new("RGB", (200, 1)), "JPEG")).shape == (1, 200, 3)


def test_aspect_ratio_limit_follows_the_processor():
    line = png_file(500, 2)
    assert SoloImageProcessor(max_aspect_ratio=300).encode_image(line)[1].tolist() == [1, 1, 16]
    for limited in (SoloImageProcessor(max_aspect_ratio=100), SoloImageProcessor()):
        for source in (line, np.zeros((2, 500, 3), np.uint8)):
            with pytest.raises(ImageError, match=f"max_aspect_ratio={limited.max_aspect_ratio or 200}"):
                limited.encode_image(source)
    assert SoloImageProcessor()(line)["image_grid_thw"].tolist() == [
        [1, 1, 16]
    ]  # unlimited, as in transformers
    with pytest.raises(ImageError, match="max_aspect_ratio=100"):
        SoloImageProcessor()(line, max_aspect_ratio=100)


def test_size_is_reported_before_decoding():
    sizes = []
    for data in (saved(photo(), "JPEG"), saved(photo(), "PNG")):
        with pytest.raises(ImageError):
            load_pixels(data[:-200], on_size=lambda *size: sizes.append(size))
    assert set(sizes) == {(40, 30)}


# --- structure ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jpeg_of_scans(501, 64, 64), "501 scans or more of 4,096 pixels take too long"),
        (jpeg_of_scans(41), "41 scans or more of 50,000,000 pixels"),
        (jpeg_of_baseline_scans(501, 64, 64), "501 scans"),
        (jpeg_before_scan(jpeg_segment(0xFE) * 2001), "more than 2,000 segments"),
        (jpeg_before_scan(jpeg_segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 5), "bytes of EXIF"),
        (jpeg_before_scan(jpeg_segment(0xFE) * 1000 + b"\xff\xff" + jpeg_segment(0xFE) * 1001), "segments"),
    ],
    ids=["scans", "scans-times-pixels", "baseline-scans", "segments", "EXIF", "segments-with-fill-bytes"],
)
def test_costly_jpeg_is_rejected(data, message):
    with pytest.raises(ImageError, match=message):
        load_pixels(data)


def test_large_ppm_with_16_bits_is_read():
    samples = np.random.default_rng(0).integers(0, 65536, (2000, 1500, 3), dtype=np.uint16)
    pixels = load_pixels(b"P6\n1500 2000\n65535\n" + samples.astype(">u2").tobytes())
    assert (pixels == samples >> 8).all()


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_video_after_a_jpeg_is_not_counted_as_scans(options):
    data = saved(photo(), "JPEG", **options)
    assert (load_pixels(data + b"\xff\xda" * 1000) == load_pixels(data)).all()


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("marker", [0xC9, 0xCA, 0xCB, 0xCD])
def test_arithmetic_coding_is_rejected(marker):
    data = saved(photo(), "JPEG")
    data = data.replace(b"\xff\xc0", bytes([0xFF, marker]), 1)
    with pytest.raises(ImageError, match="Huffman"):
        load_pixels(data)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("marker", [0xC3, 0xC5, 0xC6, 0xC7])
def test_rare_kinds_of_jpeg_are_read_or_rejected(marker):
    data = saved(photo(), "JPEG").replace(b"\xff\xc0", bytes([0xFF, marker]), 1)
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_pixels(data)
    deep = bytearray(saved(photo(), "JPEG"))
    deep[deep.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ImageError):
        load_pixels(bytes(deep))


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"progressive": True, "subsampling": 0}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_common_jpegs_are_read(mode, options):
    data = saved(photo().convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(load_pixels(data), expected)
    many = jpeg_before_scan(jpeg_segment(0xE2, b"ICC_PROFILE\0\1\xff") * 255)
    assert load_pixels(many).shape == (64, 64, 3)


def test_jpeg_with_many_scans_equals_pillow():
    data = jpeg_of_scans(300, 640, 480)
    np.testing.assert_array_equal(load_pixels(data)[..., 0], np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_file(64, 64, before=png_chunk(b"prVt") * 100_001), "more than 100,000 chunks"),
        (png_file(64, 64, after=png_chunk(b"prVt") * 100_001), "more than 100,000 chunks"),
        (png_file(64, 64, before=png_chunk(b"iCCP", b"x\0\0") * 2), "more than one color profile"),
        (gif_file(64, 64, before=b"!\xfe\0" * 1_100_000), "more than 2,000,000 parts"),
        (bmp_rle(2000, 1300, b""), "2,600,000 pixels exceed the limit of 2,500,000"),
    ],
    ids=["PNG-chunks", "PNG-chunks-after", "PNG-profiles", "GIF-blocks", "BMP-RLE"],
)
def test_costly_structure_is_rejected(data, message):
    with pytest.raises(ImageError, match=message):
        load_image(data)


def with_exif(file_format: str, exif: bytes) -> bytes:
    """Return an image file with EXIF."""
    if file_format == "PNG":
        return png_file(64, 64, before=png_chunk(b"eXIf", exif))
    if file_format == "PNG, after its pixels":
        return png_file(64, 64, after=png_chunk(b"eXIf", exif))
    if file_format == "PNG, in a text":
        return png_file(
            64, 64, before=png_chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + exif.hex().encode())
        )
    return saved(photo(), file_format, exif=exif)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.filterwarnings("error")  # Pillow warns about each tag
@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "PNG", "PNG, after its pixels", "PNG, in a text"])
def test_exif_of_many_tags_is_rejected(file_format):
    with pytest.raises(ImageError, match="more than 500 tags of metadata"):
        load_pixels(with_exif(file_format, b"Exif\0\0" + exif_that_overlaps(501, 100)))
    exif = Image.Exif()
    exif.update({0x9000 + tag: "x" * 100 for tag in range(499)})
    exif[0x0112] = 6
    assert load_pixels(with_exif(file_format, exif.tobytes())).shape[2] == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("file_format", ["WEBP", "PNG", "PNG, after its pixels", "PNG, in a text"])
def test_large_exif_is_rejected(file_format):
    with pytest.raises(ImageError, match="more than 262,144 bytes of EXIF"):
        load_pixels(with_exif(file_format, b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(2**18)))


@pytest.mark.usefixtures("_decoder")
def test_index_of_many_images_in_a_jpeg_is_rejected():
    with pytest.raises(ImageError, match="more than 500 tags"):
        load_pixels(jpeg_before_scan(jpeg_segment(0xE2, b"MPF\0" + exif_that_overlaps(501, 100))))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "head",
    [
        b"II*\0" + struct.pack("<IH", 8, 501),
        b"MM\0*" + struct.pack(">IH", 8, 501),
        b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 501),
    ],
    ids=["little-endian", "big-endian", "BigTIFF"],
)
def test_tiff_of_many_tags_is_rejected(head):
    with pytest.raises(ImageError, match="more than 500 tags"):
        load_pixels(head + bytes(12_000))


def test_large_color_profile_is_rejected():
    with pytest.raises(ImageError, match=r"color profile of 5,000,000 bytes is more than the limit"):
        load_image(saved(photo(), "TIFF", icc_profile=bytes(5_000_000)))


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_color_profile_of_many_elements_is_rejected(file_format):
    assert load_image(saved(photo(), file_format, icc_profile=color_profile(32))).size == (40, 30)
    with pytest.raises(ImageError, match="color profile of 4,000 elements exceeds the limit of 32"):
        load_pixels(saved(photo(), file_format, icc_profile=color_profile(4000)))


def test_run_length_encoded_bmp_equals_pillow():
    data = bmp_rle(16, 2, b"\x10\x07\0\0\x08\x01\x08\x02")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(load_image(data), expected)


# --- TIFF -----------------------------------------------------------------------------------------


def tagged(data: bytes, tag: int, value: int) -> bytes:
    """Return a TIFF with another value of a tag."""
    place = struct.unpack_from("<I", data, 4)[0] + 2
    while struct.unpack_from("<H", data, place)[0] != tag:
        place += 12
    return data[: place + 8] + struct.pack("<I", value) + data[place + 12 :]


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"])
def test_common_tiff_compressions_are_read(compression):
    data = saved(photo(), "TIFF", compression=compression)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(load_image(data), expected)


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_tiff_fax_compressions_are_read(compression):
    image = photo().convert("1")
    data = saved(image, "TIFF", compression=compression)
    np.testing.assert_array_equal(load_image(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(photo(), "TIFF", compression="lzma"), "compression lzma is not supported"),
        (tagged(saved(photo(), "TIFF", compression="tiff_lzw"), 259, 6), "compression tiff_jpeg"),
        (tagged(saved(photo(), "TIFF", compression="tiff_lzw"), 279, 10**6), "strips that overlap"),
    ],
    ids=["lzma", "old-JPEG", "sizes"],
)
def test_costly_tiff_is_rejected(data, message):
    with pytest.raises(ImageError, match=message):
        load_image(data)


def test_jpeg_with_many_scans_in_a_tiff_is_rejected():
    data = saved(photo(), "TIFF", compression="jpeg")
    image = Image.open(io.BytesIO(data))
    place, size = image.tag_v2[273][0], image.tag_v2[279][0]
    strip = data[place : place + size]
    scans = strip[:-2] + strip[strip.index(b"\xff\xda") :]
    moved = tagged(tagged(data + scans, 273, len(data)), 279, len(scans))
    with pytest.raises(ImageError, match="several scans"):
        load_image(moved)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["ICO", "PCX", "SGI", "DDS", "ICNS", "IM", "SPIDER", "MSP"])
def test_formats_without_limits_are_rejected(file_format):
    image = photo(64, 64).convert({"MSP": "1", "SPIDER": "F"}.get(file_format, "RGB"))
    with pytest.raises(ImageError, match="not an image of a supported format"):
        load_image(saved(image, file_format))


def test_formats_can_be_restricted():
    with pytest.raises(ImageError, match="not an image of a supported format"):
        load_image(saved(photo(), "PPM"), formats=("JPEG", "PNG"))


@pytest.mark.parametrize("file_format", ["AVIF", "JPEG2000"])
def test_format_of_unknown_cost_is_decoded_in_a_subprocess(file_format, monkeypatch):
    if file_format not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if file_format == "AVIF" else {}
    data = saved(photo(), file_format, **options)
    image = load_image(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(image, np.rot90(expected, -1) if options else expected)
    monkeypatch.setattr(image_loading_solo, "_MAX_SUBPROCESS_SECONDS", 0)
    with pytest.raises(ImageError, match=f"{file_format} takes more than 0 s to decode"):
        load_image(data)


def test_damaged_file_of_unknown_cost_is_a_one_line_error():
    with pytest.raises(ImageError, match="truncated or damaged") as caught:
        load_image(saved(photo(200, 100), "JPEG2000")[:3000])
    assert "\n" not in str(caught.value)


def test_file_of_gigabytes_is_rejected_without_reading(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(saved(photo(), "PNG"))
    monkeypatch.setattr(image_loading_solo, "MAX_FILE_BYTES", 100)
    with pytest.raises(ImageError, match="bytes are more than the limit of 100"):
        load_image(path)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "L"])
def test_bands_of_a_large_image_equal_the_whole(monkeypatch, mode):
    image = photo(50, 40).convert("RGBA")
    if mode == "I;16":
        image = Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32)
    else:
        image = image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)
    data = saved(image, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    whole = load_pixels(data)
    monkeypatch.setattr(image_colors_solo, "_BAND_PIXELS", 170)
    np.testing.assert_array_equal(load_pixels(data), whole)
    np.testing.assert_array_equal(load_image(data), whole)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decoded_pixels_are_freed_at_once(file_format):
    """A reference cycle would hold them until the next garbage collection."""

    def images() -> int:
        return sum(issubclass(type(thing), Image.Image) for thing in gc.get_objects())

    data = saved(photo(), file_format)
    load_pixels(data)
    gc.collect()
    gc.disable()
    try:
        before = images()
        load_pixels(data)
        assert images() == before
    finally:
        gc.enable()


_MEASURE = """
import time
import numpy
from tests.serve.hostile_images import costly_images
from solo_vlm.models.solo.image_loading_solo import ImageError
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

processor = SoloImageProcessor()
processor.encode_image(numpy.zeros((999, 1999, 3), "uint8"))  # imports and loads lazily
for name, build in costly_images().items():
    data, outcome = build(), "read"
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, the peak
    before, started = memory("VmRSS"), time.thread_time()
    try:
        processor.encode_image(data, max_pixels=50_000_000)
    except ImageError as error:
        outcome = str(error).splitlines()[0]
    seconds = time.thread_time() - started
    print(seconds, memory("VmHWM") - before, name, outcome, sep="\t", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_costly_images_take_bounded_time_and_memory():
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[2] for row in rows] == list(hostile_images.costly_images())
    for seconds, megabytes, name, outcome in rows:
        print(f"{float(seconds):5.2f} s {float(megabytes):5.0f} MB  {name}: {outcome}")
    assert max(float(row[0]) for row in rows) < 5  # CPU time; docs/data.md states the usual
    assert max(float(row[1]) for row in rows) < 700
