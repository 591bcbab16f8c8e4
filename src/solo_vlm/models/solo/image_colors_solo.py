"""Convert decoded images and arrays to 8-bit RGB on white, in sRGB.

Covers what Pillow's own conversions get wrong or leave out: deeper gray, transparent colors of 16-bit images,
signed and planar TIFF samples, color profiles, and arrays of numbers.
"""

from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms, ImageFile

from .image_limits_solo import check_profile

ChannelOrder = Literal["channels_first", "channels_last"]

_BAND_PIXELS = 2**22  # large images are converted in bands of rows, which bounds the memory

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANAR, _TIFF_SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2  # a photometric interpretation, a sample format
_PNG_GRAY_STEP = {"L;2": 85, "L;4": 17}
"""Raw mode of a 2- or 4-bit PNG -> factor that Pillow applies to its samples but not to its tRNS."""

_SRGB_TOLERANCE = 2
"""Maximum difference, in levels of 255, of a color profile that counts as sRGB."""


class ImageError(ValueError):
    """Unusable image data. A retry gives the same error."""


def prepare_tiff(image: Image.Image, name: str) -> None:
    """Reject signed samples; fix planar 16-bit samples, which Pillow would read as bytes."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or not isinstance(image, ImageFile.ImageFile):
        return
    bits = tags.get(_TIFF_BITS, (1,))[0]
    if tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == _SIGNED and bits < 32:
        raise ImageError(f"{name}: signed samples have no agreed black and white; save it as unsigned")
    if tags.get(_TIFF_PLANAR) == 2 and bits == 16:
        ending = ";16L" if tags.prefix == b"II" else ";16B"
        tiles: Any = image.tile
        image.tile = [
            tile._replace(args=(tile.args[0] + ending, *tile.args[1:])) if tile.codec_name == "raw" else tile
            for tile in tiles
        ]


def prepare_ppm(image: ImageFile.ImageFile) -> None:
    """Decode 16-bit color by its high bytes, as Pillow does in PNG, instead of by a loop in Python."""
    tiles: Any = image.tile
    if image.format == "PPM" and tiles[0].args == ("RGB", 65535) and tiles[0].codec_name == "ppm":
        image.tile = [tiles[0]._replace(codec_name="raw", args="RGB;16B")]


def prepare_png(image: Image.Image) -> Image.Image | None:
    """Correct the transparent color of a PNG before Pillow decodes it.

    Returns:
        The alpha channel if 8 bits per sample cannot identify the pixels of that color, otherwise None.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or not isinstance(image, ImageFile.ImageFile) or not image.tile or key is None:
        return None
    raw_mode = image.tile[0].args
    if raw_mode in _PNG_GRAY_STEP:
        image.info["transparency"] = key * _PNG_GRAY_STEP[raw_mode]
    if raw_mode != "RGB;16B":
        return None
    opaque = np.zeros((image.height, image.width), bool)
    high_key, low_key = np.divmod(key, 256)
    _mark_other_colors(_low_bytes(image), low_key, opaque)  # one copy of the pixels at a time
    _mark_other_colors(image, high_key, opaque)
    return Image.fromarray(opaque * np.uint8(255))


def _low_bytes(image: ImageFile.ImageFile) -> Image.Image:
    """Open a PNG with 16-bit samples again, to decode the low byte of each sample."""
    file: Any = image.fp
    low = Image.open(file, formats=["PNG"])
    low.tile = [low.tile[0]._replace(args="RGB;16L")]
    return low


def _mark_other_colors(image: Image.Image, color: np.ndarray, marked: np.ndarray) -> None:
    """Set `marked`, (height, width) bool, to True where a pixel of an RGB image has another color."""
    for band in _bands(image.size):
        for samples, value in zip(image.crop(band).split(), color, strict=True):
            marked[band[1] : band[3]] |= np.asarray(samples) != value


def to_rgb(image: Image.Image, name: str, alpha: Image.Image | None = None) -> Image.Image:
    """Convert a decoded image to RGB, in sRGB and on white.

    Args:
        image: Decoded image of any mode.
        name: Name of the image for errors.
        alpha: Alpha channel that the image itself cannot express; see `prepare_png`.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image, alpha = _to_8_bit_gray(image, name)
    is_rgb = image.mode == "RGB" and alpha is None and not image.has_transparency_data
    if is_rgb and to_srgb(image) is None:
        return image
    bands = list(_bands(image.size))
    if len(bands) == 1:
        return _opaque_rgb(image, alpha)
    rgb = Image.new("RGB", image.size)
    for band in bands:
        rgb.paste(_opaque_rgb(image.crop(band), alpha and alpha.crop(band)), band)
    return rgb


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes that divide an image into bands of rows."""
    width, height = size
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _opaque_rgb(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Convert 8-bit pixels to sRGB on white."""
    if alpha is None and image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if (transform := to_srgb(image)) is not None:
        rgb = transform.apply(image.convert(_color_space(image)))
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def to_array(image: Image.Image) -> np.ndarray:
    """Copy an RGB image into an array, (height, width, 3) uint8."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for band in _bands(image.size):
        part = image if band[3] - band[1] == image.height else image.crop(band)
        pixels[band[1] : band[3]] = np.asarray(part)
    return pixels


def _to_8_bit_gray(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Convert deeper gray to mode L; also return its alpha channel if one value is transparent."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    packed_12_bit = tags.get(_TIFF_BITS) == (12,)
    levels = _to_bytes(values, name, full_range=4095 if packed_12_bit else 65535)
    gray = Image.fromarray(255 - levels if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO else levels)
    if "icc_profile" in image.info:
        gray.info["icc_profile"] = image.info["icc_profile"]
    key = image.info.get("transparency")
    return gray, None if key is None else Image.fromarray((values != key) * np.uint8(255))


def _color_space(image: Image.Image) -> str:
    """Return the color mode that a profile of an opaque image refers to."""
    return {"1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")


def to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from an image's embedded profile to sRGB; None if it counts as sRGB."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or image.mode == "LAB":  # LAB converts without a profile
        return None
    check_profile(profile)
    return _transform_to_srgb(profile, _color_space(image))


@lru_cache(maxsize=16)  # images of a data set share few profiles
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        transform = ImageCms.buildTransform(
            BytesIO(profile),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:  # good pixels with a broken profile are common
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)  # (1, num_colors, 3)
    colors = Image.fromarray(grid).convert(mode)
    before, after = (np.asarray(c).astype(int) for c in (colors.convert("RGB"), transform.apply(colors)))
    return transform if abs(after - before).max() > _SRGB_TOLERANCE else None


def from_array(array: np.ndarray, name: str, order: ChannelOrder | None) -> Image.Image:
    """Convert an array (height, width), (height, width, channels) or (channels, height, width) to RGB.

    Args:
        order: Place of the channels. Default: where there are 1 to 4, color before gray.

    Raises:
        ImageError: Pixels or shape are not those of an image.
    """
    if array.size == 0:
        raise ImageError(f"{name}: no pixels")
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim != 3:
        raise ImageError(f"{name}: an image has 2 or 3 dimensions, not {array.ndim}")
    elif order == "channels_first" or (order is None and _channels_come_first(array.shape)):
        array = array.transpose(1, 2, 0)
    channels = array.shape[2]
    if not 1 <= channels <= 4:
        raise ImageError(f"{name}: neither the first nor the last axis holds 1 to 4 channels")
    pixels = _to_bytes(array, name)
    return to_rgb(Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels), name)


def _channels_come_first(shape: tuple[int, ...]) -> bool:
    first, last = shape[0], shape[2]
    # Color takes precedence: (1, W, 3) is one row of RGB, not a gray image.
    for counts in ((3, 4), (1,), (2,)):
        if first in counts or last in counts:
            return first in counts
    return False


def _to_bytes(values: np.ndarray, name: str, full_range: int | None = None) -> np.ndarray:
    """Convert any numeric array to uint8 by the ranges documented in `load_image`."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 255):  # also true of NaN
            raise ImageError(f"{name}: floats must lie in 0..1 or 0..255, these span {low:g}..{high:g}")
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    if values.dtype.kind not in "iu":
        raise ImageError(f"{name}: pixels cannot be of type {values.dtype}")
    limit = full_range or (65535 if values.dtype.newbyteorder("=") == np.uint16 else 255)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > limit:
        raise ImageError(f"{name}: {values.dtype} pixels must lie in 0..{limit}, these span {low}..{high}")
    if limit == 255:
        return values.astype(np.uint8)
    scaled = values.astype(np.uint32)
    scaled *= 255
    scaled += limit // 2  # rounds
    scaled //= limit
    return scaled.astype(np.uint8)
