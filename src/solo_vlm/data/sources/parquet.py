"""Parquet files: a reader whose shards are row groups, and a writer of samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from solo_vlm.data.formats.row_format import KNOWN_COLUMNS
from solo_vlm.data.formats.rows import RawRow
from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.files import (
    DataFile,
    RawSource,
    ShardIndex,
    broken_shard,
    fingerprint,
    readable_rows,
)
from solo_vlm.data.sources.retries import retried
from solo_vlm.utils.errors import SoloError, first_line
from solo_vlm.utils.files import new_file

_ROWS_PER_BATCH = 4096


class ParquetSource(RawSource):
    """Rows of parquet files; images stay encoded bytes, as in the file.

    Raises:
        SoloError: A file has no readable footer.
    """

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._shards = ShardIndex(files, _filled_groups)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, shard: int) -> Sequence[RawRow]:
        """Return all rows of a row group; accessing a row of a broken one raises SampleError."""
        file, (group, _) = self._shards[shard]
        try:
            return TableRows(_read_group(file, group))
        except (pa.ArrowException, OSError) as error:
            return broken_shard(error, f"{file.url}, row group {group}")

    def file(self, shard: int) -> DataFile:
        """Return the file of a row group."""
        return self._shards[shard][0]

    def memory(self, shard: int) -> int:
        """Return the size of a row group, whose images stay compressed."""
        return self._shards[shard][1][1]

    def _first_of(self, shard: int, count: int) -> list[Any]:
        """Return up to `count` rows of a row group, without reading the rest of it."""
        file, (group, _) = self._shards[shard]
        try:
            return readable_rows(TableRows(_read_group(file, group, count)), count)
        except (pa.ArrowException, OSError) as error:
            return readable_rows(broken_shard(error, file.url), count)

    def where(self, shard: int, row: int) -> str:
        """Name file, row group and row."""
        file, (group, _) = self._shards[shard]
        return f"{file.url}, row group {group}, row {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._shards.files)


class TableRows(Sequence[RawRow]):
    """Rows of a table, converted to Python objects one at a time, so images are not held twice.

    Labels have the names of their classes, if `datasets` wrote the table.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._class_names = _class_names(table.schema)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row: RawRow = {}
        for name, column in zip(self._table.column_names, self._table.columns, strict=True):
            try:
                row[name] = column[index].as_py()
                if name in self._class_names and row[name] is not None:
                    row[name] = self._class_names[name].get(row[name])
            except (ValueError, OverflowError, pa.ArrowException) as error:  # text that is not UTF-8, a date
                if name in KNOWN_COLUMNS:
                    raise SampleError(
                        "schema", f"column {name} cannot be read: {first_line(error)}"
                    ) from error
        return row


def _class_names(schema: pa.Schema) -> dict[str, dict[int, str]]:
    """Return the class names by number of each column of labels, from the note that `datasets` writes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: feature["names"] for name, feature in features.items() if "names" in feature}
        return {name: {n: str(each) for n, each in enumerate(names)} for name, names in labels.items()}
    except (KeyError, TypeError, ValueError):  # another program's note
        return {}


@retried
def _read_group(file: DataFile, group: int, first: int | None = None) -> pa.Table:
    """Read a row group, or its first rows, in batches: its stated size and number of rows may be wrong."""
    batches, size = [], 0
    with file.open(ahead=False) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as parquet:
        if first is not None:
            batch = next(parquet.iter_batches(first, row_groups=[group]), None)
            return pa.Table.from_batches([batch] if batch else [], parquet.schema_arrow)
        for batch in parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group]):
            size += batch.nbytes
            file.limits.check_shard(size, f"{file.url}, row group {group}")
            batches.append(batch)
        table = pa.Table.from_batches(batches, parquet.schema_arrow)
        rows = parquet.metadata.row_group(group).num_rows
    if table.num_rows != rows:
        raise pa.ArrowInvalid(f"{table.num_rows:,} rows instead of {rows:,}")
    if len(set(table.column_names)) < table.num_columns:
        raise pa.ArrowInvalid("two columns have the same name")
    return table


def _filled_groups(file: DataFile) -> NDArray[np.int64]:
    """Return (number, bytes) of each row group that has rows, (row groups, 2)."""
    metadata = _read_metadata(file)
    filled = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        file.limits.check_shard(group.total_byte_size, f"{file.url}, row group {number}")
        if group.num_rows:
            filled.append((number, group.total_byte_size))
    return np.array(filled, np.int64).reshape(-1, 2)


@retried
def _read_metadata(file: DataFile) -> pq.FileMetaData:
    try:
        with file.open(ahead=False) as stream:
            return pq.read_metadata(stream)
    except (pa.ArrowException, OSError) as error:
        broken_shard(error, file.url)  # raises the error if the disk or the network failed
        raise SoloError(f"{file.url} is not a readable parquet file: {first_line(error)}") from error


# A stream holds row groups in memory, and a loader has hundreds open: 64 streams, 4 each, all sources.
_ROWS_PER_GROUP, _BYTES_PER_GROUP = 256, 4_000_000
_NOTE_KEY = "solo_vlm"

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()})),
                }
            )
        ),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    }
)


def write_samples(
    path: Path, samples: Iterable[dict[str, Any]], note: Callable[[], dict[str, Any]] | None = None
) -> int:
    """Write rows of `SCHEMA` to a file, which appears when it is complete; return their number.

    Args:
        path: File to write.
        samples: Rows, iterated once, a row group at a time.
        note: Called after the last row; its result is stored in the file for `read_note`.
    """
    count = 0
    with new_file(path) as partial, pq.ParquetWriter(partial, SCHEMA, write_page_checksum=True) as writer:
        for group in _row_groups(samples):
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
            count += len(group)
        if note is not None:
            writer.add_key_value_metadata({_NOTE_KEY: json.dumps(note())})
    return count


def read_note(path: Path) -> dict[str, Any] | None:
    """Return the note that `write_samples` stored in a file; None if there is no such file or note."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowInvalid, FileNotFoundError):
        return None
    note = metadata.get(_NOTE_KEY.encode())
    return None if note is None else json.loads(note)


def _row_groups(samples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += sum(len(image.get("bytes") or b"") for image in sample.get("images") or ())
        if len(group) == _ROWS_PER_GROUP or size >= _BYTES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
