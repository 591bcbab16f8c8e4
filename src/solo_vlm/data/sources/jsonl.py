"""JSON Lines; a shard is a block of lines, or a whole compressed file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.files import (
    CODECS,
    BrokenShard,
    DataFile,
    ShardIndex,
    broken_shard,
    fingerprint,
    retried,
)
from solo_vlm.data.values import load_json

_LINES_PER_SHARD = 256
_CHUNK_SIZE = 1 << 20


class JsonlSource:
    """Rows of .jsonl files, plain or compressed (.gz, .zst, .lz4).

    Blocks of a plain file are read independently. A compressed file can only be read from its beginning, so
    it is one shard: split large data over many files. Relative image paths refer to the folder of the file.
    """

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._shards = ShardIndex(files, _blocks)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return all rows of a block; accessing a line that is not a JSON object raises SampleError."""
        file, (start, end) = self._shards[shard]
        try:
            if not _is_compressed(file):
                file.limits.check_row(end - start)  # a larger block is a single line
            data = _read_block(file, start, end)
        except SampleError as error:
            return BrokenShard(error)
        except (pa.ArrowException, OSError) as error:
            return broken_shard(error, file.url)
        return _Rows([line for line in data.splitlines() if line.strip()], file)

    def where(self, shard: int, row: int) -> str:
        """Name file, position of the block and row in it."""
        file, (start, _) = self._shards[shard]
        return f"{file.url}, block at byte {start}, row {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._shards.files)


class _Rows(Sequence[dict[str, Any]]):
    """Lines that are parsed when they are accessed."""

    def __init__(self, lines: list[bytes], file: DataFile) -> None:
        self._lines = lines
        self._file = file

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        self._file.limits.check_row(len(self._lines[index]))
        try:
            row = as_chat_row(load_json(self._lines[index]))
        except ValueError as error:
            raise SampleError("json", str(error)) from error
        if not isinstance(row, dict):
            raise SampleError("json", "not an object")
        return self._file.locate_images(row)


@retried
def _blocks(file: DataFile) -> NDArray[np.int64]:
    """Return (blocks, 2) byte positions at which blocks of whole lines start and end.

    A block is at most as large as the largest row allowed, unless it is a single line.
    """
    if _is_compressed(file):
        return np.array([[0, file.size]])
    borders, lines, start = [0], 0, 0
    for end in _line_ends(file):
        if end - borders[-1] > file.limits.max_row_bytes and lines:
            borders.append(start)
            lines = 0
        lines, start = lines + 1, end
        if lines == _LINES_PER_SHARD:
            borders.append(end)
            lines = 0
    if start > borders[-1]:
        borders.append(start)
    return np.array([borders[:-1], borders[1:]], np.int64).T


def _line_ends(file: DataFile) -> Iterator[int]:
    """Yield the position after each line, without reading whole lines into memory."""
    position = end = 0
    with file.open() as stream:
        while chunk := stream.read(_CHUNK_SIZE):
            for newline in np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")).tolist():
                end = position + newline + 1
                yield end
            position += len(chunk)
    if position > end:
        yield position


def _is_compressed(file: DataFile) -> bool:
    return file.name.lower().endswith(tuple(CODECS))


@retried
def _read_block(file: DataFile, start: int, end: int) -> bytes:
    if _is_compressed(file):
        return file.read_decompressed()
    return file.read((start, end))[0]


def as_chat_row(value: Any) -> Any:
    """Convert a row of the original SOLO data to the schema; return anything else unchanged.

    A row is `{"messages": [turn, ...]}`, `{"id", "conversations": [turn, ...]}`, a list of turns, or a single
    turn. A turn has `role` and `content`: a string, or parts of text and `image_url`.
    """
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict) or "messages" in value:
        return value
    if _are_turns(value.get("conversations")):
        return {**value, "messages": value["conversations"]}
    return {"messages": [value]} if _are_turns([value]) else value


def _are_turns(turns: Any) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    )
