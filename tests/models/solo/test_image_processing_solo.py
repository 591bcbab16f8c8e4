"""Images: resize rule, patches, and all kinds of files."""

import base64
import functools
import http.server
import io
import json
import pickle
import platform
import shutil
import struct
import sys
import threading
import time
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from tests.factories import ROOT
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # 5.17 requires torchvision otherwise

from solo_vlm import SoloImageProcessor
from solo_vlm.models.solo import image_loading_solo, image_processing_solo
from solo_vlm.models.solo.image_loading_solo import (
    ImageError,
    ImageFetchError,
    ImageMissingError,
    load_image,
    load_pixels,
)
from solo_vlm.models.solo.image_processing_solo import (
    LIBRARY,
    enlarge_to_patches,
    image_to_patches,
    patch_grid,
    patches_to_image,
    resize,
)

GOLDEN = ROOT / "tests" / "golden" / "preprocess"
GRIDS = json.loads((GOLDEN / "grids.json").read_text())
RESIZE_TABLE = json.loads((GOLDEN / "resize_table.json").read_text())
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])

sides = st.one_of(st.integers(1, 5000), st.sampled_from([32, 64, 512, 992, 1023, 1024, 1025, 1056, 10**6]))


@pytest.fixture(scope="module")
def processor():
    return SoloImageProcessor()


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Make a smooth picture with different corners."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size but has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def pixels(source, **options) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- golden: the original SOLO code ---------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_golden_patches(processor, name):
    expected = np.load(GOLDEN / "patches.npz")
    key = name.removesuffix(".png")
    output = processor(GOLDEN / name, do_rescale=True, do_normalize=True)
    patches = output["pixel_values"]
    assert output["image_grid_thw"].tolist() == [[1, *GRIDS[name]["grid_rows_cols"]]]
    assert patches.dtype == np.float32
    for actual, part in (
        (patches[0], "first"),
        (patches[-1], "last"),
        (patches.mean(axis=1), "patch_mean"),
        (patches.std(axis=1), "patch_std"),
    ):
        np.testing.assert_allclose(actual, expected[f"{key}/{part}"], rtol=0, atol=0.02)  # one level of 255


def test_golden_resize_table():
    assert len(RESIZE_TABLE) == 492
    for size, expected in RESIZE_TABLE.items():
        width, height = map(int, size.split("x"))
        rows, columns = patch_grid(height, width)
        assert [columns * 32, rows * 32] == expected, size


# --- the resize rule ------------------------------------------------------------------------------


def original_size(width: int, height: int) -> tuple[int, int]:
    """Compute the resize rule of the original code in floating point."""
    short, long = min(width, height), max(width, height)
    new_long = min(int(np.ceil(long / 32)) * 32, 1024)
    new_short = int(np.ceil(int(new_long * short / long) / 32)) * 32
    return (new_long, new_short) if width >= height else (new_short, new_long)


@given(sides, sides)
def test_integer_arithmetic_equals_the_original_code(width, height):
    rows, columns = patch_grid(height, width)
    new_width, new_height = original_size(width, height)
    assert (columns * 32, rows * 32) == (max(new_width, 32), max(new_height, 32))


@given(sides, sides)
def test_grid_bounds_and_symmetry(width, height):
    rows, columns = patch_grid(height, width)
    assert 1 <= rows <= 32
    assert 1 <= columns <= 32
    assert patch_grid(width, height) == (columns, rows)
    assert (rows >= columns) if height > width else (rows <= columns)


@given(sides, sides)
def test_aspect_ratio_is_kept_within_one_patch(width, height):
    rows, columns = patch_grid(height, width)
    short, long = sorted((width, height))
    assert abs(min(rows, columns) - max(rows, columns) * short / long) <= 1


@given(sides, sides, st.integers(0, 200))
def test_longer_short_side_never_gives_fewer_patches(width, height, extra):
    short, long = sorted((width, height))
    assert patch_grid(min(short + extra, long), long)[0] >= patch_grid(short, long)[0]


@given(sides, st.integers(1, 200))
def test_enlarged_square_never_gets_fewer_patches(side, extra):
    assert patch_grid(side + extra, side + extra)[0] >= patch_grid(side, side)[0]


@given(sides, sides)
def test_figure2_differs_only_at_exact_multiples(width, height):
    """Figure 2 adds a patch to long sides of 32, 64, ... 992, and to short sides scaled to such multiples."""
    short, long = sorted((width, height))
    original = patch_grid(short, long)
    figure2 = patch_grid(short, long, rule="figure2")
    if long % 32 == 0 and long < 1024:
        assert figure2[1] == original[1] + 1
    else:
        scaled = original[1] * 32 * short // long
        assert figure2[1] == original[1]
        assert figure2[0] == original[0] + (scaled > 0 and scaled % 32 == 0)


def test_figure2_exceeds_its_own_maximum():
    assert patch_grid(1024, 1024) == (32, 32)
    assert patch_grid(1024, 1024, rule="figure2") == (33, 32)


@given(sides, sides, st.integers(1, 5000), st.sampled_from(["original", "figure2"]))
def test_budget_gives_the_largest_grid_within_it(width, height, budget, rule):
    short, long = sorted((width, height))
    rows, columns = patch_grid(short, long, 32, 4096, rule, budget)
    assert rows * columns <= budget or columns == 1
    assert abs(rows - columns * short / long) <= 1 + (rule == "figure2")
    unlimited = patch_grid(short, long, 32, 4096, rule)
    if columns < unlimited[1]:
        larger = patch_grid(short, long, 32, (columns + 1) * 32, rule)
        assert larger[0] * larger[1] > budget
    else:
        assert (rows, columns) == unlimited


def test_budget_is_saved_and_used_everywhere(tmp_path):
    SoloImageProcessor(size={"longest_edge": 4096}, max_patches=20).save_pretrained(tmp_path)
    processor = SoloImageProcessor.from_pretrained(tmp_path)
    image = photo(3000, 2000)
    assert processor(image)["image_grid_thw"].tolist() == [[1, 4, 5]]
    assert processor.encode_image(image)[1].tolist() == [1, 4, 5]
    assert processor(image, max_patches=6)["image_grid_thw"].tolist() == [[1, 2, 3]]
    assert processor.get_number_of_image_patches(2000, 3000) == 20
    assert processor.get_number_of_image_patches(2000, 3000, {"max_patches": 6}) == 6


def test_fixed_size_beyond_the_budget_is_rejected():
    with pytest.raises(ValueError, match="3 x 2 patches of a fixed size exceed max_patches=5"):
        SoloImageProcessor(size={"height": 96, "width": 64}, max_patches=5)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 5),
        (5, 0),
        (5, 5, 32, 1000),
        (5, 5, 0),
        (5, 5, 64, 32),
        (5, 5, 32, 1024, "figure3"),
        (5, 5, 32, 1024, "original", 0),
    ],
)
def test_invalid_sizes_are_rejected(arguments):
    with pytest.raises(ValueError):
        patch_grid(*arguments)


@pytest.mark.parametrize("size", [{"height": 64, "width": 60}, {"longest_edge": 1000}, {"height": 64}, 512])
def test_invalid_settings_are_rejected_at_construction(size):
    with pytest.raises(ValueError):
        SoloImageProcessor(size=size)
    with pytest.raises(ValueError):
        SoloImageProcessor()(photo(40, 40), size=size)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (500, 375), (40, 900)])
def test_fixed_size_stretches_every_image(tmp_path, width, height):
    SoloImageProcessor(size={"height": 96, "width": 64}).save_pretrained(tmp_path)
    processor = SoloImageProcessor.from_pretrained(tmp_path)
    image = photo(width, height)
    assert processor.get_patch_grid(height, width) == (3, 2)
    assert processor.get_number_of_image_patches(height, width) == 6
    output = processor(image)
    assert output["image_grid_thw"].tolist() == [[1, 3, 2]]
    resized = np.asarray(image.resize((64, 96), Image.Resampling.BILINEAR)).astype(int)
    patches = output["pixel_values"].reshape(3, 2, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(96, 64, 3)
    assert np.abs(patches - resized).max() <= 2
    pixel_values, image_grid_thw = processor.encode_image(image)
    assert image_grid_thw.tolist() == [1, 3, 2]
    np.testing.assert_array_equal(pixel_values, output["pixel_values"])


# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (64, 96), (33, 2000), (1, 5000), (7, 1), (1300, 1290)]
)
def test_patches_are_crops_of_pillows_resize(processor, width, height):
    image = photo(width, height)
    output = processor(image)
    rows, columns = processor.get_patch_grid(height, width)
    resized = image.resize((columns * 32, rows * 32), Image.Resampling.BILINEAR)
    patches = output["pixel_values"]
    assert patches.dtype == np.uint8
    assert patches.shape == (rows * columns, 3072)
    assert output["image_grid_thw"].tolist() == [[1, rows, columns]]
    assert output["image_grid_thw"].dtype == np.int64
    for index, patch in enumerate(patches):
        row, column = divmod(index, columns)
        crop = resized.crop((column * 32, row * 32, column * 32 + 32, row * 32 + 32))
        expected = np.frombuffer(b"".join(band.tobytes() for band in crop.split()), np.uint8)
        assert abs(patch.astype(int) - expected).max() <= 1


def test_float_output_is_the_normalized_uint8_output(processor):
    image = photo(100, 70)
    raw = processor(image)["pixel_values"]
    by_channel = raw.reshape(-1, 3, 1024).transpose(0, 2, 1).astype(np.float64)
    expected = ((by_channel / 255 - MEAN) / STD).transpose(0, 2, 1).reshape(-1, 3072)
    normalized = processor(image, do_rescale=True, do_normalize=True)["pixel_values"]
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected, atol=1e-6)
    rescaled = processor(image, do_rescale=True)["pixel_values"]
    np.testing.assert_allclose(rescaled, raw / 255, atol=1e-7)
    one_mean = processor(image, do_rescale=True, do_normalize=True, image_mean=0.5, image_std=0.5)
    np.testing.assert_allclose(one_mean["pixel_values"], raw / 127.5 - 1, atol=1e-6)


def test_batch_concatenates_its_images(processor):
    images = [photo(500, 375), photo(20, 200), photo(32, 32), photo(1100, 30)]
    batch = processor(images)
    single = [processor(image) for image in images]
    for key in ("pixel_values", "image_grid_thw"):
        np.testing.assert_array_equal(batch[key], np.concatenate([one[key] for one in single]))
    assert batch["image_grid_thw"].prod(axis=1).sum() == len(batch["pixel_values"])
    nested = processor([images[:1], [], images[1:]])
    np.testing.assert_array_equal(nested["pixel_values"], batch["pixel_values"])


def test_no_images_give_no_patches(processor):
    output = processor([], return_tensors="pt")
    assert output["pixel_values"].shape == (0, 3072)
    assert output["image_grid_thw"].shape == (0, 3)


def test_torch_output(processor):
    output = processor(photo(50, 50), return_tensors="pt")
    assert output["pixel_values"].dtype == torch.uint8
    assert output["image_grid_thw"].dtype == torch.int64
    assert list(output) == processor.model_input_names


def test_call_settings_override_the_processors(processor):
    image = photo(300, 200)
    small = processor(image, patch_size=16, size={"longest_edge": 128}, resize_rule="figure2")
    assert small["image_grid_thw"].tolist() == [[1, *patch_grid(200, 300, 16, 128, "figure2")]]
    assert small["pixel_values"].shape[1] == 3 * 16 * 16
    assert processor.get_patch_grid(200, 300) == (7, 10)  # the processor is unchanged


def test_do_resize_false_requires_multiples_of_the_patch_size(processor):
    image = photo(96, 64)
    output = processor(image, do_resize=False)
    assert output["image_grid_thw"].tolist() == [[1, 2, 3]]
    with pytest.raises(ValueError, match="multiples of 32 pixels, not 64 x 95"):
        processor(photo(95, 64), do_resize=False)


@given(
    sides,
    sides,
    st.sampled_from([{}, {"patch_size": 16}, {"size": {"longest_edge": 512}}, {"resize_rule": "figure2"}]),
)
def test_number_of_patches_without_an_image(width, height, settings):
    processor = _shared_processor()
    rows, columns = patch_grid(
        height,
        width,
        settings.get("patch_size", 32),
        settings.get("size", {}).get("longest_edge", 1024),
        settings.get("resize_rule", "original"),
    )
    assert processor.get_number_of_image_patches(height, width, settings) == rows * columns


@functools.cache
def _shared_processor():
    return SoloImageProcessor()


def test_save_and_load(tmp_path):
    saved = SoloImageProcessor(size={"longest_edge": 512}, resize_rule="figure2", do_rescale=True)
    saved.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"]
        == "SoloImageProcessor"
    )
    for loader in (SoloImageProcessor, AutoImageProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is SoloImageProcessor
        assert loaded.to_dict() == saved.to_dict()
        image = photo(200, 100)
        np.testing.assert_array_equal(loaded(image)["pixel_values"], saved(image)["pixel_values"])


def test_exported_code_runs_without_the_package(tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(SoloImageProcessor, "_auto_class", "AutoImageProcessor")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    SoloImageProcessor().save_pretrained(tmp_path / "model")
    assert {"image_processing_solo.py", "image_loading_solo.py"} <= {
        p.name for p in (tmp_path / "model").iterdir()
    }
    exported = dynamic.get_class_from_dynamic_module(
        "image_processing_solo.SoloImageProcessor", str(tmp_path / "model")
    )
    assert exported is not SoloImageProcessor
    image = photo(80, 40)
    np.testing.assert_array_equal(
        exported()(image)["pixel_values"], SoloImageProcessor()(image)["pixel_values"]
    )


# --- other libraries give Pillow's pixels ---------------------------------------------------------


@pytest.fixture(params=["fast", "fallback"])
def engine(request, monkeypatch):
    """Run with the compiled library, simplejpeg and OpenCV, and without, like a published folder."""
    if request.param == "fallback":
        monkeypatch.setattr(image_processing_solo, "_library", None)
        monkeypatch.setattr(image_loading_solo, "simplejpeg", None)
        monkeypatch.setattr(image_processing_solo, "cv2", None)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {}),
        ("RGB", {"subsampling": "4:4:4", "quality": 100}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"subsampling": "4:2:0", "quality": 30}),
        ("RGB", {"subsampling": "4:1:1"}),
        ("RGB", {"progressive": True}),
        ("RGB", {"restart_marker_rows": 1, "optimize": True}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}),
        ("RGB", {"comment": "\xff\xd9"}),
        ("RGB", {"comment": "\xff\xda", "exif": _exif(orientation=6)}),
        ("RGB", {"xmp": b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="8"/>'}),
        ("RGB", {"exif": _exif(orientation=1)}),
        ("RGB", {"exif": _exif(orientation=6)}),
        ("RGB", {"exif": b"Exif\0\0broken"}),
    ],
)
@pytest.mark.parametrize("size", [(50, 37), (1, 1), (8, 200), (333, 16)])
def test_decoded_jpegs_equal_pillow(mode, size, options):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).convert(mode), "JPEG", **options)
    by_pillow = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(load_pixels(data), np.asarray(by_pillow))
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(by_pillow))


@pytest.mark.parametrize("place", [2, 20])
@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xff", b"\xff\xd0", b"\xff\0", b"\xff\xe0\0\0"])
def test_fill_bytes_between_segments_keep_the_orientation(place, filling):
    data = encoded(photo(60, 40), "JPEG", exif=_exif(orientation=6))
    data = data[:place] + filling + data[place:]
    by_pillow = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(load_pixels(data), np.asarray(by_pillow))


def test_truncated_jpegs_are_rejected():
    thumbnail = encoded(photo(20, 10), "JPEG")
    exif = _exif(orientation=1) + thumbnail  # a file truncated after it ends like a complete one
    data = encoded(photo(60, 40), "JPEG", exif=exif, restart_marker_rows=1)
    assert load_pixels(data).shape == (40, 60, 3)
    for end in range(len(data)):
        with pytest.raises(ImageError):
            load_pixels(data[:end])


def test_damaged_jpegs_equal_pillow(monkeypatch):
    data = np.frombuffer(encoded(photo(80, 60), "JPEG", subsampling="4:2:0"), np.uint8)
    random = np.random.default_rng(2)

    def outcome(damaged: bytes) -> object:
        try:
            return load_pixels(damaged).tobytes()
        except ImageError:
            return "refused"

    for _ in range(300):
        damaged = data.copy()
        places = random.integers(150, len(data) - 2, 3)
        damaged[places] = random.integers(0, 256, 3)
        with_simplejpeg = outcome(damaged.tobytes())
        with monkeypatch.context() as without:
            without.setattr(image_loading_solo, "simplejpeg", None)
            assert outcome(damaged.tobytes()) == with_simplejpeg


@pytest.mark.parametrize("source", ["array", "PIL", "JPEG", "PNG"])
def test_pixels_are_writable_copies(source):
    image = photo(40, 30)
    array = np.array(image)
    sources = {"array": array, "PIL": image, "JPEG": encoded(image, "JPEG"), "PNG": encoded(image)}
    pixels = load_pixels(sources[source])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (30, 40, 3)
    pixels[:] = 0
    assert array.any()
    assert np.asarray(image).any()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("side", [1, 7, 14, 32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_patches_reassemble_to_the_image(side, order):
    image = np.array(photo(3 * side, 2 * side), order=order)
    patches = image_to_patches(image, side).reshape(2, 3, 3, side, side)
    joined = np.concatenate(
        [np.concatenate([patches[r, c].transpose(1, 2, 0) for c in range(3)], axis=1) for r in range(2)]
    )
    np.testing.assert_array_equal(joined, image)
    np.testing.assert_array_equal(patches_to_image(image_to_patches(image, side), 2, 3), image)


short_sides = st.integers(1, 150)


@pytest.mark.usefixtures("engine")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(short_sides, short_sides, short_sides, short_sides, st.integers(0, 9))
def test_resize_matches_pillow(height, width, new_height, new_width, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = Image.fromarray(noise).resize((new_width, new_height), Image.Resampling.BILINEAR)
    resized = resize(noise, new_height, new_width)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous  # cutting it into patches would take ten times as long
    difference = abs(resized.astype(int) - np.asarray(expected))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-3


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("filter_", [Image.Resampling.BICUBIC, Image.Resampling.NEAREST])
def test_other_filters_equal_pillow(filter_):
    image = photo(50, 40)
    output = SoloImageProcessor(resample=filter_)(image)["pixel_values"]
    np.testing.assert_array_equal(output, image_to_patches(image.resize((64, 64), filter_), 32))


# --- enlarge.c ------------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform == "win32" or not shutil.which("cc"),
    reason="enlarge.c is compiled on x86-64 with a C compiler",
)


def by_opencv(pixels: np.ndarray, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """Resize with OpenCV, then cut by the definition of a patch."""
    size = (columns * patch_size, rows * patch_size)
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    patches = resized.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return patches.reshape(rows * columns, -1)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@needs_library
def test_library_is_compiled() -> None:
    assert LIBRARY.exists(), "enlarge.c is not compiled: run `make venv` again"


@needs_library
@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(6, 400),
    larger=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    patch_size=st.sampled_from([32, 64, 96]),
    extremes=st.booleans(),
)
def test_enlarged_patches_equal_opencv(height, width, larger, patch_size, extremes) -> None:
    pixels = noise(height, width)
    if extremes:
        pixels = (pixels >> 7) * np.uint8(255)
    rows, columns = -(-height // patch_size) + larger[0], -(-width // patch_size) + larger[1]
    patches = enlarge_to_patches(pixels, rows, columns, patch_size)
    np.testing.assert_array_equal(patches, by_opencv(pixels, rows, columns, patch_size))


@needs_library
def test_enlarge_accepts_strided_pixels() -> None:
    pixels = noise(90, 100)[::2, 10:60]
    np.testing.assert_array_equal(enlarge_to_patches(pixels, 2, 2, 32), by_opencv(pixels, 2, 2, 32))


@needs_library
@pytest.mark.parametrize(
    ("height", "width", "patch_size"),
    [(65, 20, 32), (20, 65, 32), (20, 5, 32), (20, 20, 16), (20, 20, 48)],
    ids=["lower", "narrower", "five-pixels-wide", "half-lines", "lines-and-a-half"],
)
def test_unsupported_sizes_fall_back_to_resize(height, width, patch_size) -> None:
    assert enlarge_to_patches(noise(height, width), 2, 2, patch_size) is None


@needs_library
def test_patches_are_the_same_without_the_library(monkeypatch) -> None:
    images = [noise(*size) for size in ((375, 500), (64, 96), (33, 65), (1, 1), (700, 1100))]
    compiled = [SoloImageProcessor().encode_image(image)[0] for image in images]
    monkeypatch.setattr(image_processing_solo, "_library", None)
    for image, patches in zip(images, compiled, strict=True):
        np.testing.assert_array_equal(SoloImageProcessor().encode_image(image)[0], patches)


# --- sources --------------------------------------------------------------------------------------


def test_every_source_gives_the_same_pixels(tmp_path, processor):
    image = photo(50, 30)
    expected = np.array(image)
    data = encoded(image)
    text = base64.b64encode(data).decode()
    path = tmp_path / "an image.png"
    path.write_bytes(data)
    sources = {
        "PIL": image,
        "path": path,
        "string": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "base64": text,
        "base64 lines": base64.encodebytes(data).decode(),
        "base64 url-safe": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "data URL": f"data:image/png;base64,{text}",
        "data URL, no type": f"data:;base64,{text}",
        "data URL, escaped": "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        "HWC": expected,
        "CHW": expected.transpose(2, 0, 1),
        "float": expected / 255,
        "float32 CHW": (expected.transpose(2, 0, 1) / 255).astype(np.float32),
        "float 0..255": expected.astype(np.float32),
        "int64": expected.astype(np.int64),
        "16-bit": expected.astype(np.uint16) * 257,
        "RGBA": np.dstack([expected, np.full((30, 50), 255, np.uint8)]),
        "torch CHW": torch.from_numpy(expected).permute(2, 0, 1),
        "torch float": torch.from_numpy(expected / 255),
        "torch gradient": torch.from_numpy(expected / 255).requires_grad_(),
        "torch int": torch.from_numpy(expected).int(),
    }
    for kind, source in sources.items():
        np.testing.assert_array_equal(pixels(source), expected, err_msg=kind)
    patches = processor(image)["pixel_values"]
    every = processor(list(sources.values()))["pixel_values"]
    np.testing.assert_array_equal(every, np.tile(patches, (len(sources), 1)))
    # bfloat16 keeps 8 bits: half a percent.
    assert abs(pixels((torch.from_numpy(expected) / 255).bfloat16()).astype(int) - expected).max() <= 1


def test_batched_arrays(processor):
    batch = np.stack([np.asarray(photo(40, 60, seed=seed)) for seed in range(3)])
    expected = processor(list(batch))
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), [batch[:1], batch[1:]]):
        np.testing.assert_array_equal(processor(images)["pixel_values"], expected["pixel_values"])


def test_gray_arrays_and_axis_order(processor):
    gray = np.asarray(photo(9, 6, "L"))
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    for array in (gray, gray[:, :, None], gray[None], np.dstack([gray, np.full_like(gray, 255)])):
        np.testing.assert_array_equal(pixels(array), expected)
    assert load_image(np.ones((1, 500, 3), np.uint8)).size == (500, 1)  # a row of RGB
    assert load_image(np.ones((3, 500, 3), np.uint8)).size == (3, 500)  # both fit: channels first
    assert load_image(np.ones((3, 500, 3), np.uint8), input_data_format="channels_last").size == (500, 3)
    output = processor(np.ones((3, 500, 3), np.uint8), input_data_format="channels_last")
    assert output["image_grid_thw"].tolist() == [[1, 1, 16]]
    assert pixels(np.array([[True, False]])).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 5, 7), np.uint8),
        np.zeros((2, 2, 2, 2, 2), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros(5, np.uint8),
        np.full((5, 5, 3), 300, np.int32),
        np.full((5, 5, 3), -1, np.int32),
        np.full((5, 5, 3), np.nan),
        np.full((5, 5, 3), 1000.0),
        np.full((5, 5, 3), -0.5),
        np.full((5, 5, 3), "x"),
        torch.zeros(5, 5, 9),
    ],
)
def test_invalid_arrays_are_rejected(array):
    with pytest.raises(ImageError):
        load_image(array)


def test_other_types_are_rejected(processor):
    for source in (5, None, {"url": "x"}, object()):
        with pytest.raises(TypeError, match="PIL image, array, tensor"):
            load_image(source)
    with pytest.raises(TypeError):
        processor([photo(5, 5), None])


# --- kinds of image -------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, file_format):
    upright = photo(64, 40)
    stored = {  # how a camera in that position would have stored the picture
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {"lossless": True}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, **options)
    image = load_image(data)
    assert image.size == (64, 40)
    assert abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 3  # JPEG loses a little
    np.testing.assert_array_equal(pixels(image), np.asarray(image))  # loading it again does not rotate it
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), np.asarray(image))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored():
    image = photo(40, 30)
    data = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert load_image(data).size == (40, 30)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "TGA", "JPEG2000"])
def test_formats(tmp_path, file_format):
    image = photo(32, 32)
    path = tmp_path / "image"
    options = {"lossless": True} if file_format == "WEBP" else {}
    image.save(path, file_format, **options)
    loaded = load_image(path)
    assert loaded.size == (32, 32)
    # GIF has 256 colors.
    assert abs(np.asarray(loaded).astype(int) - np.asarray(image)).mean() < (
        12 if file_format == "GIF" else 0.01
    )
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(loaded))), np.asarray(loaded))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_convert_like_pillow(mode):
    image = photo(40, 30, "RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = image.convert("LAB")
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))
    if mode in ("1", "L", "P", "CMYK", "YCbCr"):
        data = encoded(image, "TIFF")
        np.testing.assert_array_equal(pixels(data), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg():
    data = encoded(photo(40, 30, "CMYK"), "JPEG", quality=95)
    assert abs(pixels(data).astype(int) - np.asarray(photo(40, 30))).mean() < 6


def test_transparency_is_composited_on_white():
    rgba = np.asarray(photo(40, 30, "RGBA"))
    color, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    expected = color * alpha + 255 * (1 - alpha)
    gray = np.asarray(photo(40, 30, "L"))
    gray_alpha = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(rgba[..., 3].copy())])
    for source in (Image.fromarray(rgba), encoded(Image.fromarray(rgba)), rgba, rgba.transpose(2, 0, 1)):
        assert abs(pixels(source) - expected).max() <= 1
    expected_gray = np.repeat(gray[..., None] * alpha + 255 * (1 - alpha), 3, axis=2)
    for source in (gray_alpha, encoded(gray_alpha), np.asarray(gray_alpha)):
        assert abs(pixels(source) - expected_gray).max() <= 1
    assert abs(pixels(Image.fromarray(rgba).convert("RGBa")) - expected).max() <= 3  # premultiplied: coarser
    assert abs(pixels(gray_alpha.convert("La")) - expected_gray).max() <= 3


def test_transparent_colors_are_composited_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    expected = [[[255, 255, 255], [0, 0, 255]]]
    assert pixels(encoded(palette, transparency=0)).tolist() == expected
    assert pixels(encoded(palette, transparency=bytes([0, 255]))).tolist() == expected
    assert pixels(encoded(palette, "GIF", transparency=0)).tolist() == expected
    assert pixels(encoded(palette.convert("RGB"), transparency=(255, 0, 0))).tolist() == expected
    half = pixels(encoded(palette, transparency=bytes([128, 255])))
    assert half[0, 0].tolist() == [255, 127, 127]
    gray = Image.fromarray(np.array([[7, 90]], np.uint8))
    assert pixels(encoded(gray, transparency=7)).tolist() == [[[255] * 3, [90] * 3]]


def test_sixteen_bits_use_their_full_range(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    big_endian = Image.frombytes("I;16B", image.size, values.astype(">u2").tobytes())
    for source in (image, big_endian, encoded(image), encoded(image, "TIFF"), values, values.astype(">u2")):
        np.testing.assert_array_equal(pixels(source), expected)
    np.testing.assert_array_equal(pixels(Image.fromarray(values.astype(np.int32))), expected)  # mode I
    pgm = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(pgm), expected)
    with pytest.raises(ImageError, match=r"0\.\.65535"):
        load_image(Image.fromarray(np.array([[70000]], np.int32)))


def test_float_images():
    unit = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert unit.mode == "F"
    assert pixels(unit)[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(encoded(unit, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    levels = photo(20, 10, "L")
    np.testing.assert_array_equal(pixels(levels.convert("F"))[..., 0], np.asarray(levels))
    with pytest.raises(ImageError, match="span"):
        load_image(Image.fromarray(np.array([[-1, 4000]], np.float32)))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(file_format):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    image = load_image(data)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(frames[0]))
    np.testing.assert_array_equal(pixels(image), np.asarray(frames[0]))


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1), (1, 1), (2, 65_535), (65_535, 1)])
def test_extreme_shapes(processor, width, height):
    output = processor(encoded(Image.new("RGB", (width, height), (10, 20, 30))))
    assert output["image_grid_thw"].tolist() == [[1, min(-(-height // 32), 32), min(-(-width // 32), 32)]]
    assert np.unique(output["pixel_values"][:, :1024]).tolist() == [10]


# --- files other than images ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"hello", "not an image of a supported format"),
        (b"\0" * 1000, "not an image of a supported format"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG is a vector format"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<svg width="4"/>', "SVG is a vector format"),
        (b"\n<!DOCTYPE html><html></html>", "HTML page"),
        (b"%PDF-1.7\n", "PDF is a document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "EPS is a program"),
        (b"\xff\xd8\xff", "truncated or damaged"),
        (b"\x89PNG\r\n\x1a\n", "truncated or damaged"),
        (b"GIF89a", "truncated or damaged"),
    ],
)
def test_files_other_than_images_are_rejected(tmp_path, processor, content, message):
    path = tmp_path / "upload.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ImageFetchError)
    with pytest.raises(ValueError):
        processor(content)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files(file_format, kept):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), file_format)
    with pytest.raises(ImageError, match=r"image of [0-9]+ bytes: ") as caught:
        load_image(data[: int(len(data) * kept)])
    assert not isinstance(caught.value, ImageFetchError)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "TGA", "PPM"])
def test_damaged_files_raise_image_errors_only(file_format):
    data = encoded(photo(40, 30), file_format)
    random = np.random.default_rng(1)
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = random.integers(0, len(damaged), 8)
        damaged[places] = random.integers(0, 256, 8)
        try:
            assert load_image(damaged.tobytes(), max_pixels=10**6).mode == "RGB"
        except ImageError as error:
            assert not isinstance(error, ImageFetchError)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 30_000, 60_000])
def test_pixel_bombs_are_rejected_by_their_header(side):
    start = time.perf_counter()
    with pytest.raises(ImageError, match="pixels"):
        load_image(png_header(side, side))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["image.png", "image.jpg"])
def test_pixel_limit(tmp_path, name):
    path = tmp_path / name
    photo(100, 50).save(path)
    assert load_image(path, max_pixels=5000).size == (100, 50)
    with pytest.raises(ImageError, match=r"100 x 50 is more than the limit of 4,999 pixels"):
        load_image(path, max_pixels=4999)
    with pytest.raises(ImageError, match="limit"):
        load_image(Image.open(path), max_pixels=4999)
    # An image loaded with a raised limit is accepted afterwards.
    assert load_image(load_image(path, max_pixels=5000), max_pixels=10).size == (100, 50)


def test_empty_images():
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ImageError, match="no pixels"):
            load_image(Image.new("RGB", size))


def test_missing_and_unreadable_files(tmp_path, processor):
    for source, message in (
        (tmp_path / "none.png", "No such file"),
        (str(tmp_path / "none.png"), "No such file"),
        ("none.png", "none.png: No such file"),
        (tmp_path, "Is a directory"),
        ("x\0y", "null"),
    ):
        with pytest.raises(ImageFetchError, match=message) as caught:
            processor(source)
        assert isinstance(caught.value, ImageMissingError)
    closed = Image.open(io.BytesIO(encoded(photo(5, 5))))
    closed.close()
    with pytest.raises(ImageError):
        load_image(closed)


def test_malformed_strings_are_rejected():
    text = base64.b64encode(encoded(photo(50, 30))).decode()
    for source, message in (
        ("data:image/png;base64,@@@", "invalid base64"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,", "empty file"),
        (text[:200], "base64 image: "),
        (base64.b64encode(b"some words " * 10).decode(), "base64 image: not an image"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(source)
    with pytest.raises(ImageError) as caught:
        load_image("no such picture " * 1000)
    assert len(str(caught.value)) < 300


def test_error_names_and_disallowed_sources(tmp_path):
    path = tmp_path / "image.png"
    photo(50, 30).save(path)
    with pytest.raises(ImageError, match=r"shard-3\.tar/7\.jpg: empty file"):
        load_image(b"", name="shard-3.tar/7.jpg")
    for source in (path, str(path)):
        with pytest.raises(ImageError, match="reading local files is not allowed"):
            load_image(source, allow_paths=False)
    with pytest.raises(ImageError, match="fetching URLs is not allowed"):
        load_image("http://127.0.0.1:1/a.png", allow_urls=False)
    data_url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    assert load_image(data_url, allow_paths=False, allow_urls=False).size == (50, 30)


# --- the network ----------------------------------------------------------------------------------


class _Site(http.server.BaseHTTPRequestHandler):
    png = encoded(photo(50, 30))

    def do_GET(self):
        if self.path == "/moved":
            self._head(302, Location="/a%20picture.png?size=large")
        elif self.path == "/to-file":
            self._head(302, Location="file:///etc/hostname")
        elif self.path == "/short":
            self._head(200, **{"Content-Length": str(len(self.png))})
            self.wfile.write(self.png[:50])
        elif self.path == "/slow":
            self._head(200)
            for byte in self.png[:20]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif self.path == "/page":
            self._head(200)
            self.wfile.write(b"<html>please log in</html>")
        elif self.path in ("/a%20picture.png?size=large", "/%C3%A9t%C3%A9.png"):
            self._head(200)
            self.wfile.write(self.png)
        else:
            self._head(404)

    def _head(self, status, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("no_proxy", "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "path", ["/a picture.png?size=large", "/a%20picture.png?size=large", "/moved", "/été.png"]
)
def test_download(site, processor, path):
    np.testing.assert_array_equal(pixels(site + path), np.asarray(photo(50, 30)))
    assert processor(site + path)["image_grid_thw"].tolist() == [[1, 2, 2]]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/none.png", {}, "HTTP 404"),
        ("/short", {}, "download ended after 50 of"),
        ("/slow", {"timeout": 0.2}, "not complete after 0.2 s"),
        ("/to-file", {}, "HTTP 302|download failed"),
    ],
)
def test_failed_download(site, path, options, message):
    with pytest.raises(ImageFetchError, match=message) as caught:
        load_image(site + path, **options)
    assert site + path in str(caught.value)


def test_download_over_the_limit_or_without_image(site):
    with pytest.raises(ImageError, match="larger than the limit of 100 bytes"):
        load_image(site + "/moved", max_bytes=100)
    with pytest.raises(ImageError, match="HTML page"):
        load_image(site + "/page")
    for url in ("http://127.0.0.1:1/refused.png", "http://", "http://[bad/x.png", "http://127.0.0.1:x/a.png"):
        with pytest.raises(ImageFetchError, match="download failed"):
            load_image(url, timeout=5)
