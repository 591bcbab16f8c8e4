"""Limits on the cost of decoding an image file, checked on its structure before decoding.

A few kilobytes can declare gigabytes of pixels or keep a decoder busy for hours. The limits are far above
those of cameras and image editors; within them, a file takes about a second and eight bytes per pixel.
"""

import re
from contextlib import suppress
from io import BytesIO
from os import SEEK_CUR, SEEK_END
from typing import BinaryIO, Literal

from PIL import Image, ImageFile

MAX_PIXELS = 100_000_000
"""Default limit of width * height."""

MAX_SIDE = 65_535
"""Limit of width and height, that of the JPEG format."""

MAX_ASPECT_RATIO = 200
"""Default limit of the aspect ratio, as in Qwen2-VL: a narrower image is unrecognizable once resized."""

MAX_FILE_BYTES = 2**30
"""Limit of a file's size."""

_MAX_JPEG_SCANS, _MAX_JPEG_SCAN_PIXELS = 500, 2_000_000_000  # scans, and scans * pixels; typical are 10 scans
_MAX_JPEG_SEGMENTS = 2000
_MAX_EXIF_BYTES, _MAX_TAGS = 2**18, 500  # cameras write a JPEG segment, of 64 KiB at most, and dozens of tags
_MAX_PNG_CHUNKS = 100_000
_PNG_TEXTS, _PNG_KEYWORD = (b"tEXt", b"zTXt", b"iTXt"), 32
_PNG_ORIENTED = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of texts with an orientation
_MAX_PROFILE_BYTES, _MAX_PROFILE_TAGS, _MAX_PROFILE_ELEMENTS = 4 * 2**20, 100, 32
_MAX_TIFF_TILES = 65_535
_MAX_READS = 2_000_000  # at half a microsecond each in Pillow's Python readers
_MAX_PYTHON_PIXELS = 2_500_000  # at the same time per pixel in Pillow's Python decoders

_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # not those within scans, which restart the coding
_JPEG_SCAN = b"\xff\xda"
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_SEQUENTIAL = {0xC0, 0xC1, 0xC3}
_JPEG_ARITHMETIC = {*range(0xC9, 0xD0)} - {0xCC}
_JPEG_WITHOUT_DATA = {0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)}
_JPEG_EXIF, _JPEG_IMAGES = b"Exif\0\0", b"MPF\0"
_JPEG_METADATA = (_JPEG_EXIF, b"http://ns.adobe.com/xap/", _JPEG_IMAGES, b"ICC_PROFILE\0")
"""Prefixes of JPEG segments that may hold an orientation, several images or a color profile."""

_TIFF_COMPRESSIONS = {
    *("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "zstd", "jpeg"),
    *("tiff_ccitt", "group3", "group4", "tiff_raw_16"),
}
_TIFF_STRIPS, _TIFF_TILES = (273, 279), (324, 325)  # tags of their offsets and sizes


class LimitError(ValueError):
    """Image whose decoding would cost too much."""


def check_size(width: int, height: int, max_pixels: int, max_aspect_ratio: float | None) -> None:
    """Check the size that a header declares, in pixels.

    Raises:
        LimitError: The number of pixels, a side or the aspect ratio exceeds its limit.
    """
    if width * height > max_pixels:
        raise LimitError(f"{width} x {height} is more than the limit of {max_pixels:,} pixels")
    if max(width, height) > MAX_SIDE:
        raise LimitError(f"{width} x {height} exceeds the limit of {MAX_SIDE:,} pixels per side")
    check_aspect_ratio(height, width, max_aspect_ratio)


def check_aspect_ratio(height: int, width: int, max_aspect_ratio: float | None) -> None:
    """Raise `LimitError` if one side exceeds the other by more than a factor; None is no limit."""
    short, long = sorted((width, height))
    if max_aspect_ratio is not None and long > max_aspect_ratio * short:
        raise LimitError(
            f"aspect ratio {long / short:g} ({long} x {short} pixels) exceeds "
            f"max_aspect_ratio={max_aspect_ratio:g}"
        )


def check_jpeg(data: bytes) -> bool:
    """Check the segments of a JPEG before its pixels, and the number of its scans.

    In a progressive JPEG, a scan of a few bytes can make the decoder process every pixel. Only scans up to
    the end of the image count, since phones append videos and further images.

    Returns:
        Whether the JPEG is regular: only segments before its first scan, without relevant metadata.

    Raises:
        LimitError: There are too many scans or segments, or too much EXIF; or the coding is arithmetic, whose
            cost does not depend on the number of bytes.
    """
    place, regular, pixels, components, one_scan, exif, scans = 2, True, 0, 0, True, b"", 0
    for _ in range(_MAX_JPEG_SEGMENTS):
        match = _JPEG_MARKER.search(data, place)
        if match is None:
            return False  # truncated: the decoder reports it
        regular = regular and (match.start() == place or scans > 0)
        place = match.end()
        marker = data[place - 1]
        if marker == 0xD9 and scans:
            return regular
        if marker in _JPEG_WITHOUT_DATA:
            regular = False
            continue
        length = max(2, int.from_bytes(data[place : place + 2], "big"))
        segment = data[place + 2 : place + length]
        if marker in _JPEG_ARITHMETIC:
            raise LimitError("arithmetic coding is not supported; save it as a JPEG with Huffman coding")
        if marker in _JPEG_FRAMES:
            height, width = (int.from_bytes(segment[at : at + 2], "big") for at in (1, 3))
            pixels = max(pixels, width * height)
            components = max(components, int.from_bytes(segment[5:6], "big"))
            one_scan = one_scan and marker in _JPEG_SEQUENTIAL
        elif marker == 0xDA:
            scans += 1
            _check_scans(scans, pixels)
            if one_scan and segment[:1] >= bytes([components]):
                return regular
        elif segment.startswith(_JPEG_METADATA):
            regular = False
            if segment.startswith(_JPEG_EXIF):  # Pillow joins several
                exif += segment.removeprefix(_JPEG_EXIF)
                check_exif(exif)
            elif segment.startswith(_JPEG_IMAGES):
                check_tags(BytesIO(segment.removeprefix(_JPEG_IMAGES)))
        place += length
    raise LimitError(f"more than {_MAX_JPEG_SEGMENTS:,} segments of metadata; save it without metadata")


def _check_scans(scans: int, pixels: int) -> None:
    if scans > _MAX_JPEG_SCANS or scans * pixels > _MAX_JPEG_SCAN_PIXELS:
        raise LimitError(
            f"{scans:,} scans or more of {pixels:,} pixels take too long; save it as a baseline JPEG"
        )


def check_png(file: BinaryIO) -> bool:
    """Check the chunks and color profiles of a PNG: Pillow reads each chunk and inflates each profile.

    Returns:
        Whether a chunk may hold an orientation.

    Raises:
        LimitError: There are too many chunks, or several color profiles.
    """
    file.seek(8)
    profiles, may_turn = 0, False
    for _ in range(_MAX_PNG_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head.endswith(b"IEND"):
            return may_turn
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        profiles += kind == b"iCCP"
        if profiles > 1:
            raise LimitError("more than one color profile; save it without metadata")
        keyword = file.read(min(length, _PNG_KEYWORD)) if kind in _PNG_TEXTS else b""
        may_turn |= kind == b"eXIf" or keyword.startswith(_PNG_ORIENTED)
        file.seek(length - len(keyword) + 4, SEEK_CUR)
    raise LimitError(f"more than {_MAX_PNG_CHUNKS:,} chunks; save it again")


def check_embedded_exif(image: Image.Image) -> None:
    """Check the EXIF of an open image before Pillow parses it.

    Raises:
        LimitError: There are too many bytes or tags.
    """
    exif, text = (image.info.get(name) for name in ("exif", "Raw profile type exif"))
    if exif is None and isinstance(text, str):  # of a PNG by ImageMagick: three lines, then hexadecimal
        with suppress(ValueError):
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
    if isinstance(exif, bytes):
        check_exif(exif)


def check_exif(exif: bytes) -> None:
    """Check EXIF, with or without the prefix of JPEG.

    Raises:
        LimitError: There are too many bytes or tags.
    """
    if len(exif) > _MAX_EXIF_BYTES:
        raise LimitError(f"more than {_MAX_EXIF_BYTES:,} bytes of EXIF; save it without metadata")
    check_tags(BytesIO(exif.removeprefix(_JPEG_EXIF).removeprefix(_JPEG_EXIF)))


def check_tags(file: BinaryIO) -> None:
    """Check the first directory of a TIFF, or of EXIF, which has the same form: Pillow reads each tag.

    Its reader is a loop in Python that can warn about each tag.

    Raises:
        LimitError: There are too many tags.
    """
    file.seek(0)
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head.startswith(b"II") else "big"
    is_big_tiff = head[2:3] == b"+"
    place = int.from_bytes(head[8:16] if is_big_tiff else head[4:8], order)
    with suppress(OverflowError, OSError):  # a place beyond any file; Pillow reports it
        file.seek(place)
        if int.from_bytes(file.read(8 if is_big_tiff else 2), order) > _MAX_TAGS:
            raise LimitError(f"more than {_MAX_TAGS:,} tags of metadata; save it without metadata")


def check_decoder(image: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Check how Pillow would decode the open image of a file.

    Raises:
        LimitError: The cost of the decoder is unbounded, or too high for this many pixels.
    """
    if len(image.tile) > _MAX_TIFF_TILES:
        raise LimitError(f"more than {_MAX_TIFF_TILES:,} tiles; save it in larger ones")
    in_python = any(tile.codec_name in Image.DECODERS for tile in image.tile)
    if in_python and (pixels := image.width * image.height) > _MAX_PYTHON_PIXELS:
        raise LimitError(
            f"{pixels:,} pixels exceed the limit of {_MAX_PYTHON_PIXELS:,} of this {image.format} encoding "
            f"({image.tile[0].codec_name}); save it as PNG"
        )
    if image.format == "TIFF":
        _check_tiff(image, file)


def _check_tiff(image: ImageFile.ImageFile, file: BinaryIO) -> None:
    compression = image.info["compression"]
    if compression not in _TIFF_COMPRESSIONS:
        raise LimitError(f"TIFF compression {compression} is not supported; save it with deflate")
    if compression == "raw":
        return
    tags = vars(image)["tag_v2"]
    kind = _TIFF_STRIPS if _TIFF_STRIPS[0] in tags else _TIFF_TILES
    places, sizes = (tags.get(tag, ()) for tag in kind)
    if len(places) != len(sizes) or len(places) > _MAX_TIFF_TILES or sum(sizes) > file.seek(0, SEEK_END):
        raise LimitError("strips that overlap, have no size or are too many; save it again")
    for place, size in zip(places, sizes, strict=True) if compression == "jpeg" else ():
        file.seek(place)
        strip = file.read(size)
        check_jpeg(strip)
        if strip.count(_JPEG_SCAN) > 1:
            raise LimitError("a JPEG of several scans within a TIFF; save it with deflate")


def check_profile(profile: bytes) -> None:
    """Check an embedded color profile.

    A tag of multi-process elements can apply one of them a million times to each color.

    Raises:
        LimitError: Too many bytes or elements.
    """
    if len(profile) > _MAX_PROFILE_BYTES:
        limit = f"is more than the limit of {_MAX_PROFILE_BYTES:,}"
        raise LimitError(f"a color profile of {len(profile):,} bytes {limit}; convert it to sRGB")
    for entry in range(132, 132 + 12 * _MAX_PROFILE_TAGS, 12):  # name, place, size
        place = int.from_bytes(profile[entry + 4 : entry + 8], "big")
        elements = int.from_bytes(profile[place + 12 : place + 16], "big")
        if profile[place : place + 4] == b"mpet" and elements > _MAX_PROFILE_ELEMENTS:
            limit = f"exceeds the limit of {_MAX_PROFILE_ELEMENTS}"
            raise LimitError(f"a color profile of {elements:,} elements {limit}; convert it to sRGB")


class MeteredFile:
    """File for Pillow that limits the number of read operations.

    Pillow's readers are loops in Python: they take minutes for a file with millions of tiny blocks.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._reads = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read from the file.

        Raises:
            LimitError: There were too many read operations.
        """
        self._reads += 1
        if self._reads > _MAX_READS:
            raise LimitError(f"its header has more than {_MAX_READS:,} parts; save it again")
        return self._file.read(size)
