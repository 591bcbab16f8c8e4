"""Images of a request: from data URLs, and from the web where that is allowed. Never from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable

from PIL import Image

from solo_vlm.models.solo.image_loading_solo import ImageError, load_image, read_data_url
from solo_vlm.serve.errors import ApiError
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.web_images import fetch_image

Source = tuple[str, str | bytes]  # an image's place in the request, and its data URL or file

_MAX_ESCAPES = 1_000_000  # of percent-encoding in a request: decoding them takes far longer than base64
_FORMATS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM", re.DOTALL)


async def fetch_web_images(urls: Iterable[tuple[str, str]], limits: Limits) -> list[Source]:
    """The images of a request, those on the web fetched.

    Args:
        urls: each image's place in the request, and its URL.
        limits: whether to fetch at all, and how much: all files together may be as large as a request.

    Raises:
        ApiError: 400: a URL of another kind, one that may not be fetched, or a file that is too large.
    """
    sources: list[Source] = []
    bytes_left = limits.max_request_bytes
    for param, url in urls:
        source = await _fetch(url, param, limits, min(bytes_left, limits.max_image_bytes))
        bytes_left -= len(source) if isinstance(source, bytes) else 0
        sources.append((param, source))
    return sources


def decode_images(sources: Iterable[Source], limits: Limits) -> list[Image.Image]:
    """RGB images of what `fetch_web_images` returns.

    Raises:
        ApiError: 400: not an image, damaged, or over a limit; the pixels of all images count together.
    """
    images: list[Image.Image] = []
    escapes = 0
    for param, source in sources:
        if isinstance(source, str) and (escapes := escapes + source.count("%")) > _MAX_ESCAPES:
            raise ApiError(400, "too much percent-encoding: send base64", param, "invalid_image")
        file = _from_data_url(source, param, limits.max_image_bytes) if isinstance(source, str) else source
        if not _FORMATS.match(file):
            raise ApiError(400, "not a JPEG, PNG, WebP, GIF or BMP image", param, "invalid_image")
        pixels_left = limits.max_pixels - sum(image.width * image.height for image in images)
        try:
            images.append(load_image(file, max_pixels=pixels_left, name="image"))
        except ImageError as error:
            raise ApiError(400, str(error), param, "invalid_image") from error
    return images


async def _fetch(url: str, param: str, limits: Limits, max_bytes: int) -> str | bytes:
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return url
    if not scheme.startswith(("http://", "https://")):
        raise ApiError(400, "an image is a data URL: data:image/png;base64,...", param, "invalid_image")
    if not limits.allow_image_urls:
        raise ApiError(
            400, "this server fetches no images: send a data URL with base64", param, "invalid_image"
        )
    return await fetch_image(url, param, max_bytes, limits.max_fetch_seconds)


def _from_data_url(url: str, param: str, max_bytes: int) -> bytes:
    """The file in a data URL, as the library reads it."""
    try:
        file = read_data_url(url, "image")
    except ImageError as error:
        raise ApiError(400, str(error), param, "invalid_image") from error
    if len(file) > max_bytes:
        raise ApiError(400, f"an image file may have {max_bytes:,} bytes", param, "image_too_large")
    return file
