"""Images in requests: from data URLs, and from the public web where allowed; never from local files.

Addresses are checked at connection time, on the resolved address that the socket connects to. So no spelling
of an address, DNS rebinding or redirect leads to a private network.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from threading import Condition, Lock
from typing import Any

import aiohttp
import numpy as np
from aiohttp.connector import AddrInfoType
from numpy.typing import NDArray

from solo_vlm.models.inspect import ImageSummary
from solo_vlm.models.solo.image_loading_solo import ImageError, read_data_url
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor, patches_to_image
from solo_vlm.serve.addresses import is_public
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.protocol import ApiError
from solo_vlm.utils.pages import png_url

Source = tuple[str, str | bytes]
"""An image's place in the request, and its data URL or downloaded file."""

_MAX_ESCAPES = 1_000_000  # percent escapes per request: decoding them is far slower than base64
_MAX_SECONDS = 3.0  # CPU time for a request's images; one takes at most 3 s
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_STARTS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM", re.DOTALL)

_MAX_REDIRECTS = 3
_MAX_URL_CHARS = 8192


@dataclass(frozen=True)
class EncodedImage:
    """An image as the model reads it.

    Attributes:
        pixel_values: (num_patches, 3072) uint8.
        image_grid_thw: (3,) int64, (1, rows, columns).
        size: Width and height of the original, in pixels.
        digest: Hash of the original file.
    """

    pixel_values: NDArray[np.uint8]
    image_grid_thw: NDArray[np.int64]
    size: tuple[int, int]
    digest: bytes


def describe_image(image: EncodedImage) -> dict[str, Any]:
    """Return what the model sees of an image: sizes, grid, token counts, and the picture as a data URL."""
    _, rows, columns = image.image_grid_thw.tolist()
    picture, file = patches_to_image(image.pixel_values, rows, columns), BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    layout = ImageSummary(image.size, picture.size, rows, columns)
    return {**layout.as_dict(), "picture": png_url(file.getvalue())}


class PixelBudget:
    """Thread-safe limit on the pixels, and so the memory, of all images that are being decoded.

    Images of up to 1/32 of the limit neither count nor wait, so that large ones do not stall them.
    """

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._small = pixels // 32
        self._turn = Lock()  # a queue, so that small images cannot overtake a large one forever
        self._released = Condition()

    @contextmanager
    def decoding(self) -> Iterator[Callable[[int, int], None]]:
        """Yield a function that waits until an image of a given width and height fits."""
        held = 0

        def wait(width: int, height: int) -> None:
            nonlocal held
            if held or width * height <= self._small:
                return
            with self._turn, self._released:
                self._released.wait_for(lambda: self._free >= width * height)
                held = width * height
                self._free -= held

        try:
            yield wait
        finally:
            with self._released:
                self._free += held
                self._released.notify_all()


class ImageReader:
    """Reader of images in requests, within limits. Thread-safe.

    Encoded images are kept in an LRU cache by content, so an image that the page has shown is not encoded
    again for an answer about it.
    """

    def __init__(self, image_processor: SoloImageProcessor, limits: Limits) -> None:
        self._image_processor = image_processor
        self._limits = limits
        self._cache: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._cached_bytes = 0
        self._lock = Lock()
        self._pixels = PixelBudget(limits.max_pixels)

    async def fetch(self, urls: Iterable[tuple[str, str]]) -> list[Source]:
        """Download images with http(s) URLs; return data URLs unchanged.

        Args:
            urls: Each image's place in the request, and its URL.

        Raises:
            ApiError: 400, for an unsupported or forbidden URL, or if all downloads together exceed the size
                limit of a request or the time limit of downloads.
        """
        sources: list[Source] = []
        bytes_left, seconds = self._limits.max_request_bytes, self._limits.max_fetch_seconds
        try:
            async with asyncio.timeout(seconds):
                for param, url in urls:
                    source = await self._fetch(url, param, min(bytes_left, self._limits.max_image_bytes))
                    bytes_left -= len(source) if isinstance(source, bytes) else 0
                    sources.append((param, source))
        except TimeoutError as error:
            raise _fetch_failed(param, f"timed out after {seconds:g} s") from error
        return sources

    def read(self, sources: Iterable[Source]) -> list[EncodedImage]:
        """Decode and encode what `fetch` returned.

        Raises:
            ApiError: 400, for a file that is not an image, damaged, or over a limit.
        """
        images: list[EncodedImage] = []
        escapes, started = 0, time.thread_time()
        pixels_left = self._limits.max_pixels
        for param, source in sources:
            if isinstance(source, str) and (escapes := escapes + source.count("%")) > _MAX_ESCAPES:
                raise _invalid(param, "Too much percent-encoding in data URLs. Use base64.")
            file = self._from_data_url(source, param) if isinstance(source, str) else source
            if not _STARTS.match(file):
                raise _invalid(param, "Unsupported image format. Use JPEG, PNG, WebP, GIF or BMP.")
            try:
                image = self._encode(file, pixels_left)
            except ImageError as error:
                raise _invalid(param, f"Invalid image: {error}.") from error
            if time.thread_time() - started > _MAX_SECONDS:
                raise _invalid(param, f"The images take more than {_MAX_SECONDS:g} s to decode. Send fewer.")
            pixels_left -= image.size[0] * image.size[1]
            images.append(image)
        return images

    async def _fetch(self, url: str, param: str, max_bytes: int) -> str | bytes:
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return url
        if not scheme.startswith(("http://", "https://")):
            raise _invalid(param, "Unsupported image URL. Use a data URL: data:image/png;base64,...")
        if not self._limits.allow_image_urls:
            raise _invalid(param, "This server does not download images. Use a data URL with base64.")
        if len(url) > _MAX_URL_CHARS:
            raise _invalid(param, f"Image URL too long: at most {_MAX_URL_CHARS:,} characters are allowed.")
        return await fetch_image(url, param, max_bytes)

    def _from_data_url(self, url: str, param: str) -> bytes:
        try:
            file = read_data_url(url, "image")
        except ImageError as error:
            raise _invalid(param, f"Invalid image: {error}.") from error
        if len(file) > self._limits.max_image_bytes:
            raise _too_large(param, self._limits.max_image_bytes)
        return file

    def _encode(self, file: bytes, max_pixels: int) -> EncodedImage:
        """Encode an image file, unless it is cached and within the limit."""
        digest = blake2b(file, digest_size=16).digest()
        with self._lock:
            if (image := self._cache.get(digest)) and image.size[0] * image.size[1] <= max_pixels:
                self._cache.move_to_end(digest)
                return image
        with self._pixels.decoding() as wait_for_memory:
            pixels = self._image_processor.load_pixels(
                file, max_pixels=max_pixels, formats=_FORMATS, on_size=wait_for_memory, name="image"
            )
            height, width = pixels.shape[:2]
            image = EncodedImage(*self._image_processor.encode_pixels(pixels), (width, height), digest)
        with self._lock:
            if digest not in self._cache:
                self._cache[digest] = image
                self._cached_bytes += image.pixel_values.nbytes
            while self._cached_bytes > self._limits.max_cached_image_bytes:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.pixel_values.nbytes
        return image


# ------------------------------------------------------------------------------------------ downloads


async def fetch_image(url: str, param: str, max_bytes: int) -> bytes:
    """Download a file from a public address.

    Args:
        url: URL of scheme http or https.
        param: Place of the URL in the request, for errors.
        max_bytes: Maximum size of the response body.

    Raises:
        ApiError: 400. Forbidden and unreachable addresses give the same error, so clients cannot map a
            private network.
    """
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(socket_factory=_public_socket, use_dns_cache=False),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "solo-vlm"},
                timeout=aiohttp.ClientTimeout(total=None),
            ) as session,
            session.get(url, max_redirects=_MAX_REDIRECTS) as response,
        ):
            if response.status != 200:
                raise _fetch_failed(param, f"the server answered HTTP {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_chunked(2**16):
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(param, max_bytes)
            return bytes(body)
    except (aiohttp.ClientError, ValueError, OSError) as error:
        raise _fetch_failed(param, "no public address responded") from error


def _public_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, where = address
    if not is_public(where[0]):
        raise PermissionError(f"{where[0]} is not a public address")
    return socket.socket(family, kind, protocol)


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, param, "invalid_image")


def _too_large(param: str, max_bytes: int) -> ApiError:
    return ApiError(
        400, f"Image too large: the maximum file size is {max_bytes:,} bytes.", param, "image_too_large"
    )


def _fetch_failed(param: str, reason: str) -> ApiError:
    return ApiError(400, f"Failed to download the image: {reason}.", param, "image_fetch_failed")
