"""JSON Lines and JSON arrays; a shard is a block of lines or elements, or a whole compressed file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from solo_vlm.data.json_elements import elements
from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.files import (
    CODECS,
    BrokenShard,
    DataFile,
    Limits,
    RawSource,
    ShardIndex,
    broken_shard,
    fingerprint,
)
from solo_vlm.data.sources.retries import retried
from solo_vlm.data.values import load_json
from solo_vlm.utils.errors import SoloError

_ROWS_PER_SHARD = 256
_CHUNK_SIZE = 1 << 20
_COMPRESSION = 4  # of JSON, roughly


class JsonlSource(RawSource):
    """Rows of .jsonl and .json files, plain or compressed (.gz, .zst, .lz4).

    Blocks of a plain file are read independently. A compressed file can only be read from its beginning, so
    it is one shard: split large data over many files.
    """

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._shards = ShardIndex(files, _blocks)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, shard: int) -> Sequence[Any]:
        """Return all rows of a block; accessing a line or element that is not JSON raises SampleError."""
        file, (start, end) = self._shards[shard]
        try:
            if not _is_compressed(file):
                file.limits.check_row(end - start)  # a larger block is a single row
            rows = _split(file, _read_block(file, start, end), is_part=not _is_compressed(file))
        except SampleError as error:
            return BrokenShard(error)
        except (pa.ArrowException, OSError) as error:
            return broken_shard(error, file.url)
        return _Rows(rows, file.limits)

    def file(self, shard: int) -> DataFile:
        """Return the file of a block."""
        return self._shards[shard][0]

    def memory(self, shard: int) -> int:
        """Return the size of a block, or an estimate for a compressed file."""
        file, (start, end) = self._shards[shard]
        return (end - start) * (_COMPRESSION if _is_compressed(file) else 1)

    def where(self, shard: int, row: int) -> str:
        """Name file, position of the block and row in it."""
        file, (start, _) = self._shards[shard]
        return f"{file.url}, block at byte {start}, row {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._shards.files)


class _Rows(Sequence[Any]):
    """Rows that are parsed when they are accessed."""

    def __init__(self, rows: list[bytes], limits: Limits) -> None:
        self._rows = rows
        self._limits = limits

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        self._limits.check_row(len(self._rows[index]))
        try:
            return load_json(self._rows[index])
        except ValueError as error:
            raise SampleError("json", f"{error}{_hint(self._rows[index])}") from error


def _hint(line: bytes) -> str:
    """Return what to do about a line of an array, or of an object on several lines; empty for others."""
    if line.strip() in (b"[", b"{") or line.rstrip().endswith((b",", b"[", b"]")):
        return "; a file with an array, or with objects on several lines, must be named .json"
    return ""


@retried
def _blocks(file: DataFile) -> NDArray[np.int64]:
    """Return (blocks, 2) byte positions at which blocks of whole rows start and end.

    A block is at most as large as the largest row allowed, unless it is a single row.
    """
    if _is_compressed(file):
        return np.array([[0, file.size]])
    blocks: list[tuple[int, int]] = []
    first, last, rows = 0, 0, 0
    for start, end in _elements(file) if _is_array(file) else _lines(file):
        if rows == _ROWS_PER_SHARD or (rows and end - first > file.limits.max_row_bytes):
            blocks.append((first, last))
            rows = 0
        if not rows:
            first = start
        last, rows = end, rows + 1
    if rows:
        blocks.append((first, last))
    return np.array(blocks, np.int64).reshape(-1, 2)


def _lines(file: DataFile) -> Iterator[tuple[int, int]]:
    """Yield start and end of each line, without reading whole lines into memory."""
    position = start = 0
    with file.open() as stream:
        while chunk := stream.read(_CHUNK_SIZE):
            for newline in np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")).tolist():
                end = position + newline + 1
                yield start, end
                start = end
            position += len(chunk)
    if position > start:
        yield start, position


def _elements(file: DataFile) -> Iterator[tuple[int, int]]:
    """Yield start and end of each element of an array."""
    try:
        with file.open() as stream:
            yield from ((start, start + len(element)) for start, element in elements(stream))
    except ValueError as error:
        raise SoloError(f"{file.url}: {error}") from error


def _split(file: DataFile, data: bytes, is_part: bool) -> list[bytes]:
    if not _is_array(file):
        return [line for line in data.splitlines() if line.strip()]
    try:
        return [element for _, element in elements(BytesIO(data), is_part)]
    except ValueError as error:
        raise SampleError("broken-shard", f"{file.url}: {error}") from error


def _is_array(file: DataFile) -> bool:
    """Return whether a file is named .json; it may contain JSON lines all the same."""
    return ".jsonl" not in file.name.lower()


def _is_compressed(file: DataFile) -> bool:
    return file.name.lower().endswith(tuple(CODECS))


@retried
def _read_block(file: DataFile, start: int, end: int) -> bytes:
    if _is_compressed(file):
        return file.read_decompressed()
    return file.read((start, end))[0]
