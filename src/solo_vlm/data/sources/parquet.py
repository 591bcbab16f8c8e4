"""Parquet files; a shard is a row group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from solo_vlm.data.image_values import COLUMNS, locate_images
from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.files import DataFile, broken_shard, fingerprint, retried
from solo_vlm.data.sources.shards import ShardIndex
from solo_vlm.utils.errors import SoloError

_NEEDED = ("messages", *COLUMNS)


class ParquetSource:
    """Rows of parquet files. Images stay the encoded bytes that they are in the file; relative paths count
    from its folder.

    Raises:
        SoloError: a file has no readable footer, so that nobody can say what it holds.
    """

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._shards = ShardIndex(files, _filled_groups)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """All rows of a row group; a broken one is a single row that says so."""
        file, (group,) = self._shards[shard]
        try:
            return _Rows(_read_group(file, group), file.folder)
        except (pa.ArrowException, OSError) as error:
            return broken_shard(error, f"{file.url}, row group {group}")

    def where(self, shard: int, row: int) -> str:
        """Name file, row group and row."""
        file, (group,) = self._shards[shard]
        return f"{file.url}, row group {group}, row {row}"

    def fingerprint(self) -> str:
        """Names and sizes of the files."""
        return fingerprint(self._shards.files)


class _Rows(Sequence[dict[str, Any]]):
    """Rows of a table, made Python objects one at a time: images are not held twice."""

    def __init__(self, table: pa.Table, folder: str) -> None:
        self._table = table
        self._folder = folder

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        row = {}
        for name, column in zip(self._table.column_names, self._table.columns, strict=True):
            try:
                row[name] = column[index].as_py()
            except (ValueError, OverflowError, pa.ArrowException) as error:  # text that is no UTF-8, a date
                if name in _NEEDED:
                    raise SampleError("schema", f"column {name} cannot be read: {error}") from error
        return locate_images(row, self._folder)


@retried
def _read_group(file: DataFile, group: int) -> pa.Table:
    with file.open(ahead=False) as stream, pq.ParquetFile(stream) as parquet:
        return parquet.read_row_group(group)


def _filled_groups(file: DataFile) -> NDArray[np.int64]:
    """(row groups that have rows, 1) numbers of them."""
    metadata = _read_metadata(file)
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.flatnonzero(np.array(rows, np.int64))[:, None]


@retried
def _read_metadata(file: DataFile) -> pq.FileMetaData:
    try:
        with file.open(ahead=False) as stream:
            return pq.read_metadata(stream)
    except pa.ArrowException as error:
        raise SoloError(f"{file.url} is not a readable parquet file: {error}") from error
