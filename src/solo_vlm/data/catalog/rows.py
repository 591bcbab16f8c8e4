"""Building blocks of converters: fields and images of a raw row, and the sample rows made of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_vlm.data.sample import SampleError
from solo_vlm.data.values import data_url, image_source, is_base64_image, local_path, natural_key, sample_id

Part = dict[str, Any]
Turn = tuple[str, list[Part]]
StoredImage = dict[str, Any]
RawRow = dict[str, Any]
SampleRow = dict[str, Any]

IMAGE: Part = {"type": "image", "text": None}

# Image archives are often unpacked into a folder `images` that the rows do not mention.
_IMAGE_FOLDERS = ("", "images")
_MAX_NAME_LENGTH = 255

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def role(name: Any) -> str:
    """Return the role in the sample schema.

    Raises:
        SampleError: The role is unknown ("role").
    """
    if not isinstance(name, str) or name.lower() not in _ROLES:
        raise SampleError("role", f"unknown role {name!r}")
    return _ROLES[name.lower()]


def text(value: Any) -> Part:
    """Return a text part, stripped.

    Raises:
        SampleError: The value is not text ("text") or is empty ("text-empty").
    """
    if not isinstance(value, str):
        raise SampleError("text", f"expected text, found {type(value).__name__}")
    if not value.strip():
        raise SampleError("text-empty", "the row has an empty text")
    return {"type": "text", "text": value.strip()}


def document(value: Any, images: Iterable[StoredImage] = (), id: Any = None) -> SampleRow:
    """Build a pre-training sample: one assistant turn, its images before its text."""
    stored = list(images)
    return _row([("assistant", [IMAGE] * len(stored) + [text(value)])], stored, id)


def conversation(turns: list[Turn], images: Iterable[StoredImage] = (), id: Any = None) -> SampleRow:
    """Build a fine-tuning sample. Images that no turn places go to the start of the first user turn.

    Raises:
        SampleError: A user turn ("no-question") or an assistant turn ("no-answer") is missing, or the turns
            place more images than there are ("image-count").
    """
    if not any(role == "assistant" for role, _ in turns):
        raise SampleError("no-answer", "no assistant turn")
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise SampleError("no-question", "no user turn")
    stored = list(images)
    placed = sum(part is IMAGE for _, parts in turns for part in parts)
    if placed > len(stored):
        raise SampleError("image-count", f"{placed} image placeholders for {len(stored)} images")
    turns = list(turns)
    turns[first] = ("user", [IMAGE] * (len(stored) - placed) + turns[first][1])
    return _row(turns, stored, id)


def _row(turns: list[Turn], images: list[StoredImage], id: Any) -> SampleRow:
    return {
        "id": sample_id(id),
        "messages": [{"role": role, "content": parts} for role, parts in turns],
        "images": images,
    }


def image_member(row: dict[str, Any]) -> Any:
    """Return the first image of a tar row, whose fields are member suffixes; None if there is no image."""
    from solo_vlm.models.solo.image_loading_solo import image_suffixes

    suffixes = image_suffixes()
    names = sorted((name for name in row if f".{name.rpartition('.')[2]}" in suffixes), key=natural_key)
    return next((row[name] for name in names if row[name]), None)


def field(row: Any, name: str) -> Any:
    """Return a field of a raw row.

    Raises:
        SampleError: The field is missing: the raw data is not in the expected format ("raw-schema").
    """
    if not isinstance(row, dict) or name not in row:
        raise SampleError("raw-schema", f"no field {name}")
    return row[name]


def list_field(row: Any, name: str) -> list[Any]:
    """Return a list field of a raw row.

    Raises:
        SampleError: The field is missing or not a list ("raw-schema").
    """
    value = field(row, name)
    if not isinstance(value, list):
        raise SampleError("raw-schema", f"field {name} is {type(value).__name__}, not a list")
    return value


@dataclass(frozen=True)
class RawFolder:
    """Folder of the raw data, or the one of the raw file: where rows find the images that they name."""

    root: Path

    def image(self, value: Any) -> StoredImage:
        """Convert an image of a raw row to the form of a sample file.

        Args:
            value: Bytes, a struct with `bytes` and `path`, a path below the folder, base64, or an http(s),
                data or file URL. The bytes of a file are stored unchanged; other URLs are kept as URLs.

        Returns:
            A dictionary of `bytes` and `path`, one of which is None.

        Raises:
            SampleError: There is no image ("image-missing"), or its path leaves the folder ("image-path").
        """
        try:
            source = image_source(value)
        except ValueError as error:
            raise SampleError("image-path", str(error)) from error
        if source is None:
            raise SampleError("image-missing", "the row has no image")
        if isinstance(source, bytes):
            return {"bytes": source, "path": None}
        if source.startswith(("http://", "https://", "data:")):
            return {"bytes": None, "path": source}
        if is_base64_image(source):
            return {"bytes": None, "path": data_url(source)}
        value = local_path(source)
        if max(map(len, value.split("/"))) > _MAX_NAME_LENGTH:
            raise SampleError("image-path", f"{value[:80]}... is not a file name")
        return {"bytes": self._read(value), "path": None}

    def _read(self, name: str) -> bytes:
        # An absolute path is that of the machine that made the data: only its last part is useful.
        relative = Path(name).name if Path(name).is_absolute() else name
        for folder in _IMAGE_FOLDERS:
            base = self.root.absolute() / folder
            path = Path(os.path.normpath(base / relative))
            if not path.is_relative_to(base):
                raise SampleError("image-path", f"{name} is outside {self.root}")
            if path.is_file():
                return path.read_bytes() or self._raise_missing(name)
        return self._raise_missing(name)

    def _raise_missing(self, name: str) -> bytes:
        raise SampleError("image-missing", f"{name} is empty or not in {self.root}")
