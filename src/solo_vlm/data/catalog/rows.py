"""Parts from which every converter builds the row of a sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from solo_vlm.data.catalog.entry import SampleRow
from solo_vlm.data.catalog.raw_folder import StoredImage
from solo_vlm.data.sample import SampleError
from solo_vlm.data.values import natural_key, sample_id

Part = dict[str, Any]
Turn = tuple[str, list[Part]]

IMAGE: Part = {"type": "image", "text": None}

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def role(name: Any) -> str:
    """The schema's name of a role.

    Raises:
        SampleError: no such role is known ("role").
    """
    if not isinstance(name, str) or name.lower() not in _ROLES:
        raise SampleError("role", f"unknown role {name!r}")
    return _ROLES[name.lower()]


def text(value: Any) -> Part:
    """A text part, without blanks around it.

    Raises:
        SampleError: it is no text ("text") or there is none ("text-empty").
    """
    if not isinstance(value, str):
        raise SampleError("text", f"expected text, found {type(value).__name__}")
    if not value.strip():
        raise SampleError("text-empty", "the row has an empty text")
    return {"type": "text", "text": value.strip()}


def document(value: Any, images: Iterable[StoredImage] = (), id: Any = None) -> SampleRow:
    """A sample of pre-training: one assistant turn, its images before its text."""
    stored = list(images)
    return _row([("assistant", [IMAGE] * len(stored) + [text(value)])], stored, id)


def conversation(turns: list[Turn], images: Iterable[StoredImage] = (), id: Any = None) -> SampleRow:
    """A sample of fine-tuning. Images that no turn places come first in the first user turn.

    Raises:
        SampleError: nobody asks ("no-question") or answers ("no-answer"), or a turn places an image that
            is not there ("image-count").
    """
    if not any(role == "assistant" for role, _ in turns):
        raise SampleError("no-answer", "no turn of the assistant")
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise SampleError("no-question", "no turn of the user")
    stored = list(images)
    placed = sum(part is IMAGE for _, parts in turns for part in parts)
    if placed > len(stored):
        raise SampleError("image-count", f"{placed} places for {len(stored)} images")
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
    """The first image in a row of a tar, whose fields have the suffixes of its members; None without one."""
    from solo_vlm.models.solo.image_loading_solo import image_suffixes

    suffixes = image_suffixes()
    names = sorted((name for name in row if f".{name.rpartition('.')[2]}" in suffixes), key=natural_key)
    return next((row[name] for name in names if row[name]), None)


def field(row: Any, name: str) -> Any:
    """A field of a raw row.

    Raises:
        SampleError: the row does not have it: the raw data are not in the expected shape ("raw-schema").
    """
    if not isinstance(row, dict) or name not in row:
        raise SampleError("raw-schema", f"no field {name}")
    return row[name]


def list_field(row: Any, name: str) -> list[Any]:
    """A field that holds a list.

    Raises:
        SampleError: it does not ("raw-schema").
    """
    value = field(row, name)
    if not isinstance(value, list):
        raise SampleError("raw-schema", f"field {name} is {type(value).__name__}, not a list")
    return value
