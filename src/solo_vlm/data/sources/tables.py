"""Tables that are not parquet: CSV and TSV files, and Arrow files."""

from __future__ import annotations

import ast
import csv
import math
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO, TextIOWrapper
from itertools import islice
from json import JSONDecodeError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from solo_vlm.data.formats.rows import RawRow
from solo_vlm.data.sources.files import DataFile, RawSource, ShardIndex, fingerprint
from solo_vlm.data.sources.parquet import TableRows
from solo_vlm.data.sources.retries import retried
from solo_vlm.data.values import load_json
from solo_vlm.utils.errors import SoloError, first_line

_FILE_START = b"ARROW1\0\0"  # of files with a footer; what follows is a stream
_SEPARATORS = ",;|\t"
_ROWS_PER_BATCH = 4096
_LARGEST = 2**63
_LONGEST_NUMBER = 32  # characters
# Characters of an `image` that is an index, as in VLMEvalKit; the smallest images have more.
_LONGEST_INDEX = 64
_QUOTED = r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\""""
_TEXT = re.compile(_QUOTED, re.DOTALL)
_TEXTS = re.compile(rf"\[\s*+(?:(?:{_QUOTED})[\s,]*+)*+\]", re.DOTALL)  # NumPy writes no commas


class CsvSource(RawSource):
    """Rows of .csv and .tsv files with a header; a shard is a file.

    An empty cell is missing. A column is of numbers if they are written as Python writes them, so that no
    answer `007` becomes 7, and of text otherwise: `NA` and `None` are words. A cell with a list of texts or
    objects is that list. As in VLMEvalKit's files, `image` may be the `index` of the row that has the image.
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
            return _CsvRows(_parse(_read(file, 0, file.size), delimiter))
        except (csv.Error, ValueError) as error:
            raise SoloError(f"{file.url} is not a readable table: {first_line(error)}") from error

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
    """Rows of .arrow and .feather files, with or without a footer; a shard is a record batch."""

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._shards = ShardIndex(files, _batches)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, shard: int) -> Sequence[RawRow]:
        """Return all rows of a record batch."""
        file, (start, end, *schema_span) = self._shards[shard]
        file.limits.check_shard(end - start, f"{file.url}, batch at byte {start}")
        schema, batch = (pa.ipc.read_message(_read(file, *span)) for span in (schema_span, (start, end)))
        return TableRows(pa.Table.from_batches([pa.ipc.read_record_batch(batch, pa.ipc.read_schema(schema))]))

    def file(self, shard: int) -> DataFile:
        """Return the file of a batch."""
        return self._shards[shard][0]

    def memory(self, shard: int) -> int:
        """Return the size of a record batch."""
        _, (start, end, *_) = self._shards[shard]
        return end - start

    def where(self, shard: int, row: int) -> str:
        """Name file, position of the batch and row in it."""
        file, (start, *_) = self._shards[shard]
        return f"{file.url}, batch at byte {start}, row {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._shards.files)


class _CsvRows(TableRows):
    """Rows of a parsed table.

    Raises:
        ValueError: An image is that of an index that two rows have.
    """

    def __init__(self, table: pa.Table) -> None:
        super().__init__(table)
        self._images = _shared_images(table)

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        if index in self._images:
            row["image"] = super().__getitem__(self._images[index])["image"]
        return {name: _cell(value) for name, value in row.items()}


def _parse(content: bytes, delimiter: str) -> pa.Table:
    """Read a table whose columns are text, or numbers that lose nothing.

    Raises:
        csv.Error, ValueError: A quotation mark is not closed, a row has other columns than the header, or a
            text is not UTF-8.
    """
    csv.field_size_limit(sys.maxsize)  # cells may be images
    lines = TextIOWrapper(BytesIO(content), encoding="utf-8-sig", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    if not (names := next(reader, [])):
        raise ValueError("it is empty")
    if len(names) == 1 and any(mark in names[0] for mark in _SEPARATORS):
        raise ValueError(f"its only column is {names[0]!r}: cells are separated by {delimiter!r}")
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    schema = pa.schema([(name, pa.large_string()) for name in names])
    batches = []
    rows = (_checked(row, names, reader.line_num) for row in reader if row)
    while some := list(islice(rows, _ROWS_PER_BATCH)):
        columns = [[cell or None for cell in column] for column in zip(*some, strict=True)]
        batches.append(pa.record_batch(columns, schema))
    table = pa.Table.from_batches(batches, schema)
    for place, name in enumerate(names):
        if (numbers := _numbers(table[name])) is not None:
            table = table.set_column(place, name, numbers)
    return table


def _checked(row: list[str], names: list[str], line: int) -> list[str]:
    if len(row) != len(names):
        raise ValueError(f"line {line} has {len(row)} cells, and the header {len(names)}")
    return row


def _numbers(column: pa.ChunkedArray) -> pa.Array | None:
    """Return the column as numbers if Python writes each as it is written."""
    if (pc.max(pc.binary_length(column)).as_py() or 0) > _LONGEST_NUMBER:
        return None
    texts = column.to_pylist()
    for kind in (int, float):
        with suppress(ValueError):
            return pa.array([None if text is None else _number(text, kind) for text in texts])
    return None


def _number(text: str, kind: type[int] | type[float]) -> int | float:
    number = kind(text)
    is_large = kind is int and not -_LARGEST <= number < _LARGEST
    if str(number) != text or is_large or not math.isfinite(number):
        raise ValueError(f"{text} is no {kind.__name__}")
    return number


def _cell(value: Any) -> Any:
    """Return the list of texts or objects that a cell contains in JSON's, Python's or NumPy's notation.

    Other lists are text: an answer may be coordinates.
    """
    if not isinstance(value, str) or not value.startswith("[") or not value.endswith("]"):
        return value
    try:
        found = load_json(value)
    except JSONDecodeError:
        found = _literal(value)
    except ValueError:  # a key twice
        return value
    is_list = isinstance(found, list)
    same_kind = is_list and any(all(isinstance(item, kind) for item in found) for kind in (str, dict))
    return found if same_kind else value


def _literal(text: str) -> Any:
    """Return the value of a list of texts as Python or NumPy prints it, or of a Python literal; else None."""
    if _TEXTS.fullmatch(text):  # Python alone would join NumPy's 'a' 'b' into 'ab'
        return [ast.literal_eval(item) for item in _TEXT.findall(text)]
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return None


def _shared_images(table: pa.Table) -> dict[int, int]:
    """Return the row that has the image of each row whose `image` is an index.

    Raises:
        ValueError: Two rows have the index.
    """
    if not {"index", "image"} <= {*table.column_names} or not pa.types.is_large_string(table["image"].type):
        return {}
    is_short = pc.fill_null(pc.less_equal(pc.binary_length(table["image"]), _LONGEST_INDEX), False)
    short = np.flatnonzero(is_short.to_numpy())
    wanted = dict(zip(short.tolist(), table["image"].take(short).to_pylist(), strict=True))
    rows: dict[str, list[int]] = {name: [] for name in wanted.values()}
    for row, value in enumerate(table["index"].to_pylist() if wanted else ()):
        rows.get(str(value), []).append(row)
    if twice := next((name for name, found in rows.items() if len(found) > 1), None):
        raise ValueError(f"an image is that of index {twice}, which rows {rows[twice]} have")
    found = {row: rows[name][0] for row, name in wanted.items() if rows[name]}
    for row, target in found.items():  # in order, as an index may name one of an earlier row
        found[row] = found.get(target, target)
    return {row: target for row, target in found.items() if target not in wanted}


@retried
def _batches(file: DataFile) -> NDArray[np.int64]:
    """Return start and end of each record batch and of the schema, (batches, 4)."""
    places = []
    try:
        with file.open() as stream:
            end = len(_FILE_START) if stream.read(len(_FILE_START)) == _FILE_START else 0
            stream.seek(end)
            for message in pa.ipc.MessageReader.open_stream(stream):
                start, end = end, stream.tell()
                places.append((message.type, start, end))
    except pa.ArrowException as error:
        raise SoloError(f"{file.url} is not readable Arrow data: {first_line(error)}") from error
    kinds = [kind for kind, _, _ in places]
    if kinds[:1] != ["schema"] or any(kind != "record batch" for kind in kinds[1:]):
        raise SoloError(
            f"{file.url} has {', '.join(sorted({*kinds}))}: expected a schema and record batches, without "
            "dictionaries, as of categories; write it as parquet"
        )
    _, *schema_span = places[0]
    return np.array([(*span, *schema_span) for _, *span in places[1:]], np.int64).reshape(-1, 4)


@retried
def _read(file: DataFile, start: int, end: int) -> bytes:
    return file.read((start, end))[0]
