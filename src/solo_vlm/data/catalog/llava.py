"""Rows in the style of LLaVA: `{"id", "image", "conversations": [{"from", "value"}, ...]}`.

`image` is a path, is absent for a text-only row, or is a list of paths. `<image>` marks its place in a
turn. In the release's JSONL some turns are bare strings: the first is the user's, then they alternate.
"""

from __future__ import annotations

from typing import Any

from solo_vlm.data.catalog.entry import Convert, RawRow, SampleRow
from solo_vlm.data.catalog.raw_folder import RawFolder, StoredImage
from solo_vlm.data.catalog.rows import (
    IMAGE,
    Part,
    conversation,
    document,
    field,
    list_field,
    role,
    text,
)
from solo_vlm.data.sample import IMAGE_PLACEHOLDER, SampleError


def chat(row: RawRow, folder: RawFolder) -> SampleRow:
    """The conversation, with images where their marks are."""
    turns = [(speaker, _parts(value)) for speaker, value in _turns(row)]
    return conversation(turns, _images(row, folder), row.get("id"))


def answers(row: RawRow, folder: RawFolder) -> SampleRow:
    """A document of what the assistant says: the questions are mere prompts for a caption."""
    said = [value for speaker, value in _turns(row) if speaker == "assistant"]
    return document("\n".join(said), _images(row, folder), row.get("id"))


def questions_and_answers(row: RawRow, folder: RawFolder) -> SampleRow:
    """A document of all that is said."""
    said = [value.replace(IMAGE_PLACEHOLDER, "").strip() for _, value in _turns(row)]
    return document("\n".join(said), _images(row, folder), row.get("id"))


def within(prefix: str, convert: Convert) -> Convert:
    """Take only rows whose image lies below a folder: one data set out of a published mixture."""

    def convert_within(row: RawRow, folder: RawFolder) -> SampleRow:
        if not str(row.get("image", "")).startswith(prefix):
            raise SampleError("other-data-set", f"the image is not below {prefix}")
        return convert(row, folder)

    return convert_within


def _turns(row: RawRow) -> list[tuple[str, str]]:
    turns = [_turn(turn, number) for number, turn in enumerate(list_field(row, "conversations"))]
    if not turns:
        raise SampleError("no-answer", "an empty conversation")
    return turns


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if isinstance(turn, str):
        return ("assistant" if number % 2 else "user"), turn
    value = field(turn, "value")
    if not isinstance(value, str):
        raise SampleError("text", f"turn {number} is {type(value).__name__}")
    return role(field(turn, "from")), value


def _parts(value: str) -> list[Part]:
    parts: list[Part] = []
    for number, piece in enumerate(value.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append(IMAGE)
        if piece.strip():
            parts.append(text(piece))
    if not parts:
        raise SampleError("text-empty", "an empty turn")
    return parts


def _images(row: RawRow, folder: RawFolder) -> list[StoredImage]:
    value = row.get("image")
    if value is None:
        return []
    return [folder.image(image) for image in (value if isinstance(value, list) else [value])]
