"""JSON lines; a unit is a block of lines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_LINES_PER_UNIT = 256


class JsonlSource:
    """Rows of .jsonl files. Relative image paths count from the folder of the file."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name = name
        self._files = files
        self._units = [(file, *block) for file in files for block in _blocks(file)]

    def __len__(self) -> int:
        return len(self._units)

    def read(self, unit: int) -> list[dict[str, Any]]:
        """All rows of a block. A line that is no JSON object becomes a row that the schema refuses."""
        file, start, end = self._units[unit]
        with file.open("rb") as stream:
            stream.seek(start)
            lines = stream.read(end - start).splitlines()
        return [_with_absolute_images(_parse(line), file.parent) for line in lines if line.strip()]

    def where(self, unit: int, row: int) -> str:
        """Name file, position of the block and row in it."""
        file, start, _ = self._units[unit]
        return f"{file}, block at byte {start}, row {row}"

    def fingerprint(self) -> str:
        """Names and sizes of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


def _blocks(file: Path) -> list[tuple[int, int]]:
    """(start, end) byte offsets of blocks of whole lines."""
    starts, position = [0], 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            position += len(line)
            if number % _LINES_PER_UNIT == 0:
                starts.append(position)
    return [(start, end) for start, end in zip(starts, [*starts[1:], position], strict=True) if end > start]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        return {"messages": f"not JSON: {error}"}
    return row if isinstance(row, dict) else {"messages": "not a JSON object"}


def _with_absolute_images(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    for message in row["messages"] if isinstance(row.get("messages"), list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("path"), str):
                part["path"] = str(folder / part["path"])
    if isinstance(row.get("images"), list):
        row["images"] = [_absolute(image, folder) for image in row["images"]]
    return row


def _absolute(image: Any, folder: Path) -> Any:
    """Resolve a path; leave URLs, data URLs and everything else alone."""
    if isinstance(image, str) and "://" not in image and not image.startswith("data:"):
        return str(folder / image)
    return image
