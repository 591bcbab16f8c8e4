"""Sources of samples: files read shard by shard, in any order, any number of times."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

from solo_vlm.data.formats.row_format import FormatName, RowFormat, choose_format, columns_of
from solo_vlm.data.sources.files import (
    CODECS,
    DEFAULT_LIMITS,
    DataFile,
    Limits,
    RawSource,
    find_files,
    find_folder,
    is_folder,
)
from solo_vlm.data.sources.foreign import (
    check_split_names,
    check_splits,
    explained,
    is_index_of_shards,
    saved_files,
)
from solo_vlm.data.sources.formatted import FIRST_ROWS, FormattedSource
from solo_vlm.data.sources.hub import HubPath, pin, split_files, what_exists
from solo_vlm.data.sources.image_folder import ImageFolderSource
from solo_vlm.data.sources.jsonl import JsonlSource
from solo_vlm.data.sources.megatron_indexed import TEXT_INDEX, MegatronIndexedSource
from solo_vlm.data.sources.parquet import ParquetSource
from solo_vlm.data.sources.retries import is_unreachable
from solo_vlm.data.sources.tables import ArrowSource, CsvSource
from solo_vlm.data.sources.webdataset import WebDatasetSource
from solo_vlm.utils.errors import SoloError, first_line

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Data set of numbered shards of rows (a parquet row group, a block of JSON lines, a tar)."""

    name: str

    def __len__(self) -> int:
        """Number of shards."""

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return all rows of a shard, in file order; accessing a broken row raises SampleError."""

    def memory(self, shard: int) -> int:
        """Return about how many bytes an open shard takes, without opening it."""

    def where(self, shard: int, row: int) -> str:
        """Name file and row, for messages."""

    def fingerprint(self) -> str:
        """Return a hash that changes when files are added, removed or rewritten."""


class SourceView:
    """Source with the shards of another one, and rows of its own.

    Args:
        source: The other source.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def memory(self, shard: int) -> int:
        """Return about how many bytes an open shard takes."""
        return self._source.memory(shard)

    def where(self, shard: int, row: int) -> str:
        """Name file and row, for messages."""
        return self._source.where(shard, row)

    def fingerprint(self) -> str:
        """Return the fingerprint of the source."""
        return self._source.fingerprint()


class SharedShards(SourceView):
    """Source whose shards are read once and shared by all streams of a process that have them open.

    Args:
        source: Source to read from.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._held: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type[SharedShards], tuple[Source]]:
        return SharedShards, (self._source,)  # another process holds its own shards

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return all rows of a shard, the same object while any stream holds it."""
        if (rows := self._held.get(shard)) is None:
            rows = self._held[shard] = self._source.read(shard)
        return rows


SourceFormat = Literal["auto", "imagefolder", "hf", FormatName]

_Readers = dict[str, Callable[[str, list[DataFile]], RawSource]]
_READERS: _Readers = {
    ".parquet": ParquetSource,
    ".jsonl": JsonlSource,
    **{f".jsonl{compression}": JsonlSource for compression in CODECS},
    ".tar": WebDatasetSource,
}
# Folders of the kinds above have files of those below as notes, so these are looked for in this order.
_ARROW: _Readers = {".arrow": ArrowSource, ".feather": ArrowSource}
_JSON: _Readers = {".json": JsonlSource, **{f".json{compression}": JsonlSource for compression in CODECS}}
_CSV: _Readers = {".csv": CsvSource, ".tsv": CsvSource}
_ALL_READERS = _READERS | _ARROW | _JSON | _CSV


def open_source(
    path: str | Path,
    limits: Limits = DEFAULT_LIMITS,
    format: SourceFormat = "samples",
    images: str | None = None,
    columns: Mapping[str, str] | None = None,
    filter: str | None = None,
    cache: bool = False,
) -> Source:
    """Open a file, a folder of files, or a glob pattern; local, or a URL that fsspec understands.

    Data sets of the hub are read in place, at the commit that their revision stands for now.

    The kind of file follows from the names: .parquet, .jsonl, .json (also .gz, .zst, .lz4), .csv, .tsv, .tar
    (WebDataset), .arrow and .feather (also `datasets`' save_to_disk) or -text.idx (the original SOLO code's
    packed data in Megatron's files); a folder without any is one of images.

    Args:
        path: Path or URL.
        limits: Limits for reading the files.
        format: Format of the rows; "auto" recognizes it from the first ones, also those of a folder of images
            ("imagefolder") or of save_to_disk ("hf").
        images: Folder that relative image paths refer to; default: the folder of the row's file.
        columns: Columns of the rows, by the names that the format reads.
        filter: Expression for the rows to keep.
        cache: Whether to download each file of the hub into its cache when it is first read.

    Raises:
        SoloError: There are no files, or they have an unknown format or several formats; or the format, the
            columns or the filter do not fit the rows.
    """
    try:
        images = None if images is None else find_folder(pin(images))
        raw = _open_raw(pin(str(path)), limits, format, images, cache)
    except SoloError:
        raise
    except Exception as error:  # file systems have own errors for missing packages, credentials, network
        hint = "; check its address and the network, or name local files" if is_unreachable(error) else ""
        raise SoloError(f"cannot read {path}: {first_line(error)}{hint}") from error
    if isinstance(raw, MegatronIndexedSource):
        if format not in ("auto", "samples") or images or columns or filter:
            raise SoloError(f"{path}: packed data takes no format, images, columns or filter")
        return raw
    if format in ("samples", raw.own_format) and not columns and filter is None:
        return FormattedSource(raw, RowFormat(raw.own_format))
    rows = raw.first_rows(FIRST_ROWS)
    name: Any = "auto" if format in ("imagefolder", "hf") else format
    row_format = choose_format(str(path), rows, name, columns or {}, filter, raw.own_format)
    source = FormattedSource(raw, row_format)
    if name == "auto" and row_format.name != raw.own_format:
        unread = ", ".join(row_format.unread(columns_of(rows)))
        logger.info("%s: reading rows as %s; columns not read: %s", path, row_format.name, unread or "none")
    return source


def _open_raw(
    path: str, limits: Limits, format: SourceFormat, images: str | None, cache: bool
) -> RawSource | MegatronIndexedSource:
    """Open the files of a path, or its images."""
    hub = HubPath.parse(path)
    if cache and hub is None:
        raise SoloError(f"{path}: cache is for data of the hub, hf://datasets/OWNER/NAME")
    is_split = hub is not None and not hub.path
    is_pattern = bool({*"*?["} & {*path})
    if not is_split and not is_pattern:
        check_splits(path)
    files = split_files(hub, limits) if hub and is_split else _find(path, limits, format)
    if not is_split and not is_pattern:
        check_split_names(path, [file.name for file in files])
    if not files and format in ("auto", "imagefolder") and is_folder(path):
        folder = ImageFolderSource(path, find_folder(path), limits)
        if len(folder):
            return folder
    if not files:
        raise SoloError(f"no data files at {path}{what_exists(path) if hub else explained(path)}")
    kind, *others = sorted({_kind(file) or "" for file in files})
    if not kind:
        known = ", ".join([*_ALL_READERS, TEXT_INDEX])
        raise SoloError(f"{path}{explained(path)}; expected files of one of the formats {known}")
    if kind == ".json" and is_index_of_shards(path, files):
        raise SoloError(f"{path}{explained(path)}")
    if others:
        raise SoloError(
            f"{path} has several formats, {', '.join([kind, *others])}: choose some by a pattern, such "
            f"as *{kind}"
        )
    if kind == TEXT_INDEX:
        return MegatronIndexedSource(path, files)
    if any(file.modified is None and not file.content for file in files):
        logger.warning(
            "%s: its server does not state what identifies contents, so that resuming notices a changed file "
            "only by its size",
            path,
        )
    files = [replace(file, images=images or "", cached=cache) for file in files]
    return _ALL_READERS[kind](path, files)


def _find(path: str, limits: Limits, format: SourceFormat) -> list[DataFile]:
    searches = [[*_READERS, TEXT_INDEX], [*_ARROW], [*_JSON], [*_CSV]]
    if format == "hf":
        searches = [[*_ARROW]]
    if format == "imagefolder":  # `datasets` puts captions into a file of this name
        path, searches = f"{path.rstrip('/')}/metadata.*", [[*_ALL_READERS]]
    for suffixes in searches:
        if files := find_files(path, suffixes, limits):
            if suffixes == [*_ARROW]:
                return saved_files(path, files)
            # Megatron writes .jsonl files with counts next to its data.
            return [file for file in files if file.name.endswith(TEXT_INDEX)] or files
    return []


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

    Contents are compared if both have them: not those of some web servers, nor of earlier versions.
    """
    files_before, _, contents_before = before.partition("-")
    files_now, _, contents_now = now.partition("-")
    unknown = not (contents_before and contents_now)
    return files_before == files_now and (unknown or contents_before == contents_now)


def _kind(file: DataFile) -> str | None:
    """Return the suffix of a kind of file, if it is known; compressed and plain JSON lines are one kind."""
    suffixes = sorted([*_ALL_READERS, TEXT_INDEX], key=len, reverse=True)
    suffix = next((suffix for suffix in suffixes if file.name.lower().endswith(suffix)), None)
    for plain in (".jsonl", ".json"):
        if suffix and suffix.startswith(plain):
            return plain
    return suffix
