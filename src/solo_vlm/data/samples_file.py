"""Samples as one parquet file: the form in which the project writes data sets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.files import new_file

_ROW_GROUP = 256
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
    rows, count = iter(samples), 0
    with new_file(path) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        while group := list(itertools.islice(rows, _ROW_GROUP)):
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
