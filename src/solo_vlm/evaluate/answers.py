"""Answers on disk as they come, so that a run that was killed goes on where it stood."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.json_lines import LinesFile


@dataclass(frozen=True)
class SavedAnswer:
    """One answer.

    Attributes:
        row: of the benchmark's split, from 0.
        request: hash of prompt and settings; another one makes the answer useless.
        response: None where the row could not be asked.
        error: why not.
    """

    row: int
    request: str
    response: str | None
    error: str | None = None


class AnswerFile:
    """An append-only file of JSON lines. What `append` has returned from survives a crash.

    Args:
        path: of the file; it may exist. A last line that was cut off is dropped.

    Raises:
        SoloError: it exists and holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._file = LinesFile(path)
        try:
            self._saved = {record["row"]: SavedAnswer(**record) for record in self._file.records}
        except (KeyError, TypeError) as error:
            raise SoloError(f"{path} does not hold answers ({error}): remove it to ask again") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.__exit__(*unused)

    def get(self, row: int, request: str) -> SavedAnswer | None:
        """The answer to this very request, if there is one; what failed is tried again."""
        saved = self._saved.get(row)
        return saved if saved and saved.request == request and saved.error is None else None

    def append(self, answers: Iterable[SavedAnswer]) -> None:
        """Add answers, on the disk itself before this returns."""
        new = {answer.row: answer for answer in answers}
        self._file.append(map(asdict, new.values()))
        self._saved |= new
