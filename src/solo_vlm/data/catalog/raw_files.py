"""Readers of raw files, chosen by file name: parquet, JSON, JSON lines, TSV, WebDataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.data.formats.rows import RawRow
from solo_vlm.data.json_elements import elements
from solo_vlm.data.sample import SampleError
from solo_vlm.data.values import load_json
from solo_vlm.utils.errors import SoloError

Rows = Iterator[RawRow | SampleError]

_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_BATCH_ROWS = 64


def read_rows(path: Path) -> Rows:
    """Yield the rows of a raw file in order; a row or remainder that cannot be read is yielded as an error.

    A row of a tar file is `{"key": name, extension: content, ...}`; of a TSV file, `{"columns": [...]}`.

    Raises:
        SoloError: The file name has no known suffix.
        OSError: The disk or the network failed; a broken file is an error row instead.
    """
    try:
        yield from _reader(path)(path)
    except OSError as error:
        # pyarrow raises OSError for broken compression too, but without an errno.
        if error.errno is not None:
            raise
        yield SampleError("file-broken", str(error))
    except (pa.ArrowException, tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        yield SampleError("file-broken", str(error))


def is_splittable(path: Path) -> bool:
    """Return whether several processes should each read the file for a share of its rows."""
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
        raise SoloError(f"{path}: unknown format, expected one of {', '.join(readers)}")
    return readers[name.suffix]


def _parquet(path: Path) -> Rows:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            yield from batch.to_pylist()


def _json(path: Path) -> Rows:
    with _open(path) as stream:
        try:
            for _, element in elements(stream):
                yield _parsed(element)
        except ValueError as error:
            yield SampleError("file-broken", str(error))


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
    """Yield (key, extension, content) per file; the key is the part before the first dot of the name."""
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


def _open(path: Path) -> BinaryIO:
    """Open a file, decompressed according to its suffix."""
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))  # type: ignore[return-value]


def json_object(value: Any, source: str) -> dict[str, Any] | SampleError:
    """Return a parsed value if it is an object whose strings can be encoded, else an error.

    Args:
        value: Parsed value.
        source: JSON text of the value. Only an escape in it can produce half a surrogate pair.
    """
    if not isinstance(value, dict):
        return SampleError("raw-schema", "not a JSON object")
    if "\\ud" in source.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return SampleError("json", str(error))
    return value
