"""Crash-safe JSON Lines files, from which interrupted work resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self

from solo_vlm.utils.errors import SoloError


class LinesFile:
    """Append-only JSON Lines file; records survive a crash once `append` has returned.

    Args:
        path: File, created if missing. A truncated last line is dropped.

    Attributes:
        records: Records read when the file was opened.

    Raises:
        SoloError: The file exists and is not JSON Lines of objects.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            self.records = self._read()
        except ValueError as error:
            self._file.close()
            raise SoloError(
                f"{path} is not a file of one JSON object per line ({error}): remove it"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and sync them to disk."""
        self._file.writelines(map(json_line, records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        records = [json.loads(line) for line in lines]
        if not all(isinstance(record, dict) for record in records):
            raise ValueError("a line is not an object")
        return records


def json_line(record: dict[str, Any]) -> bytes:
    """Encode a record as a line of UTF-8; undecodable bytes of file names are escaped."""
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
