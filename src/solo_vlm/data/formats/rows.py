"""Building blocks of converters: fields and images of a raw row, and the sample rows made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from solo_vlm.data.sample import IMAGE_PLACEHOLDER, SampleError
from solo_vlm.data.values import ImageSource, image_source, natural_key, sample_id

Part = dict[str, Any]
Turn = tuple[str, list[Part]]
RawRow = dict[str, Any]
SampleRow = dict[str, Any]

IMAGE: Part = {"type": "image", "text": None}

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model"), "assistant"),
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


def parts(value: Any) -> list[Part]:
    """Return the parts of a text in which `<image>` marks the places of images.

    Raises:
        SampleError: The value is not text ("text") or is empty ("text-empty").
    """
    if not isinstance(value, str):
        raise SampleError("text", f"expected text, found {type(value).__name__}")
    found: list[Part] = []
    for number, piece in enumerate(value.split(IMAGE_PLACEHOLDER)):
        if number:
            found.append(IMAGE)
        if piece.strip():
            found.append(text(piece))
    if not found:
        raise SampleError("text-empty", "the row has an empty text")
    return found


def image(value: Any) -> ImageSource:
    """Return an image of a raw row: bytes, a path or a URL.

    Raises:
        SampleError: There is no image ("image-missing"), or the value cannot be one ("image-path").
    """
    if (source := source_of(value)) is None:
        raise SampleError("image-missing", "the row has no image")
    return source


def source_of(value: Any) -> ImageSource | None:
    """Return the image that a value of any form contains; None if it is empty.

    Raises:
        SampleError: The value cannot be an image ("image-path").
    """
    try:
        return image_source(value)
    except ValueError as error:
        raise SampleError("image-path", str(error)) from error


def document(value: Any, images: Iterable[ImageSource] = (), id: Any = None) -> SampleRow:
    """Build a pre-training sample: one assistant turn. Its images precede the text if that places none.

    Raises:
        SampleError: The value is not text ("text") or is empty ("text-empty"), or places only some of the
            images, or more than there are ("image-count").
    """
    stored = list(images)
    content = parts(value) if stored else [text(value)]
    if all(part is IMAGE for part in content):
        raise SampleError("text-empty", f"the row has no text besides {IMAGE_PLACEHOLDER}")
    return _row([("assistant", content)], 0, stored, id)


def conversation(turns: list[Turn], images: Iterable[ImageSource] = (), id: Any = None) -> SampleRow:
    """Build a fine-tuning sample. Images go to the start of the first user turn if no turn places any.

    Raises:
        SampleError: A user turn ("no-question") or an assistant turn ("no-answer") is missing, or the turns
            place only some of the images, or more than there are ("image-count").
    """
    if not any(role == "assistant" for role, _ in turns):
        raise SampleError("no-answer", "no assistant turn")
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise SampleError("no-question", "no user turn")
    return _row(turns, first, list(images), id)


def _row(turns: list[Turn], first: int, images: list[ImageSource], id: Any) -> SampleRow:
    """Build a sample row; images precede turn `first` if no turn places any."""
    placed = sum(part is IMAGE for _, parts in turns for part in parts)
    if placed not in (0, len(images)):
        raise SampleError("image-count", f"{placed} image placeholders for {len(images)} images")
    contents = [parts for _, parts in turns]
    contents[first] = [IMAGE] * (len(images) - placed) + contents[first]
    return {
        "id": sample_id(id),
        "messages": [
            {"role": role, "content": parts} for (role, _), parts in zip(turns, contents, strict=True)
        ],
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
