"""Parquet files; a unit is a row group."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.errors import SoloError


class ParquetSource:
    """Rows of parquet files. Images stay the encoded bytes that they are in the file."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name = name
        self._files = files
        self._units = [(file, group) for file in files for group in _filled_groups(file)]

    def __len__(self) -> int:
        return len(self._units)

    def read(self, unit: int) -> list[dict[str, Any]]:
        """All rows of a row group."""
        file, group = self._units[unit]
        with pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(group).to_pylist()

    def where(self, unit: int, row: int) -> str:
        """Name file, row group and row."""
        file, group = self._units[unit]
        return f"{file}, row group {group}, row {row}"

    def fingerprint(self) -> str:
        """Names, sizes and row counts of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name} {file.stat().st_size} {_metadata(file).num_rows}\n".encode())
        return digest.hexdigest()[:16]


def _filled_groups(file: Path) -> list[int]:
    metadata = _metadata(file)
    return [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]


def _metadata(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise SoloError(f"{file} is not a readable parquet file: {error}") from error
