"""Field values of rows: texts, IDs and images in any form."""

from __future__ import annotations

import json
import os
import posixpath
import re
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from solo_vlm.utils.files import is_inside


def load_json(text: str | bytes) -> Any:
    """Parse JSON like `json.loads`.

    Raises:
        ValueError: Invalid or too deeply nested JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key {printable(key[:100])!r} occurs twice in an object")
    return found


def check_text(text: str) -> str:
    """Return the text unchanged.

    Raises:
        ValueError: The text contains half a surrogate pair, which no tokenizer can read.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} ({text[error.start]!a}) is half a surrogate pair, or a byte of another "
            "encoding, but not text"
        ) from error
    return text


def printable(text: str) -> str:
    """Return the text with lone surrogates escaped."""
    return text.encode(errors="backslashreplace").decode()


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that compares digits as numbers: img2 before img10."""
    pieces = re.split(r"(\d{1,99})", name.lower())  # Python does not convert more than 4,300 digits
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in pieces]


def sample_id(value: Any) -> str | None:
    """Convert an `id` of any type to a string; None for a missing one, which pandas writes as NaN."""
    if value is None or value != value:
        return None
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else printable(str(value))


ImageSource = bytes | str

PART_KEYS = ("image", "path", "url", "base64", "image_url")
"""Fields of a content part that may contain its image; the first non-empty one is used."""

STRUCT_KEYS = ("bytes", *PART_KEYS)
"""Fields of an image struct that may contain the image; the first non-empty one is used."""

COLUMNS = ("image", "images")
"""Fields of a row or a message that contain images."""

_NAMING_KEYS = ("image", "path", "url", "image_url")  # fields that may hold a path

_LONGEST_PATH = 4096
_BASE64 = re.compile(r"[\w+/\-\s]{41,}={0,2}\s*", re.ASCII)  # the smallest images take about 30 bytes
_OPEN_URL = re.compile(
    r"https?://|data:", re.IGNORECASE
)  # cannot name a file of this machine or of an account
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_FILE_URL = re.compile(r"file:(//(localhost(?=/))?)?", re.IGNORECASE)
_IMAGE_HEAD = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|BM....\0{4}|....ftyp(avi|hei|hev|mif)|....jP  ",
    re.DOTALL,
)
_IMAGE_DATA = re.compile(  # the same in base64
    r"/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3]|AAAA.GZ0eXB(h|o|t)|AAAADGpQ", re.DOTALL
)
_IMAGE_NAME = re.compile(r"\S+\.(avif|bmp|gif|hei[cf]|jfif|jp2|jpe?g?|png|tiff?|webp)", re.IGNORECASE)


def image_source(value: Any) -> ImageSource | None:
    """Return the image that a value of any form contains; None if it is empty.

    Raises:
        ValueError: The value cannot be an image.
    """
    if isinstance(value, dict) and not value.keys().isdisjoint(STRUCT_KEYS):
        filled = value | {key: data_url(value.get(key)) for key in ("bytes", "base64")}  # JSON has no bytes
        value = next((filled[key] for key in STRUCT_KEYS if _is_filled(filled.get(key))), None)
    if value is None or value in ("", b"", {}) or value != value:  # NaN is pandas' None
        return None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        forms = f"bytes, text or a struct with one of {', '.join(STRUCT_KEYS)}"
        raise ValueError(f"an image is {forms}, not {type(value).__name__}")
    try:
        os.fsencode(value)  # a file name may contain bytes that are not text
    except UnicodeEncodeError as error:
        raise ValueError(f"{printable(value[:200])} is not a path, URL or base64") from error
    return value


def image_sources(value: Any) -> list[ImageSource]:
    """Return the images of a column, which holds one or a list.

    Raises:
        ValueError: An item of the list is empty, or cannot be an image.
    """
    if not isinstance(value, list):
        source = image_source(value)
        return [] if source is None else [source]
    sources = [source for item in value if (source := image_source(item)) is not None]
    if len(sources) < len(value):
        raise ValueError(f"{len(value) - len(sources)} of {len(value)} images are empty")
    return sources


def data_url(value: Any) -> Any:
    """Convert base64 to a data URL, which cannot be mistaken for a path; return other values unchanged."""
    if not isinstance(value, str) or not value or value[:5].lower() == "data:":
        return value
    return f"data:;base64,{value}"


class OutsidePathError(ValueError):
    """Image of a row outside the folder that must contain it."""


def locate_images(row: dict[str, Any], folder: str, root: str | None = None) -> dict[str, Any]:
    """Resolve the images of a row, so that they no longer depend on the working directory.

    Relative paths become relative to the folder, and bare base64 becomes a data URL.

    Args:
        row: Row in any format; fields outside the schema are returned unchanged.
        folder: Path or URL of the folder of the row's file.
        root: Path or URL of the folder that must contain the images, except those in the row and at http(s)
            URLs. Default: images may be anywhere.

    Raises:
        OutsidePathError: An image is outside `root`, with links resolved.
    """
    place = _Place(folder, root)
    row = _with_columns(row, place)
    if isinstance(row.get("messages"), list):
        row["messages"] = [_with_parts(message, place) for message in row["messages"]]
    return row


def looks_like_image(value: Any) -> bool:
    """Return whether a value of a field that is not for images contains or names an image."""
    while isinstance(value, list):
        value = next(filter(_is_filled, value), None)
    if isinstance(value, dict):
        value = next((value[key] for key in STRUCT_KEYS if _is_filled(value.get(key))), None)
    if isinstance(value, bytes):
        return _IMAGE_HEAD.match(value) is not None
    if not isinstance(value, str):
        return False
    if value[:11].lower() == "data:image/" or is_base64_image(value):
        return True
    name = urlsplit(value).path if value[:8].lower().startswith(("http://", "https://")) else value
    return len(value) <= _LONGEST_PATH and _IMAGE_NAME.fullmatch(name) is not None


def is_base64_image(text: str) -> bool:
    """Return whether a text is an image of a common format in base64."""
    return _IMAGE_DATA.match(text) is not None and _is_base64(text)


def local_path(text: str) -> str:
    """Return the path of a file URL, which may be relative in practice, though not by the standard."""
    return unquote(_FILE_URL.sub("", text, count=1)) if _FILE_URL.match(text) else text


def _is_filled(value: Any) -> bool:
    return bool(value) and value == value  # NaN is pandas' None


class _Place(NamedTuple):
    """Folder of a row's file, and the folder that must contain its images, if there is one."""

    folder: str
    root: str | None


def _with_columns(holder: dict[str, Any], place: _Place) -> dict[str, Any]:
    """Return a copy with resolved `image` and `images`, each of which is a value or a list."""

    def located(value: Any) -> Any:
        if isinstance(value, list):
            return [_located(item, place) for item in value]
        return _located(value, place)

    return holder | {key: located(holder[key]) for key in COLUMNS if key in holder}


def _with_parts(message: Any, place: _Place) -> Any:
    if not isinstance(message, dict):
        return message
    message = _with_columns(message, place)
    if isinstance(message.get("content"), list):
        message["content"] = [
            part | {key: _located(part[key], place) for key in _NAMING_KEYS if key in part}
            if isinstance(part, dict)
            else part
            for part in message["content"]
        ]
    return message


def _located(value: Any, place: _Place) -> Any:
    if isinstance(value, str):
        return _located_text(value, place)
    if isinstance(value, dict):
        if _is_filled(value.get("bytes")):  # the path next to them only tells their origin
            place = place._replace(root=None)
        names = {key: value[key] for key in _NAMING_KEYS if isinstance(value.get(key), str)}
        return value | {key: _located_text(name, place) for key, name in names.items()}
    return value


def _located_text(text: str, place: _Place) -> str:
    if not text or _OPEN_URL.match(text):
        return text
    path = local_path(text)
    if _URL.match(text) or (path != text and path.startswith("/")):  # an absolute file URL
        _check_inside(path, place.root)
        return text
    if "\\" in path and not ("://" not in place.folder and _is_path(f"{place.folder}/{path}", path)):
        path = path.replace("\\", "/")  # written on Windows
    absolute = path if path.startswith("/") else f"{place.folder}/{path}"
    if _is_base64(path) and not _is_path(absolute, path):
        return str(data_url(text))
    _check_inside(absolute, place.root)
    return absolute


def _check_inside(location: str, root: str | None) -> None:
    if root is None or _OPEN_URL.match(location):
        return
    if "://" in root:
        prefix = posixpath.normpath(root) + "/"
        inside = "::" not in location and posixpath.normpath(location).startswith(prefix)
    else:
        inside = "://" not in location and is_inside(location, root)
    if not inside:
        raise OutsidePathError(f"{printable(location[:200])} is outside {root}")


def _is_path(absolute: str, text: str) -> bool:
    """Return whether a text without a dot is a path rather than base64."""
    if "://" in absolute:  # a remote lookup is slow
        return not is_base64_image(text)
    return len(absolute) <= _LONGEST_PATH and os.path.isfile(absolute)  # noqa: PTH113 - Path.is_file raises


def _is_base64(text: str) -> bool:
    return len(text) > _LONGEST_PATH or _BASE64.fullmatch(text) is not None
