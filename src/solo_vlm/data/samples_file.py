"""Samples as one parquet file: the form in which the project writes data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.utils.files import new_file

# Of a row group, what a stream holds in memory. A loader has hundreds open: 64 streams, 4 each, all sources.
_ROWS, _BYTES = 256, 4_000_000
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
    """Write rows of `SCHEMA`; the file appears when it is complete. Returns their number.

    Args:
        path: the file.
        samples: the rows; read once, a row group at a time.
        note: called after the last row; what it returns is kept in the file, for `read_note`.
    """
    count = 0
    with new_file(path) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        for group in _row_groups(samples):
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
            count += len(group)
        if note is not None:
            writer.add_key_value_metadata({_NOTE_KEY: json.dumps(note())})
    return count


def read_note(path: Path) -> dict[str, Any] | None:
    """The note that `write_samples` left in a file; None where there is no such file or note."""
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
        if len(group) == _ROWS or size >= _BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
