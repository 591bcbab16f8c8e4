"""Tables that are not parquet: CSV and TSV files, and Arrow files of `datasets`' save_to_disk."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from solo_vlm.data.formats.rows import RawRow
from solo_vlm.data.sources.files import DataFile, RawSource, ShardIndex, fingerprint, retried
from solo_vlm.data.sources.parquet import TableRows
from solo_vlm.utils.errors import SoloError, first_line


class CsvSource(RawSource):
    """Rows of .csv and .tsv files with a header; a shard is a file.

    A column is of numbers if they are written as Python writes them, so that no answer `007` becomes 7; all
    others but true and false are text.
    """

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, shard: int) -> Sequence[RawRow]:
        """Return all rows of a file.

        Raises:
            SoloError: The file is no table: skipping it would lose many rows.
        """
        file = self._files[shard]
        file.limits.check_shard(file.size, file.url)
        delimiter = "\t" if file.name.lower().endswith(".tsv") else ","
        try:
            table = _parse(_read(file, 0, file.size), delimiter)
        except pa.ArrowException as error:
            raise SoloError(f"{file.url} is not a readable table: {first_line(error)}") from error
        return TableRows(table)

    def file(self, shard: int) -> DataFile:
        """Return the file."""
        return self._files[shard]

    def where(self, shard: int, row: int) -> str:
        """Name file and row."""
        return f"{self._files[shard].url}, row {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._files)


class ArrowSource(RawSource):
    """Rows of .arrow files, as save_to_disk of `datasets` writes them; a shard is a record batch."""

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._shards = ShardIndex(files, _batches)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, shard: int) -> Sequence[RawRow]:
        """Return all rows of a record batch."""
        file, (start, end, schema_end) = self._shards[shard]
        file.limits.check_shard(end - start, f"{file.url}, batch at byte {start}")
        schema, batch = (pa.ipc.read_message(_read(file, *span)) for span in ((0, schema_end), (start, end)))
        return TableRows(pa.Table.from_batches([pa.ipc.read_record_batch(batch, pa.ipc.read_schema(schema))]))

    def file(self, shard: int) -> DataFile:
        """Return the file of a batch."""
        return self._shards[shard][0]

    def memory(self, shard: int) -> int:
        """Return the size of a record batch."""
        _, (start, end, _) = self._shards[shard]
        return end - start

    def where(self, shard: int, row: int) -> str:
        """Name file, position of the batch and row in it."""
        file, (start, *_) = self._shards[shard]
        return f"{file.url}, batch at byte {start}, row {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._shards.files)


def _parse(content: bytes, delimiter: str) -> pa.Table:
    """Read a table whose columns are text, truth values, or numbers that lose nothing."""

    def read(types: dict[str, pa.DataType]) -> pa.Table:  # of the named columns; of all if there are none
        return csv.read_csv(
            BytesIO(content),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types=types, include_columns=[*types], null_values=[""]
            ),
        )

    table = read({})
    if len(set(table.column_names)) < table.num_columns:
        raise pa.ArrowInvalid("two columns have the same name")
    as_text = {field.name: pa.string() for field in table.schema if not _is_kept(field.type)}
    if not as_text:
        return table
    for name, written in zip(as_text, read(as_text).columns, strict=True):
        place = table.column_names.index(name)
        kind = table.schema.types[place]
        values = ["" if value is None else str(value) for value in table[name].to_pylist()]
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not is_number or values != written.to_pylist():
            table = table.set_column(place, name, written)
    return table


def _is_kept(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind))


@retried
def _batches(file: DataFile) -> NDArray[np.int64]:
    """Return start, end and the end of the schema for each record batch, (batches, 3)."""
    places, end = [], 0
    try:
        with file.open() as stream:
            for message in pa.ipc.MessageReader.open_stream(stream):
                start, end = end, stream.tell()
                places.append((message.type, start, end))
    except pa.ArrowException as error:
        raise SoloError(f"{file.url} is not a readable Arrow stream: {first_line(error)}") from error
    kinds = [kind for kind, _, _ in places]
    if kinds[:1] != ["schema"] or any(kind != "record batch" for kind in kinds[1:]):
        raise SoloError(f"{file.url} has {', '.join(sorted({*kinds}))}: expected a schema and record batches")
    schema_end = places[0][2]
    return np.array([(start, end, schema_end) for _, start, end in places[1:]], np.int64).reshape(-1, 3)


@retried
def _read(file: DataFile, start: int, end: int) -> bytes:
    return file.read((start, end))[0]
