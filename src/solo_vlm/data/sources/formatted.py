"""Source of sample rows, made of raw rows while they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solo_vlm.data.formats.row_format import RowFormat, columns_of
from solo_vlm.data.formats.rows import SampleRow
from solo_vlm.data.sources.files import DataFile, RawSource

FIRST_ROWS = 8  # rows from which format and columns are recognized


class FormattedSource:
    """Sample rows of the files of a source, in one format.

    Args:
        raw: Raw rows of the files.
        row_format: Format of the rows.
    """

    def __init__(self, raw: RawSource, row_format: RowFormat) -> None:
        self.name = raw.name
        self.row_format = row_format
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw)

    def columns(self) -> list[str]:
        """Return the columns of the first raw rows."""
        return columns_of(self._raw.first_rows(FIRST_ROWS))

    def read(self, shard: int) -> Sequence[SampleRow]:
        """Return all rows of a shard; accessing a broken row or one that is left out raises SampleError."""
        return _Rows(self._raw.read(shard), self._raw.file(shard), self.row_format)

    def memory(self, shard: int) -> int:
        """Return about how many bytes an open shard takes."""
        return self._raw.memory(shard)

    def where(self, shard: int, row: int) -> str:
        """Name file and row, for messages."""
        return self._raw.where(shard, row)

    def fingerprint(self) -> str:
        """Return a hash of the files, and how their rows are read unless they are samples."""
        is_plain = self.row_format == RowFormat(self._raw.own_format)
        return self._raw.fingerprint() + ("" if is_plain else f" {self.row_format}")


class _Rows(Sequence[SampleRow]):
    """Rows that are converted when they are accessed."""

    def __init__(self, rows: Sequence[Any], file: DataFile, row_format: RowFormat) -> None:
        self._rows = rows
        self._file = file
        self._format = row_format

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._file.locate_images(self._format(self._rows[index]))
