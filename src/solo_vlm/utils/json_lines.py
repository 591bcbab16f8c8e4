"""Records on disk as they come, so that work that was killed goes on where it stood."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self

from solo_vlm.utils.errors import SoloError


class LinesFile:
    """An append-only file of JSON objects, one a line. What `append` has returned from survives a crash.

    Args:
        path: of the file; it may exist. A last line that was cut off is dropped.

    Attributes:
        records: what the file held when it was opened.

    Raises:
        SoloError: it exists and holds something else.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            self.records = self._read()
        except ValueError as error:
            self._file.close()
            raise SoloError(f"{path} does not hold a JSON object a line ({error}): remove it") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records, on the disk itself before this returns."""
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
            raise ValueError("a line is no object")
        return records


def json_line(record: dict[str, Any]) -> bytes:
    """A record as a line of UTF-8; what a file name has that is no Unicode is escaped."""
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
