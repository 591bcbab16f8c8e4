"""Texts that rows, prompts and names hold, and what to do about those that no encoding can write."""

from __future__ import annotations

import json
import re
from typing import Any


def load_json(text: str | bytes) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: it is no JSON, or too deeply nested to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def check_text(text: str) -> str:
    """Return the text unchanged.

    Raises:
        ValueError: it has half of a surrogate pair, which no tokenizer can read.
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
    """The text with lone surrogates escaped."""
    return text.encode(errors="backslashreplace").decode()


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """A key that compares digits as numbers: img2 before img10."""
    pieces = re.split(r"(\d+)", name.lower())
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in pieces]


def sample_id(value: Any) -> str | None:
    """A name from an `id` of any type; None where there is none (NaN is how pandas writes that)."""
    if value is None or value != value:
        return None
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else printable(str(value))
