"""Rows of raw files, by the files' names: parquet, JSON, JSON lines, tables with tabs, WebDataset tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.data.catalog.entry import RawRow
from solo_vlm.data.catalog.json_values import json_object, json_values
from solo_vlm.data.sample import SampleError
from solo_vlm.data.values import load_json
from solo_vlm.utils.errors import SoloError

Rows = Iterator[RawRow | SampleError]

_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_ROWS_AT_ONCE = 64


def read_rows(path: Path) -> Rows:
    """The rows of a raw file, in order; a row or a rest that cannot be read comes as an error.

    A row of a tar file is `{"key": name, extension: content, ...}`; of a table, `{"columns": [...]}`.

    Raises:
        SoloError: the name tells no known format.
        OSError: the disk or the network fails, rather than the content of the file.
    """
    try:
        yield from _reader(path)(path)
    except OSError as error:
        # pyarrow also calls a broken compression an OSError; only a real one has a number.
        if error.errno is not None:
            raise
        yield SampleError("file-broken", str(error))
    except (pa.ArrowException, tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        yield SampleError("file-broken", str(error))


def is_splittable(path: Path) -> bool:
    """Whether a file is worth reading several times, each time for a share of its rows."""
    return path.suffix in (".json", ".jsonl")


def _reader(path: Path) -> Callable[[Path], Rows]:
    name = Path(path.stem) if path.suffix in _COMPRESSIONS else path
    readers: dict[str, Callable[[Path], Rows]] = {
        ".parquet": _parquet,
        ".json": _json,
        ".jsonl": _json_lines,
        ".tsv": _table,
        ".tar": _tar,
    }
    if name.suffix not in readers:
        raise SoloError(f"{path}: expected one of {', '.join(readers)}")
    return readers[name.suffix]


def _parquet(path: Path) -> Rows:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _json(path: Path) -> Rows:
    with _open(path) as stream:
        yield from json_values(io.TextIOWrapper(stream, encoding="utf-8-sig"))


def _json_lines(path: Path) -> Rows:
    with _open(path) as stream:
        for line in stream:
            if line.strip():
                yield _parsed(line)


def _table(path: Path) -> Rows:
    with _open(path) as stream:
        for line in stream:
            try:
                yield {"columns": line.decode("utf-8-sig").rstrip("\r\n").split("\t")}
            except UnicodeDecodeError as error:
                yield SampleError("text", str(error))


def _tar(path: Path) -> Rows:
    with tarfile.open(path, "r|*") as archive:
        for key, entries in groupby(_entries(archive), key=lambda entry: entry[0]):
            row: RawRow = {"key": key}
            row |= {extension: content for _, extension, content in entries}
            try:
                yield row | ({"txt": row["txt"].decode("utf-8-sig")} if "txt" in row else {})
            except UnicodeDecodeError as error:
                yield SampleError("text", str(error))


def _entries(archive: tarfile.TarFile) -> Iterator[tuple[str, str, Any]]:
    """(key, extension, content) of each file; the key is all before the first dot of its name."""
    for member in archive:
        stream = archive.extractfile(member) if member.isfile() else None
        if stream is not None:
            key, _, extension = Path(member.name).name.partition(".")
            yield key, extension.lower(), stream.read()


def _parsed(line: bytes) -> RawRow | SampleError:
    try:
        source = line.decode("utf-8-sig")
        return json_object(load_json(source), source)
    except ValueError as error:
        return SampleError("json", str(error))


def _open(path: Path) -> IO[bytes]:
    """The content, decompressed as the name says."""
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))  # type: ignore[return-value]
