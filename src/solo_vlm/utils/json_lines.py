"""Crash-safe JSON Lines files, from which interrupted work resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import try_lock, writing


class LinesFile:
    """Append-only JSON Lines file of one process; records survive a crash once `append` has returned.

    Args:
        path: File, created if missing. A truncated last line is dropped.

    Attributes:
        records: Records read when the file was opened.

    Raises:
        SoloError: The file exists and is not JSON Lines of objects, another process has it open, or it cannot
            be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        try:
            try_lock(self._file)
            with writing(path):
                self.records = self._read()
        except BlockingIOError as error:
            self._file.close()
            raise SoloError(
                f"another process is writing to {path}: wait for it, or choose another"
            ) from error
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
        """Append records and sync them to disk; all of them, or none if they do not fit."""
        with writing(self._path):
            end, data = self._file.seek(0, os.SEEK_END), memoryview(b"".join(map(json_line, records)))
            try:
                while data:
                    data = data[self._file.write(data) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise

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
