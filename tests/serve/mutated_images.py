"""Image files whose parts are mutated: chunks, segments, blocks and the fields of headers."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Literal

import numpy as np
from PIL import Image

from .hostile_images import bmp_rle, saved

Parts = list[bytes]
ORDERS: list[Literal["big", "little"]] = ["big", "little"]


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
SPLIT: dict[bytes, Callable[[bytes], Parts]] = {
    b"\xff\xd8": jpeg_parts,
    b"\x89PNG": png_parts,
    b"GIF8": gif_parts,
    b"RIFF": webp_parts,
    b"BM": bmp_parts,
    b"II": tiff_parts,
}


def parts_of(file: bytes) -> Parts:
    """Split a file of a known format."""
    return next(split(file) for start, split in SPLIT.items() if file.startswith(start))


def mutated(random: Random, parts: Parts, others: list[Parts]) -> bytes:
    """Return a file whose parts are dropped, repeated, moved, cut, taken from another file, or changed."""
    parts = list(parts)
    starts = parts[0]
    for _ in range(random.randint(0, 4)):
        if not parts:
            break
        place = random.randrange(len(parts))
        match random.choice(["drop", "repeat", "move", "cut", "foreign", "number", "bytes"]):
            case "drop":
                del parts[place]
            case "repeat":
                parts[place:place] = [parts[place]] * random.choice([1, 2, 300])
            case "move":
                parts.insert(random.randrange(len(parts)), parts.pop(place))
            case "cut":
                parts[place] = parts[place][: random.randint(0, len(parts[place]))]
            case "foreign":
                parts.insert(place, random.choice(random.choice(others)))
            case "number":
                size, order = random.choice([1, 2, 4]), random.choice(ORDERS)
                value = random.choice([random.choice(EXTREMES), random.randrange(2**32)]) % 256**size
                at = random.randint(0, len(parts[place]))
                number = value.to_bytes(size, order)
                parts[place] = parts[place][:at] + number + parts[place][at + size :]
            case "bytes":
                at = random.randint(0, len(parts[place]))
                inserted = bytes(random.randrange(256) for _ in range(random.randint(0, 9)))
                parts[place] = parts[place][:at] + inserted + parts[place][at:]
    if starts.startswith(b"\x89PNG") and random.randrange(2):
        parts = parts[:1] + [_with_checksum(part) for part in parts[1:]]
    if starts.startswith(b"RIFF") and random.randrange(2):
        size = sum(map(len, parts)) - 8
        parts[:1] = [b"RIFF" + struct.pack("<I", max(0, size)) + b"WEBP"]
    data = b"".join(parts)
    return data[: random.randint(0, len(data))] if random.randrange(10) == 0 else data


def _with_checksum(chunk: bytes) -> bytes:
    return chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk
