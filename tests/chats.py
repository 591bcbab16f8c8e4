"""Chats to fine-tune on: with images and without, of one turn and of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tiny import png

COLOURS = ("red", "blue")


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "text": None}] * images
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def picture_chat(number: int) -> dict[str, Any]:
    """Two turns about an image of two patches or four."""
    colour = COLOURS[number % 2]
    image = Image.new("RGB", (64, 32 * (1 + number % 3 // 2)), colour)
    messages = [
        turn("user", "what is this?", images=1),
        turn("assistant", colour),
        turn("user", "hello"),
        turn("assistant", "world"),
    ]
    return {"messages": messages, "images": [{"bytes": png(image), "path": None}]}


def text_chat() -> dict[str, Any]:
    """One turn without an image."""
    return {"messages": [turn("user", "what is seven?"), turn("assistant", "seven")], "images": []}


def write_chats(folder: Path, count: int = 16) -> None:
    """`pictures.parquet`, `texts.parquet`, and `chats.parquet` with both, in turn."""
    pictures, texts = [picture_chat(number) for number in range(count)], [text_chat()] * count
    both = [chat for pair in zip(pictures, texts, strict=True) for chat in pair]
    for name, rows in (("pictures", pictures), ("texts", texts), ("chats", both)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=4)
