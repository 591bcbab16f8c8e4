"""Load an image from any source as upright 8-bit RGB: a `PIL.Image`, or an array of its pixels.

Training, evaluation and serving all read images with `load_image` or `load_pixels`, so a file gives the same
pixels everywhere. The rules are those of `transformers.image_utils.load_image` (EXIF orientation applied,
transparency on white), extended to 16-bit and float images, arrays and tensors, limits on size and cost
(`image_limits_solo`), and errors that name the file and the problem.
"""

import base64
import errno
import os
import pickle
import re
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import InvalidURL
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, TypeVar, Unpack
from urllib.error import HTTPError
from urllib.parse import quote, unquote_to_bytes, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from .image_colors_solo import (
    ChannelOrder,
    from_array,
    prepare_png,
    prepare_ppm,
    prepare_tiff,
    to_array,
    to_rgb,
    to_srgb,
)
from .image_colors_solo import ImageError as ImageError
from .image_limits_solo import (
    MAX_ASPECT_RATIO,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    LimitError,
    MeteredFile,
    check_decoder,
    check_embedded_exif,
    check_jpeg,
    check_png,
    check_size,
    check_tags,
)

try:
    import simplejpeg
except ImportError:  # optional in a published folder; Pillow decodes then
    simplejpeg = None

MAX_DOWNLOAD_BYTES = 256 * 2**20
"""Default limit of `load_image` for the response body of a URL, in bytes."""

R = TypeVar("R")

_UPRIGHT = {  # EXIF orientation -> transposition that makes the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_ORIENTATION_TAG = 0x0112
_JPEG_START, _PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_TIFF_STARTS = (b"II", b"MM")

_OTHER_SUFFIXES = {".heic", ".heif", ".hif", ".jxl", ".svg"}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000", "HEIF", "JXL")
"""Formats that are read, by Pillow's names; HEIF and JPEG XL with a plug-in."""

_FORMATS_WITH_SIZE = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "TGA", "AVIF", "JPEG2000")
"""Formats whose header gives the size of the decoded image, so that `image_size` need not decode it."""

_FORMATS_IN_SUBPROCESS = ("AVIF", "JPEG2000")  # their cost does not follow from the header
_MAX_SUBPROCESS_SECONDS, _MAX_SUBPROCESS_BYTES = 10, 4 * 2**30
_DECODE_SCRIPT = """
import io, pickle, sys
from PIL import Image
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, 2 * (int(sys.argv[2]),))
    resource.setrlimit(resource.RLIMIT_AS, 2 * (int(sys.argv[3]),))
except ImportError:  # Windows
    pass
image = Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=[sys.argv[1]])
sys.stdout.buffer.write(pickle.dumps(image.copy()))
"""

_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_NO_SUCH_PAGE = (404, 410)

_NOT_PIXELS = (  # first bytes of files often mistaken for images -> error message
    (rb"(?s)(<\?xml.*?|<!--.*?)?<(svg|!doctype svg)", "SVG is a vector format; render it to PNG first"),
    (rb"<(!doctype html|html|head|body)", "this is an HTML page, not an image"),
    (rb"%pdf", "PDF is a document, not an image; render its pages first"),
    (rb"version https://git-lfs", "this is a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (rb"%!ps", "EPS is a program; render it to PNG first"),
    (rb"(?s)....ftyp(hei|hev|mif)", "HEIF needs a plug-in: install pillow-heif and register its opener"),
    (rb"ii\*\0|mm\0\*", "a damaged TIFF, or one of a pixel format that Pillow cannot read"),
    (rb"(?s)\xff\xd8|\x89png|gif8|riff....webp|bm", "truncated or damaged"),
)


class ImageFetchError(ImageError, OSError):
    """Unreadable data: missing file, no permission, disk or network failure. A retry may help."""


class ImageMissingError(ImageFetchError):
    """Missing file or page (HTTP 404 and 410). A retry gives the same error."""


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of image files, such as ".png", that Pillow opens itself or with plug-ins."""
    Image.init()
    opened = {ending for ending, file_format in Image.EXTENSION.items() if file_format in Image.OPEN}
    return frozenset(opened | _OTHER_SUFFIXES)


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `load_image`, which describes them."""

    max_pixels: int
    max_aspect_ratio: float | None
    formats: Sequence[str]
    on_size: Callable[[int, int], None] | None
    name: str | None
    input_data_format: ChannelOrder | None
    allow_paths: bool
    allow_urls: bool
    timeout: float
    max_bytes: int


@dataclass(frozen=True)
class _Options:
    """`LoadOptions` with their defaults."""

    max_pixels: int = MAX_PIXELS
    max_aspect_ratio: float | None = MAX_ASPECT_RATIO
    formats: Sequence[str] = FORMATS
    on_size: Callable[[int, int], None] | None = None
    name: str | None = None
    input_data_format: ChannelOrder | None = None
    allow_paths: bool = True
    allow_urls: bool = True
    timeout: float = 30.0
    max_bytes: int = MAX_DOWNLOAD_BYTES

    def check_size(self, width: int, height: int) -> None:
        """Reject a file of this size, or report the size to `on_size`."""
        check_size(width, height, self.max_pixels, self.max_aspect_ratio)
        if self.on_size:
            self.on_size(width, height)


def load_image(source: Any, **options: Unpack[LoadOptions]) -> Image.Image:
    """Read an image from any source into an upright 8-bit RGB `PIL.Image`.

    Sources:
      - a `PIL.Image.Image` of any mode (returned unchanged if it is RGB and upright);
      - a local path (`str` or `os.PathLike`), a `file://`, `http(s)://` or `data:` URL, bare base64, or the
        bytes of an image file. Only the first frame is read;
      - a NumPy array or torch tensor, (H, W), (H, W, C) or (C, H, W) with 1 (gray), 2 (gray + alpha),
        3 (RGB) or 4 (RGBA) channels. A shape that fits both orders, such as (3, 8, 3), is read as channels
        first.

    Values are scaled to 8 bits by the full range of their type, never clipped:
      - uint8: unchanged; bool and 1-bit become 0 and 255;
      - uint16 arrays and modes `I;16*` and `I` (where Pillow puts 16-bit files): 65535 becomes 255. A mode
        `I` image beyond 0..65535 has no known range and is rejected;
      - other integer arrays must already lie in 0..255;
      - floats (arrays and mode `F`): 0..1 becomes 0..255; if any value exceeds 1, they must lie in 0..255.

    Transparency (alpha channel, palette or tRNS chunk) is composited on white. EXIF orientation is applied;
    unreadable EXIF is ignored. Embedded ICC profiles are converted to sRGB (LittleCMS, relative colorimetric
    with black point compensation); broken profiles and those of another color space than the pixels are
    ignored, as are PNG's gAMA and cHRM chunks. CMYK without a profile is converted by Pillow's formula. TIFFs
    with signed samples have no agreed black and white and are rejected.

    Args:
        source: See above.
        max_pixels: Refuse a file whose header declares more pixels (width * height) before decoding it.
            Default: `MAX_PIXELS`. Pillow's own limit of twice `PIL.Image.MAX_IMAGE_PIXELS` applies as well,
            and the limits of `image_limits_solo`.
        max_aspect_ratio: Refuse a file whose header declares a long side that exceeds the short one by more
            than this factor. Default: `MAX_ASPECT_RATIO`; None accepts any.
        formats: Formats of files that are read, by Pillow's names. Default: `FORMATS`.
        on_size: Called with the width and height of a file, before its pixels are decoded; servers wait here
            for memory.
        name: Name of the image in error messages. Default: the path, URL or kind of source.
        input_data_format: Axis order of an array. Default: inferred from its shape.
        allow_paths: Whether a string may name a local file. Servers turn this off for user input.
        allow_urls: Whether `http(s)://` is fetched. Servers turn this off, or check the address first.
        timeout: Maximum duration of a download, and maximum silence of the server, in seconds (default: 30).
        max_bytes: Maximum size of a download. Default: `MAX_DOWNLOAD_BYTES`.

    Raises:
        ImageError: Not an image, truncated, damaged, empty, or over a limit.
        ImageFetchError: The file or URL could not be read.
        ImageMissingError: There is no such file or page.
        TypeError: `source` has a type that cannot hold an image.
    """
    loaded = _load(source, _Options(**options))
    return Image.fromarray(loaded) if isinstance(loaded, np.ndarray) else loaded


def load_pixels(source: Any, **options: Unpack[LoadOptions]) -> NDArray[np.uint8]:
    """Read an image from any source into an array of its pixels.

    simplejpeg decodes plain JPEGs straight into the array, which is faster and gives the same pixels as
    Pillow, since both use libjpeg-turbo. Pillow decodes all other files, and all where simplejpeg is not
    installed.

    Args:
        source, **options: See `load_image`.

    Returns:
        (height, width, 3) uint8, writable.

    Raises:
        ImageError, ImageFetchError, ImageMissingError, TypeError: See `load_image`.
    """
    loaded = _load(source, _Options(**options))
    return loaded if isinstance(loaded, np.ndarray) else to_array(loaded)


def image_size(source: Any, **options: Unpack[LoadOptions]) -> tuple[int, int]:
    """Return (height, width) of what `load_pixels` returns for an image file, from its header if that tells.

    Args:
        source, **options: See `load_image`; an image file in any form, not one in memory.

    Raises:
        ImageError, ImageFetchError, ImageMissingError, TypeError: See `load_image`; damaged pixels are found
            by decoding alone.
    """
    return _read(source, _Options(**options), _size)


def read_bytes(source: Any, **options: Unpack[LoadOptions]) -> tuple[bytes, str]:
    """Return the bytes of an image file, and its name in error messages.

    Args:
        source, **options: See `load_image`; an image file in any form, not one in memory.

    Raises:
        ImageError, ImageFetchError, ImageMissingError, TypeError: See `load_image`.
    """
    return _read(source, _Options(**options), lambda file, name, _: (file.read(), name))


def _load(source: Any, options: _Options) -> Image.Image | np.ndarray:
    """Return the image, or its pixels if they were decoded without Pillow."""
    name, order = options.name, options.input_data_format
    if isinstance(source, Image.Image):
        name = name or f"{source.mode} image in memory"
        with _naming(name):
            _check(source, name, options)
            return _to_upright_rgb(source, name)
    if isinstance(source, np.ndarray):
        return from_array(source, name or f"array {source.shape} {source.dtype}", order)
    if type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "detach"):
        tensor = source.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16
        return from_array(array, name or f"tensor {array.shape} {tensor.dtype}", order)
    return _read(source, options, _decode)


def _read(source: Any, options: _Options, read: Callable[[BinaryIO, str, _Options], R]) -> R:
    """Open the image file of a source, and call `read` with it and its name."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return read(BytesIO(source), options.name or f"image of {len(source)} bytes", options)
    if isinstance(source, str):
        return _from_text(source, options, read)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        if not options.allow_paths:
            raise ImageError(f"{options.name or _shorten(path)}: reading local files is not allowed here")
        return _from_file(path, options, read)
    raise TypeError(
        "an image must be a PIL image, array, tensor, path, URL, base64 string or bytes, "
        f"not {type(source).__module__}.{type(source).__qualname__}"
    )


def _from_text(text: str, options: _Options, read: Callable[[BinaryIO, str, _Options], R]) -> R:
    """Read from a URL, data URL, file URL, path or bare base64, tried in this order."""
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        name = options.name or _shorten(text)
        if not options.allow_urls:
            raise ImageError(f"{name}: fetching URLs is not allowed here")
        return read(BytesIO(_download(text, name, options.timeout, options.max_bytes)), name, options)
    if scheme.startswith("data:"):
        name = options.name or f"data URL ({_shorten(text.partition(',')[0])})"
        return read(BytesIO(read_data_url(text, name)), name, options)
    if scheme.startswith("file:"):
        name = options.name or _shorten(text)
        if not options.allow_paths:
            raise ImageError(f"{name}: reading local files is not allowed here")
        return _from_file(_path_of_file_url(text, name), options, read)
    if options.allow_paths and os.path.isfile(text):  # noqa: PTH113 - Path.is_file raises on long base64
        return _from_file(text, options, read)
    # The smallest image files have about 30 bytes: a shorter text is a mistyped path.
    data = _decode_base64(text.encode("ascii", "replace")) if len(text) > 40 else None
    if data is not None:
        return read(BytesIO(data), options.name or "base64 image", options)
    if not options.allow_paths:
        raise ImageError(
            f"{options.name or _shorten(text)}: neither a URL nor base64, and reading local files is not "
            "allowed here"
        )
    return _from_file(text, options, read)  # raises with the reason


def _path_of_file_url(url: str, name: str) -> str:
    match = re.match(r"file:(//(localhost)?)?(/[^/].*)", url, re.IGNORECASE | re.DOTALL)
    if match is None:
        raise ImageMissingError(
            f"{name}: a file URL needs an absolute path, such as file:///folder/image.png"
        )
    path = match[3]
    # Many file URLs contain an unquoted path.
    return path if os.path.isfile(path) else os.fsdecode(unquote_to_bytes(path))  # noqa: PTH113


def read_data_url(url: str, name: str) -> bytes:
    """Return the bytes of a data URL, percent-encoded, base64 (see `_decode_base64`), or both.

    The media type may be missing, wrong, or have parameters; the part before the comma is case-insensitive.

    Args:
        url: URL that begins with "data:".
        name: Name of the image in error messages.

    Raises:
        ImageError: There is no comma, or the base64 is invalid.
    """
    header, comma, body = url.partition(",")
    if not comma:
        raise ImageError(f"{name}: a data URL needs a comma before its data")
    data = unquote_to_bytes(body.encode("utf-8", "replace"))
    if header.rpartition(";")[2].strip().lower() != "base64":
        return data
    decoded = _decode_base64(data)
    if decoded is None:
        raise ImageError(f"{name}: invalid base64")
    return decoded


def _from_file(path: str, options: _Options, read: Callable[[BinaryIO, str, _Options], R]) -> R:
    name = options.name or _shorten(path)
    try:
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a pipe may never end
            raise ImageMissingError(f"{name}: not a regular file")
        with Path(path).open("rb") as file:
            return read(file, name, options)
    except ImageError:
        raise
    except ValueError as error:  # a NUL byte in the path
        raise ImageMissingError(f"{name}: {error}") from error
    except OSError as error:
        kind = ImageMissingError if error.errno in _NO_SUCH_FILE else ImageFetchError
        raise kind(f"{name}: {error.strerror or error}") from error


def _decode(file: BinaryIO, name: str, options: _Options) -> Image.Image | np.ndarray:
    """Decode an open image file after checking its size and structure."""
    with _naming(name):
        return _decode_within_limits(file, name, options)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Raise an error with the image's name if a limit is exceeded."""
    try:
        yield
    except LimitError as error:
        raise ImageError(f"{name}: {error}") from error


def _size(file: BinaryIO, name: str, options: _Options) -> tuple[int, int]:
    """Return (height, width) of the decoded image, from the header where possible."""
    with _naming(name):
        start = _start(file)
        may_turn = True
        if start.startswith(_JPEG_START):
            data = file.read()
            may_turn = not check_jpeg(data)
            if not may_turn and (size := _jpeg_size(data)) is not None:
                options.check_size(size[1], size[0])
                return size
        elif start == _PNG_START:
            may_turn = check_png(file)
        if start == _PNG_START and may_turn:  # Pillow decodes a PNG to read its orientation
            return _size_of(_decode_within_limits(file, name, options))
        file.seek(0)
        image = _open(file, name, options.formats)
        _check(image, name, options)
        if image.format not in _FORMATS_WITH_SIZE:
            return _size_of(_decode_within_limits(file, name, options))
        width, height = image.size
        turn = _UPRIGHT.get(_orientation(image)) if may_turn else None
        return (width, height) if turn in _ON_ITS_SIDE else (height, width)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the stated (height, width) of a JPEG; None if Pillow must find or reject it."""
    if simplejpeg is None:
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if height and width else None


def _size_of(decoded: Image.Image | np.ndarray) -> tuple[int, int]:
    if isinstance(decoded, Image.Image):
        return decoded.height, decoded.width
    return decoded.shape[0], decoded.shape[1]


def _start(file: BinaryIO) -> bytes:
    """Return the first bytes of a file, after checking its size."""
    if (size := file.seek(0, os.SEEK_END)) > MAX_FILE_BYTES:
        raise LimitError(f"{size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
    file.seek(0)
    start = file.read(len(_PNG_START))
    file.seek(0)
    return start


def _decode_within_limits(file: BinaryIO, name: str, options: _Options) -> Image.Image | np.ndarray:
    start = _start(file)
    if start.startswith(_JPEG_START):
        data = file.read()
        if (pixels := _decode_plain_jpeg(data, check_jpeg(data), options)) is not None:
            return pixels
    elif start == _PNG_START:
        check_png(file)
    elif start.startswith(_TIFF_STARTS):
        check_tags(file)
    file.seek(0)
    image = _open(file, name, options.formats)
    _check(image, name, options)
    prepare_ppm(image)
    check_decoder(image, file)
    decoded: Image.Image = image
    if image.format in _FORMATS_IN_SUBPROCESS:
        decoded = _decode_in_subprocess(image, file, name)
    elif image.format == "WEBP":
        decoded = _decode_webp(image, name)
    rgb = _to_upright_rgb(decoded, name)
    rgb.format = None  # marks the image as checked; see _check
    return rgb


def _open(file: BinaryIO, name: str, formats: Sequence[str]) -> ImageFile.ImageFile:
    """Read the header of an image file."""
    Image.init()
    try:
        known = [file_format for file_format in formats if file_format in Image.OPEN]
        return Image.open(MeteredFile(file), formats=known)  # type: ignore[arg-type]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too large to decode safely ({error})") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: {_describe_file(file)}") from error
    except (LimitError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(error, name) from error


def _decode_in_subprocess(image: Image.Image, file: BinaryIO, name: str) -> Image.Image:
    """Decode in a subprocess with limits on CPU time and memory."""
    limits = (str(image.format), str(_MAX_SUBPROCESS_SECONDS), str(_MAX_SUBPROCESS_BYTES))
    file.seek(0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DECODE_SCRIPT, *limits],
            input=file.read(),
            capture_output=True,
            timeout=10 * _MAX_SUBPROCESS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode < 0:
        raise LimitError(
            f"{image.format} takes more than {_MAX_SUBPROCESS_SECONDS} s to decode; save it as PNG"
        )
    if done.returncode:
        raise _damaged(ValueError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2]), name)
    decoded: Image.Image = pickle.loads(done.stdout)
    return decoded


def _decode_webp(image: Any, name: str) -> Image.Image:
    """Decode a WebP; free its decoder, which holds the pixels twice, before they are copied again."""
    try:
        pixels, *_ = image._get_next()
        image._decoder = None
        decoded = Image.frombytes(image.mode, image.size, pixels, "raw", image.rawmode)
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(error, name) from error
    decoded.info = image.info
    return decoded


def _decode_plain_jpeg(data: bytes, regular: bool, options: _Options) -> np.ndarray | None:
    """Return the pixels of a JPEG, equal to Pillow's; None if Pillow must decode or reject it."""
    if simplejpeg is None:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        options.check_size(width, height)
        too_large = height * width > (Image.MAX_IMAGE_PIXELS or options.max_pixels)
        if too_large or colors not in ("YCbCr", "RGB") or not (regular or _is_plain(data)):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except LimitError:
        raise
    except ValueError:  # damaged or unusual; includes warnings
        return None


def _is_plain(data: bytes) -> bool:
    """Return whether a JPEG with metadata is a single upright sRGB image."""
    try:
        image = Image.open(MeteredFile(BytesIO(data)), formats=["JPEG"])  # type: ignore[arg-type]
        return image.format == "JPEG" and _orientation(image) == 1 and to_srgb(image) is None
    except LimitError:
        raise
    except Exception:  # `_open` opens it again and reports the error
        return False


def _check(image: Image.Image, name: str, options: _Options) -> None:
    """Reject, by its header, an image that must not be decoded."""
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{name}: no pixels ({width} x {height})")
    if image.format == "EPS":  # Pillow would run Ghostscript on it
        raise ImageError(f"{name}: EPS is a program; render it to PNG first")
    # Only an image straight from a file has a format; others are already decoded.
    if image.format:
        options.check_size(width, height)


def _to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode if necessary, convert to RGB, apply the orientation."""
    try:
        prepare_tiff(image, name)
        alpha = prepare_png(image)
        image.load()
        if image.mode == "P" and image.palette is None:
            raise ValueError("its pixels refer to a palette, but it has none")
        turn = _UPRIGHT.get(_orientation(image))
        rgb = to_rgb(image, name, alpha)
        if turn is not None:
            rgb = rgb.transpose(turn)
            rgb.info = {}  # EXIF no longer applies
        return rgb
    except (ImageError, LimitError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(error, name) from error


def _orientation(image: Image.Image) -> int:
    check_embedded_exif(image)
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # good pixels with broken metadata are common
        return 1


def _decode_base64(data: bytes) -> bytes | None:
    """Decode base64 (line breaks, URL-safe alphabet, missing padding allowed); None if invalid."""
    data = data.translate(bytes.maketrans(b"-_", b"+/"), delete=b" \t\n\r\v\f").rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError:
        return None


def _download(url: str, name: str, timeout: float, max_bytes: int) -> bytes:
    """Download an http(s) URL with the standard library, so published folders need no HTTP client."""
    deadline = time.monotonic() + timeout
    opener = urllib.request.OpenerDirector()  # no file: and ftp: handlers for redirects
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        headers = {"User-Agent": "solo-vlm", "Accept": "image/*,*/*;q=0.8"}
        request = urllib.request.Request(_ascii_url(url), headers=headers)
        with opener.open(request, timeout=timeout) as response:
            chunks, size = [], 0
            while chunk := response.read1(2**16):
                chunks.append(chunk)
                size += len(chunk)
                if size > max_bytes:
                    raise ImageError(f"{name}: larger than the limit of {max_bytes:,} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {timeout:g} s")
            expected = response.headers.get("Content-Length")
    except ImageError:
        raise
    except HTTPError as error:
        error_class = ImageMissingError if error.code in _NO_SUCH_PAGE else ImageFetchError
        raise error_class(f"{name}: HTTP {error.code} {error.reason}") from error
    except (ValueError, InvalidURL) as error:
        raise ImageMissingError(f"{name}: download failed ({error})") from error
    except Exception as error:  # URLError, TimeoutError, HTTPException
        raise ImageFetchError(
            f"{name}: download failed ({getattr(error, 'reason', None) or error})"
        ) from error
    if expected and expected.isdigit() and size < int(expected):
        raise ImageFetchError(f"{name}: download ended after {size:,} of {int(expected):,} bytes")
    return b"".join(chunks)


def _ascii_url(url: str) -> str:
    parts = urlsplit(url)
    if not parts.netloc.isascii():
        parts = parts._replace(netloc=parts.netloc.encode("idna").decode())
    return quote(parts.geturl(), safe="!#$%&'()*+,/:;=?@[]~")


def _describe_file(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(1024)
    if not head:
        return "empty file"
    for pattern, what in _NOT_PIXELS:
        if re.match(pattern, head.removeprefix(b"\xef\xbb\xbf").lstrip(), re.IGNORECASE):
            return what
    return "not an image of a supported format; save it as PNG or JPEG"


def _damaged(error: Exception, name: str) -> ImageError:
    if isinstance(error, OSError) and error.errno is not None:  # raised by the system, not by Pillow
        return ImageFetchError(f"{name}: {error.strerror}")
    return ImageError(f"{name}: truncated or damaged image ({str(error) or type(error).__name__})")


def _shorten(text: str, limit: int = 200) -> str:
    text = text.replace("\n", " ").encode(errors="backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-17:]}"
