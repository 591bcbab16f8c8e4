"""Pixel formats of files: bit depths, inverted grays, transparent colors, planes and color profiles."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from solo_vlm.models.solo import image_loading_solo
from solo_vlm.models.solo.image_loading_solo import (
    ImageError,
    ImageMissingError,
    image_size,
    load_image,
    load_pixels,
)

GRAY, RGB = 0, 2  # color types of PNG
WHITE_IS_ZERO, BLACK_IS_ZERO, TRUE_COLOR = 0, 1, 2  # photometric interpretations of TIFF


def png(samples: np.ndarray, bits: int, transparent: tuple[int, ...] | None = None) -> bytes:
    """Encode (rows, columns) gray or (rows, columns, 3) RGB samples of any depth as PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = samples.shape[:2]
    header = struct.pack(">IIBBBBB", columns, rows, bits, GRAY if samples.ndim == 2 else RGB, 0, 0, 0)
    lines = b"".join(b"\0" + pack_bits(row.ravel(), bits) for row in samples)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    body = chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Pack values of `bits` bits each, most significant bit first, padded to whole bytes."""
    digits = (values[:, None].astype(np.uint32) >> np.arange(bits - 1, -1, -1, dtype=np.uint32)) & 1
    return np.packbits(digits.astype(np.uint8).ravel()).tobytes()


def tiff(
    strips: list[bytes],
    shape: tuple[int, int],
    bits: int,
    photometric: int = BLACK_IS_ZERO,
    samples: int = 1,
    sample_format: int = 1,
    planar: int = 1,
    order: str = "<",
    compressed: bool = False,
) -> bytes:
    """Return a TIFF of one strip, or one per plane."""
    rows, columns = shape
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    values = {
        256: [columns],
        257: [rows],
        258: [bits] * samples,
        259: [8 if compressed else 1],
        262: [photometric],
        273: [0] * len(strips),  # set below
        277: [samples],
        278: [rows],
        279: [len(strip) for strip in strips],
        284: [planar],
        339: [sample_format] * samples,
    }
    start = 8 + 2 + 12 * len(values) + 4
    extra_size = sum(4 * len(value) for value in values.values() if len(value) > 1)
    ends = np.cumsum([start + extra_size, *map(len, strips)]).tolist()
    values[273] = ends[:-1]
    directory, extra = b"", b""
    for tag, value in values.items():
        kind, code = (3, "H") if tag in (258, 339) else (4, "I")
        content = struct.pack(f"{order}{len(value)}{code}", *value)
        if len(content) > 4:
            place = start + len(extra)
            extra += content.ljust(4 * len(value), b"\0")
            content = struct.pack(f"{order}I", place)
        directory += struct.pack(f"{order}HHI", tag, kind, len(value)) + content.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(values))
    return head + directory + bytes(4) + extra.ljust(extra_size, b"\0") + b"".join(strips)


def ramp(bits: int, columns: int = 64) -> np.ndarray:
    """Return two rows from 0 to the largest value, the second reversed."""
    row = np.rint(np.linspace(0, 2**bits - 1, columns)).astype(np.int64)
    return np.stack([row, row[::-1]])


def levels(samples: np.ndarray, bits: int) -> np.ndarray:
    """Scale the full range to 0..255, as gray RGB."""
    gray = np.rint(samples * 255 / (2**bits - 1)).astype(int)
    return np.repeat(gray[..., None], 3, axis=2) if gray.ndim == 2 else gray


def assert_close(source: object, expected: np.ndarray, within: int = 1) -> None:
    for pixels in (load_pixels(source), np.asarray(load_image(source))):
        assert pixels.dtype == np.uint8
        assert abs(pixels.astype(int) - expected).max() <= within


# --- depths and inverted grays ------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_tiff_of_any_depth(bits, photometric, compressed):
    samples = ramp(bits)
    packed = samples.astype("<u2").tobytes() if bits == 16 else b"".join(pack_bits(r, bits) for r in samples)
    expected = levels(samples, bits)
    assert_close(
        tiff([packed], samples.shape, bits, photometric, compressed=compressed),
        255 - expected if photometric == WHITE_IS_ZERO else expected,
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
def test_float_tiff(photometric, order):
    samples = np.linspace(0, 1, 128).reshape(2, 64)
    expected = np.repeat(np.rint(samples * 255).astype(int)[..., None], 3, axis=2)
    data = tiff(
        [samples.astype(f"{order}f4").tobytes()], samples.shape, 32, photometric, sample_format=3, order=order
    )
    assert_close(data, 255 - expected if photometric == WHITE_IS_ZERO else expected)


@pytest.mark.parametrize("compressed", [False, True])
def test_packed_12_bit_tiff(compressed):
    samples = ramp(12)
    packed = b"".join(pack_bits(row, 12) for row in samples)
    assert_close(tiff([packed], samples.shape, 12, compressed=compressed), levels(samples, 12))


def test_big_endian_16_bit_tiff():
    samples = ramp(16)
    data = tiff([samples.astype(">u2").tobytes()], samples.shape, 16, order=">")
    assert_close(data, levels(samples, 16))


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_tiff_is_rejected(bits):
    samples = (ramp(bits) - 2 ** (bits - 1)).astype(f"<i{bits // 8}")
    for signed in (samples, abs(samples // 2)):
        data = tiff([signed.tobytes()], samples.shape, bits, sample_format=2)
        with pytest.raises(ImageError, match="signed"):
            load_image(data)


def test_tiff_of_unknown_depth_is_rejected():
    samples = ramp(16) % 1024
    with pytest.raises(ImageError, match="pixel format"):
        load_image(tiff([b"".join(pack_bits(row, 10) for row in samples)], samples.shape, 10))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_color_tiff_chunky_and_planar(planar, bits, order, compressed):
    samples = np.stack([ramp(bits), ramp(bits)[::-1], ramp(bits) // 2], axis=2)
    stored = samples.astype(f"{order}u{bits // 8}")
    strips = [stored[..., c].tobytes() for c in range(3)] if planar == 2 else [stored.tobytes()]
    data = tiff(
        strips,
        samples.shape[:2],
        bits,
        TRUE_COLOR,
        samples=3,
        planar=planar,
        order=order,
        compressed=compressed,
    )
    assert_close(data, levels(samples, bits))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_png_of_any_depth(bits):
    assert_close(png(ramp(bits), bits), levels(ramp(bits), bits))


def test_16_bit_color_png():
    samples = np.stack([ramp(16), ramp(16)[::-1], ramp(16) // 2], axis=2)
    assert_close(png(samples, 16), levels(samples, 16))


@pytest.mark.parametrize("largest", [1, 100, 255, 1023, 4095, 65535])
def test_pgm_of_any_range(largest):
    samples = np.rint(np.linspace(0, largest, 64)).astype(int)[None]
    body = samples.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    expected = np.repeat(np.rint(samples * 255 / largest).astype(int)[..., None], 3, axis=2)
    assert_close(b"P5 64 1 %d\n" % largest + body, expected)


# --- transparent colors ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("place", [0, 20, 63])
def test_transparent_gray_of_a_png(bits, place):
    samples = ramp(bits)
    key = int(samples[0, place])
    expected = np.where((samples == key)[..., None], 255, levels(samples, bits))
    data = png(samples, bits, transparent=(key,))
    assert_close(data, expected)
    assert_close(Image.open(io.BytesIO(data)), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_color_of_a_png(bits):
    samples = np.stack([ramp(bits), ramp(bits)[::-1], ramp(bits) // 2], axis=2)
    near = samples[0, 20].copy()
    near[2] ^= 1  # differs in the last bit only
    samples[1, 5] = near
    key = samples[0, 20]
    expected = np.where((samples == key).all(axis=2)[..., None], 255, levels(samples, bits))
    assert expected[1, 5].tolist() != [255] * 3
    assert_close(png(samples, bits, transparent=tuple(key.tolist())), expected)


# --- color profiles ----------------------------------------------------------------------------------

SRGB_TO_XYZ = [
    [0.4360747, 0.3850649, 0.1430804],
    [0.2225045, 0.7168786, 0.0606169],
    [0.0139322, 0.0971045, 0.7141733],
]
ADOBE_TO_XYZ = [
    [0.6097559, 0.2052401, 0.1492240],
    [0.3111242, 0.6256560, 0.0632197],
    [0.0194811, 0.0608902, 0.7448387],
]
ADOBE_GAMMA = 563 / 256


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """Return an ICC profile, version 2, with these tags."""
    xyz = [0.9642, 1.0, 0.8249]
    tags = {b"wtpt": xyz_tag(xyz), b"desc": b"desc\0\0\0\0\0\0\0\x01\0".ljust(92, b"\0"), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(tag))
        body += tag.ljust(-(-len(tag) // 4) * 4, b"\0")
    header = struct.pack(">I4xI4s4s4s", start + len(body), 0x02400000, kind, space, pcs)
    header = header.ljust(36, b"\0") + b"acsp"
    return header.ljust(68, b"\0") + xyz_tag(xyz)[8:].ljust(60, b"\0") + table + body


def xyz_tag(values: list[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma_tag(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def adobe_rgb() -> bytes:
    columns = zip(*ADOBE_TO_XYZ, strict=True)
    colors = {
        name: xyz_tag(list(column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    return profile(b"RGB ", {**colors, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma_tag(ADOBE_GAMMA))})


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Convert linear light to levels (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_to_srgb(pixels: np.ndarray) -> np.ndarray:
    xyz = (pixels / 255) ** ADOBE_GAMMA @ np.array(ADOBE_TO_XYZ).T
    return encode_srgb(xyz @ np.linalg.inv(SRGB_TO_XYZ).T)


def muted(width: int = 48, height: int = 32) -> np.ndarray:
    """Return smooth colors within sRGB's gamut, so that clipping does not matter."""
    noise = np.random.default_rng(0).integers(60, 180, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(image_loading_solo, "simplejpeg", None)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_wide_gamut_profile_is_converted_to_srgb(decoder, file_format):
    image = Image.fromarray(muted())
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    stored = np.asarray(load_image(encoded(image, file_format, **options))).astype(int)
    data = encoded(image, file_format, icc_profile=adobe_rgb(), **options)
    expected = adobe_to_srgb(stored)
    assert abs(expected - stored).max() > 8
    assert_close(data, expected, within=1.6)
    loaded = load_image(data)
    assert_close(loaded, np.asarray(loaded).astype(int), within=0)  # not converted twice
    assert_close(Image.open(io.BytesIO(data)), expected, within=1.6)


def test_profile_applies_to_palettes_and_transparency(tmp_path):
    rgb = Image.fromarray(muted())
    palette = rgb.quantize(16)
    assert_close(
        encoded(palette, "PNG", icc_profile=adobe_rgb()),
        adobe_to_srgb(np.asarray(palette.convert("RGB"))),
        1.6,
    )
    rgba = rgb.copy()
    alpha = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
    rgba.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = adobe_to_srgb(muted()) * share + 255 * (1 - share)
    assert_close(encoded(rgba, "PNG", icc_profile=adobe_rgb()), expected, 2)


@pytest.mark.parametrize("bits", [8, 16])
def test_gray_profile_is_converted_to_srgb(bits):
    gray_profile = profile(b"GRAY", {b"kTRC": gamma_tag(1.8)})
    samples = ramp(bits)
    image = Image.fromarray(samples.astype(np.uint8 if bits == 8 else np.uint16))
    expected = encode_srgb((levels(samples, bits) / 255) ** 1.8)
    assert_close(encoded(image, "PNG", icc_profile=gray_profile), expected, within=1.6)


def test_cmyk_profile_is_converted_to_srgb():
    """In the profile, paper is white, any full ink is black, and lightness is linear in between."""
    inks = np.zeros((2, 2, 2, 2, 3), np.uint8) + np.array([0, 128, 128], np.uint8)
    inks[0, 0, 0, 0, 0] = 255
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + straight * 4 + inks.tobytes() + straight * 3
    cmyk_profile = profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, kind=b"prtr", pcs=b"Lab ")
    black = ramp(8).astype(np.uint8)
    image = Image.merge("CMYK", [Image.new("L", (64, 2))] * 3 + [Image.fromarray(black)])
    lightness = 100 * (1 - black / 255)
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    expected = np.repeat(encode_srgb(luminance)[..., None], 3, axis=2)
    assert_close(encoded(image, "TIFF", icc_profile=cmyk_profile), expected, within=2)
    jpeg = encoded(image, "JPEG", quality=100, icc_profile=cmyk_profile)
    assert abs(load_pixels(jpeg).astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    "unusable",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"broken",
        adobe_rgb()[:200],
        profile(b"GRAY", {b"kTRC": gamma_tag(1.8)}),
    ],
    ids=["sRGB", "broken", "cut short", "of another color space"],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_unusable_profiles_are_ignored(decoder, file_format, unusable):
    image = Image.fromarray(muted())
    plain = encoded(image, file_format)
    np.testing.assert_array_equal(
        load_pixels(encoded(image, file_format, icc_profile=unusable)), load_pixels(plain)
    )


def test_file_urls_follow_the_rules_of_paths(tmp_path):
    path = tmp_path / "a b.png"
    Image.fromarray(muted()).save(path)
    for url in (path.as_uri(), f"file://{path}", f"file://localhost{path}"):
        np.testing.assert_array_equal(load_pixels(url), muted())
        with pytest.raises(ImageError, match="reading local files is not allowed"):
            load_image(url, allow_paths=False)
    with pytest.raises(ImageMissingError, match="absolute path"):
        load_image("file://a b.png")


def test_errors_about_undecodable_file_names_are_printable():
    with pytest.raises(ImageMissingError) as error:
        load_image("caf\udce9.png")
    str(error.value).encode()


def test_png_without_its_palette_is_rejected():
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "PNG")
    data = file.getvalue()
    start = data.index(b"PLTE") - 4
    length = int.from_bytes(data[start : start + 4], "big")
    with pytest.raises(ImageError, match="its pixels refer to a palette, but it has none"):
        load_image(data[:start] + data[start + 12 + length :])


ORIENTED = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF")


@pytest.mark.parametrize("file_format", [*ORIENTED, "GIF", "BMP", "PPM", "TGA", "JPEG2000"])
def test_size_by_the_header_is_that_of_the_decoded_image(decoder, tmp_path, file_format):
    image = Image.fromarray(np.zeros((20, 33, 3), np.uint8))
    for orientation in range(9) if file_format in ORIENTED else [0]:
        exif = Image.Exif()
        exif[0x112] = orientation
        data = encoded(image, file_format, **({"exif": exif} if orientation else {}))
        height, width = load_pixels(data).shape[:2]
        assert image_size(data) == (height, width) == ((33, 20) if orientation > 4 else (20, 33))
    (tmp_path / "image").write_bytes(data)
    assert image_size(str(tmp_path / "image")) == (height, width)


@pytest.mark.parametrize("keyword", ["Raw profile type exif", "XML:com.adobe.xmp"])
def test_size_heeds_an_orientation_in_the_texts_of_a_png(keyword):
    exif = Image.Exif()
    exif[0x112] = 6
    texts = PngImagePlugin.PngInfo()
    if keyword.startswith("Raw"):
        texts.add_text(keyword, f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n", zip=True)
    else:
        texts.add_itxt(keyword, '<x:xmpmeta tiff:Orientation="6"/>')
    data = encoded(Image.fromarray(np.zeros((20, 33, 3), np.uint8)), "PNG", pnginfo=texts)
    assert image_size(data) == load_pixels(data).shape[:2] == (33, 20)


def test_size_is_known_before_damage_is_found():
    data = encoded(Image.effect_noise((200, 100), 50).convert("RGB"), "JPEG")[:-500]
    assert image_size(data) == (100, 200)
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_pixels(data)
    with pytest.raises(ImageError, match="truncated or damaged"):
        image_size(data[:20])
