"""Sources of samples: files read shard by shard, in any order, any number of times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from solo_vlm.data.sources.files import CODECS, DEFAULT_LIMITS, DataFile, Limits, find_files
from solo_vlm.data.sources.jsonl import JsonlSource
from solo_vlm.data.sources.megatron_indexed import TEXT_INDEX, MegatronIndexedSource
from solo_vlm.data.sources.parquet import ParquetSource
from solo_vlm.data.sources.webdataset import WebDatasetSource
from solo_vlm.utils.errors import SoloError, first_line


class Source(Protocol):
    """Data set of numbered shards of rows (a parquet row group, a block of JSON lines, a tar)."""

    name: str

    def __len__(self) -> int:
        """Number of shards."""

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return all rows of a shard, in file order; accessing a broken row raises SampleError."""

    def where(self, shard: int, row: int) -> str:
        """Name file and row, for messages."""

    def fingerprint(self) -> str:
        """Return a hash that changes when files are added, removed or rewritten."""


class SharedShards:
    """Source whose shards are read once and shared by all streams of a process that have them open.

    Args:
        source: Source to read from.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._source = source
        self._held: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._source)

    def __reduce__(self) -> tuple[type[SharedShards], tuple[Source]]:
        return SharedShards, (self._source,)  # another process holds its own shards

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return all rows of a shard, the same object while any stream holds it."""
        if (rows := self._held.get(shard)) is None:
            rows = self._held[shard] = self._source.read(shard)
        return rows

    def where(self, shard: int, row: int) -> str:
        """Name file and row, for messages."""
        return self._source.where(shard, row)

    def fingerprint(self) -> str:
        """Return the fingerprint of the source."""
        return self._source.fingerprint()


_FORMATS: dict[str, Callable[[str, list[DataFile]], Source]] = {
    ".parquet": ParquetSource,
    ".jsonl": JsonlSource,
    **{f".jsonl{compression}": JsonlSource for compression in CODECS},
    ".tar": WebDatasetSource,
    TEXT_INDEX: MegatronIndexedSource,
}


def open_source(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Source:
    """Open a file, a folder of files, or a glob pattern; local, or a URL that fsspec understands.

    The format follows from the file names: .parquet, .jsonl (also .gz, .zst, .lz4), .tar (WebDataset)
    or -text.idx (the original SOLO code's packed data in Megatron's files).

    Raises:
        SoloError: There are no files, or they have an unknown format or several formats.
    """
    try:
        files = find_files(str(path), list(_FORMATS), limits)
    except SoloError:
        raise
    except Exception as error:  # file systems have own errors for missing packages, credentials, network
        raise SoloError(f"cannot read {path}: {first_line(error)}") from error
    if not files:
        raise SoloError(f"no data files at {path}")
    # Megatron writes .jsonl files with counts next to its data.
    files = [file for file in files if file.name.endswith(TEXT_INDEX)] or files
    formats = {_format(file) for file in files}
    if len(formats) > 1 or None in formats:
        raise SoloError(f"{path}: expected files of one of the formats {', '.join(_FORMATS)}")
    (kind,) = formats
    return _FORMATS[str(kind)](str(path), files)


def all_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield every row of a file, a folder of files, or a glob pattern, in file order.

    Raises:
        SoloError: A row is broken, or as for `open_source`.
    """
    source = open_source(path)
    for shard in range(len(source)):
        yield from source.read(shard)


def fingerprints(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Return (name, fingerprint) of each source, in order."""
    return [(source.name, source.fingerprint()) for source in sources]


def is_same_data(before: str, now: str) -> bool:
    """Return whether two fingerprints are of the same files.

    Contents are compared if both have them: not those of remote files, nor of runs of earlier versions.
    """
    files_before, _, contents_before = before.partition("-")
    files_now, _, contents_now = now.partition("-")
    unknown = not (contents_before and contents_now)
    return files_before == files_now and (unknown or contents_before == contents_now)


def _format(file: DataFile) -> str | None:
    """Return the format's suffix, if it is known; compressed and plain JSON lines are one format."""
    suffix = next((suffix for suffix in _FORMATS if file.name.lower().endswith(suffix)), None)
    return ".jsonl" if suffix and suffix.startswith(".jsonl") else suffix
