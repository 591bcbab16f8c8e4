"""Image files that are small and costly to decode: name -> function that builds the file.

Each file is the worst of its kind that fits the server's default limits. Some take seconds to build, so
they are built on demand.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

MAX_BYTES = 10 * 2**20
PIXELS = 50_000_000
WIDTH, HEIGHT = 8000, 6250  # as many pixels as the server accepts
EOI = b"\xff\xd9"


def exif_that_overlaps(tags: int, size: int) -> bytes:
    """Return EXIF whose tags all claim the same `size` bytes, more than there are in sum."""
    entries = b"".join(struct.pack("<HHII", tag, 1, size, 8) for tag in range(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + bytes(size)


# ------------------------------------------------------------------------------------------------ JPEG


def jpeg_segment(marker: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg_frame(marker: int, width: int, height: int, components: int = 1, bits: int = 8) -> bytes:
    parts = b"".join(bytes([number + 1, 0x11, 0]) for number in range(components))
    return jpeg_segment(marker, struct.pack(">BHHB", bits, height, width, components) + parts)


def jpeg_scan(first: int = 0, last: int = 63, bits: int = 0, components: tuple[int, ...] = (1,)) -> bytes:
    """Return the header of a scan; `bits` are those of the successive approximation, high before low."""
    parts = b"".join(bytes([number, 0]) for number in components)
    return jpeg_segment(0xDA, bytes([len(components)]) + parts + bytes([first, last, bits]))


def jpeg_tables(ac_symbol: int) -> bytes:
    """Return a quantization table, and Huffman tables of one symbol each: no DC difference, and one of AC."""
    tables = jpeg_segment(0xDB, b"\0" + b"\1" * 64)
    for table, symbol in ((0x00, 0), (0x10, ac_symbol)):
        tables += jpeg_segment(0xC4, bytes([table, 1, *[0] * 15, symbol]))
    return tables


def jpeg_file(
    frame: int,
    scans: bytes,
    components: int = 1,
    width: int = WIDTH,
    height: int = HEIGHT,
    before: bytes = b"",
) -> bytes:
    """Return a JPEG with Huffman tables, segments before the frame, a frame of a kind, and scans."""
    head = b"\xff\xd8" + jpeg_tables(0) + before
    return head + jpeg_frame(frame, width, height, components) + scans + EOI


def jpeg_of_scans(scans: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """Return a progressive JPEG with scans of about fifty bytes that refine nothing."""
    blocks = -(-width // 8) * -(-height // 8)
    head = b"\xff\xd8" + jpeg_tables(0xE0) + jpeg_frame(0xC2, width, height)
    runs = -(-blocks // 32767)
    empty_blocks = int("011111111111111" * runs, 2) << (-15 * runs) % 8  # runs of 32,767 empty blocks
    data = empty_blocks.to_bytes(-(-15 * runs // 8)).replace(b"\xff", b"\xff\0")
    dc = jpeg_scan(0, 0) + bytes(-(-blocks // 8))
    return head + dc + (jpeg_scan(1, 63, 0x10) + data) * (scans - 1) + EOI


def jpeg_of_baseline_scans(scans: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """Return a sequential JPEG with three components, the first of which repeats without data."""
    return jpeg_file(0xC0, jpeg_scan() * scans, 3, width, height)


def jpeg_before_scan(segments: bytes) -> bytes:
    """Return a small JPEG with segments of metadata."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return file.getvalue()[:2] + segments + file.getvalue()[2:]


def jpegs() -> dict[str, Callable[[], bytes]]:
    comment, exif = jpeg_segment(0xFE), jpeg_segment(0xE1, b"Exif\0\0" + bytes(200))
    tags = exif_that_overlaps(5000, 5000)
    return {
        "JPEG of 1,000 scans": lambda: jpeg_of_scans(1000),
        "JPEG of scans, 1 MB": lambda: jpeg_of_scans(16_000),
        "JPEG of scans, all bytes": lambda: jpeg_of_scans(135_000),
        "JPEG of as many scans as are read": lambda: jpeg_of_scans(40),
        "JPEG of 500 scans, as large as is read": lambda: jpeg_of_scans(500, 2000, 2000),
        "JPEG of 2,000 scans, small": lambda: jpeg_of_scans(2000, 2000, 2000),
        "JPEG of baseline scans": lambda: jpeg_of_baseline_scans(800_000),
        "JPEG of comments": lambda: jpeg_before_scan(comment * 2_600_000),
        "JPEG of EXIF": lambda: jpeg_before_scan(exif * 48_000),
        "JPEG of EXIF that overlaps": lambda: jpeg_before_scan(jpeg_segment(0xE1, b"Exif\0\0" + tags)),
        "JPEG of an index of images that overlaps": lambda: jpeg_before_scan(
            jpeg_segment(0xE2, b"MPF\0" + tags)
        ),
        "JPEG of restarts": lambda: jpeg_file(0xC0, jpeg_scan(), before=jpeg_segment(0xDD, b"\0\1")),
        "JPEG without data": lambda: jpeg_file(0xC0, jpeg_scan(components=(1, 2, 3)), 3),
        "JPEG, progressive, CMYK": lambda: jpeg_file(
            0xC2, jpeg_scan(0, 0, components=(1, 2, 3, 4)) + bytes(400_000), 4
        ),
        "JPEG of arithmetic code": lambda: jpeg_file(0xC9, jpeg_scan(components=(1, 2, 3)), 3),
        "JPEG, lossless": lambda: jpeg_file(0xC3, jpeg_scan(1, 0, components=(1, 2, 3)), 3),
    }


# ------------------------------------------------------------------------------------------------- PNG


def color_profile(elements: int) -> bytes:
    """An ICC profile that applies one and the same curves again and again."""
    curve = b"curf\0\0\0\0\0\1\0\0parf" + bytes(8) + struct.pack(">4f", 1, 1, 0, 0)
    curves = b"cvst\0\0\0\0\0\3\0\3" + struct.pack(">II", 36, len(curve)) * 3 + curve
    places = struct.pack(">II", 16 + 8 * elements, len(curves)) * elements
    tag = b"mpet\0\0\0\0\0\3\0\3" + struct.pack(">I", elements) + places + curves
    white = struct.pack(">3i", 63189, 65536, 54061)
    table = struct.pack(">I4sII", 1, b"D2B1", 144, len(tag))
    header = struct.pack(">I4xI4s4s4s", 144 + len(tag), 0x04300000, b"mntr", b"RGB ", b"XYZ ")
    return (header.ljust(36, b"\0") + b"acsp").ljust(68, b"\0") + white.ljust(60, b"\0") + table + tag


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(
    width: int,
    height: int,
    bits: int = 8,
    colors: int = 2,
    interlaced: bool = False,
    before: bytes = b"",
    pixels: bytes | None = None,
    after: bytes = b"",
) -> bytes:
    """Return a PNG of zeros, with chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colors, 0, 0, interlaced)
    if pixels is None:
        samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colors]
        size = height * (1 + -(-width * samples * bits // 8)) + (height * 2 + 64 if interlaced else 0)
        pixels = png_chunk(b"IDAT", _deflated_zeros(size))
    body = png_chunk(b"IHDR", header) + before + pixels + after + png_chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + body


@functools.cache
def _deflated_zeros(size: int) -> bytes:
    deflate = zlib.compressobj(9)
    block = bytes(2**20)
    parts = [deflate.compress(block) for _ in range(size // 2**20)]
    return b"".join([*parts, deflate.compress(bytes(size % 2**20)), deflate.flush()])


def pngs() -> dict[str, Callable[[], bytes]]:
    profile = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    text = png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    small = png_chunk(b"IDAT", zlib.compress(bytes(64 * 193)))
    exif = exif_that_overlaps(65_535, 9_000_000)
    exif_text = b"exif\n\n0\n" + exif_that_overlaps(40_000, 1000).hex().encode()
    return {
        "PNG line, 1 x 50,000,000": lambda: png_file(1, PIXELS),
        "PNG line, 3 x 16,000,000": lambda: png_file(3, 16_000_000),
        "PNG line, 50,000,000 x 1": lambda: png_file(PIXELS, 1),
        "PNG line, 700 x 65,000": lambda: png_file(700, 65_000),
        "PNG of 50 megapixels": lambda: png_file(WIDTH, HEIGHT),
        "PNG of 50 megapixels, 16 bits, alpha, interlaced": lambda: png_file(WIDTH, HEIGHT, 16, 6, True),
        "PNG of 50 megapixels, alpha": lambda: png_file(WIDTH, HEIGHT, 8, 6),
        "PNG of 50 megapixels, 1 bit, interlaced": lambda: png_file(WIDTH, HEIGHT, 1, 0, True),
        "PNG of 50 megapixels, gray, 16 bits": lambda: png_file(WIDTH, HEIGHT, 16, 0),
        "PNG of 50 megapixels, 16 bits, transparent color": lambda: png_file(
            WIDTH, HEIGHT, 16, 2, before=png_chunk(b"tRNS", bytes(5) + b"\1")
        ),
        "PNG of 50 megapixels, palette of alphas": lambda: png_file(
            WIDTH, HEIGHT, 8, 3, before=png_chunk(b"PLTE", bytes(768)) + png_chunk(b"tRNS", bytes(256))
        ),
        "PNG of 99,990 chunks": lambda: png_file(64, 64, before=png_chunk(b"prVt") * 99_990),
        "PNG of empty chunks": lambda: png_file(64, 64, before=png_chunk(b"prVt") * 850_000),
        "PNG of empty pixel chunks": lambda: png_file(64, 64, pixels=png_chunk(b"IDAT") * 850_000 + small),
        "PNG of chunks after its pixels": lambda: png_file(64, 64, after=png_chunk(b"prVt") * 850_000),
        "PNG of texts": lambda: png_file(64, 64, before=png_chunk(b"tEXt", b"x\0") * 700_000),
        "PNG of compressed texts": lambda: png_file(64, 64, before=text * 63, after=text * 9000),
        "PNG of color profiles": lambda: png_file(64, 64, before=profile * 9000),
        "PNG of a huge color profile": lambda: png_file(64, 64, before=profile),
        "PNG of a color profile of 32 elements": lambda: png_file(
            64, 64, before=png_chunk(b"iCCP", b"x\0\0" + zlib.compress(color_profile(32)))
        ),
        "PNG of a color profile of 130,000 elements": lambda: png_file(
            64, 64, before=png_chunk(b"iCCP", b"x\0\0" + zlib.compress(color_profile(130_000)))
        ),
        "PNG of EXIF that overlaps": lambda: png_file(64, 64, before=png_chunk(b"eXIf", exif)),
        "PNG of EXIF after its pixels": lambda: png_file(64, 64, after=png_chunk(b"eXIf", exif)),
        "PNG of EXIF in a text": lambda: png_file(
            64, 64, before=png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif_text))
        ),
    }


# ----------------------------------------------------------------------------------- GIF, WebP and BMP


def gif_file(width: int = WIDTH, height: int = HEIGHT, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a GIF whose frame covers part of its screen, with blocks before and after the frame."""
    file = io.BytesIO()
    Image.new("P", (64, 64)).save(file, "GIF")
    data = file.getvalue()
    start = data.index(b",\0\0\0\0")
    screen = data[:6] + struct.pack("<HH", width, height) + data[10:start]
    return screen + before + data[start:-1] + after + b";"


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def webp_canvas(width: int, height: int) -> bytes:
    """Return a WebP with one small frame on a canvas."""
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    data = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def bmp_rle(width: int, height: int, data: bytes, bits: int = 8) -> bytes:
    colors = b"".join(bytes([value, 0, 0, 0]) for value in range(1 << bits))
    encoding = 1 if bits == 8 else 2
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, encoding, len(data), 0, 0, 0, 0)
    start = 14 + len(header) + len(colors)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + colors + data


def others() -> dict[str, Callable[[], bytes]]:
    extension = b"!\xf9\x04\0\0\0\0\0"
    return {
        "GIF of 50 megapixels": lambda: saved(Image.new("P", (WIDTH, HEIGHT)), "GIF"),
        "GIF screen of 50 megapixels": lambda: gif_file(),
        "GIF of extensions": lambda: gif_file(64, 64, before=extension * 1_300_000),
        "GIF of a comment in small blocks": lambda: gif_file(
            64, 64, before=b"!\xfe" + b"\1x" * 5_200_000 + b"\0"
        ),
        "GIF of empty comments": lambda: gif_file(64, 64, before=b"!\xfe\0" * 3_400_000),
        "GIF of junk": lambda: gif_file(64, 64, before=b"\0" * (MAX_BYTES - 10_000)),
        "GIF of frames": lambda: gif_file(64, 64, after=(b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0") * 690_000),
        "WebP canvas of 4 gigapixels": lambda: webp_canvas(65_000, 65_000),
        "WebP canvas of 170 megapixels": lambda: webp_canvas(13_000, 13_000),
        "WebP canvas of 50 megapixels": lambda: webp_canvas(WIDTH, HEIGHT),
        "WebP of 50 megapixels": lambda: saved(Image.new("RGB", (WIDTH, HEIGHT)), "WEBP", method=0),
        "WebP of 50 megapixels, lossless": lambda: saved(
            Image.new("RGBA", (WIDTH, HEIGHT)), "WEBP", lossless=True, method=0, quality=0
        ),
        "WebP of EXIF that overlaps": lambda: saved(
            Image.new("RGB", (64, 64)), "WEBP", exif=exif_that_overlaps(65_535, 9_000_000)
        ),
        "BMP of 50 megapixels": lambda: bmp_rle(WIDTH, HEIGHT, b"\xff\0" * (PIXELS // 255)),
        "BMP of padded lines": lambda: bmp_rle(WIDTH, HEIGHT, b"\1\0\0\0" * HEIGHT),
        "BMP of 4-bit runs": lambda: bmp_rle(WIDTH, HEIGHT, b"\xff\0" * (PIXELS // 255), bits=4),
        "BMP of 2.5 megapixels, padded lines": lambda: bmp_rle(65_000, 38, b"\1\0\0\0" * 38),
        "BMP of 2.5 megapixels, 4-bit runs": lambda: bmp_rle(1600, 1500, b"\1\0" * 2_400_000, bits=4),
        "BMP of empty runs": lambda: bmp_rle(64, 64, b"\x40\0" + b"\1\0" * 5_000_000),
    }


def costly_images() -> dict[str, Callable[[], bytes]]:
    """Return functions that build the files, by name."""
    return {**jpegs(), **pngs(), **others()}
