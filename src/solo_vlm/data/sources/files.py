"""Data files on any file system of fsspec (local disk, S3, the hub, https), with retries."""

from __future__ import annotations

import hashlib
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from numpy.typing import NDArray

from solo_vlm.data.formats.row_format import FormatName
from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.retries import bound_waits_for_hub, is_system_error, retried, retried_at_start
from solo_vlm.data.values import OutsidePathError, locate_images
from solo_vlm.utils.errors import SoloError, first_line
from solo_vlm.utils.files import hash_blocks

R = TypeVar("R")
T = TypeVar("T")

CODECS = {".gz": "gzip", ".zst": "zstd", ".lz4": "lz4"}

_BLOCK_SIZE = 1 << 20
_HASH_BLOCK_SIZE, _HASH_BLOCKS = 1 << 14, 16
_CLOSE = 1 << 12  # bytes between ranges that are read in one request
_FIRST_SHARDS = 8  # shards in which rows are looked for to recognize their format
# Of the hub, S3, Azure and GCS, and web servers, the most exact first.
_CONTENT_STATED = ("blob_id", "md5Hash", "ETag", "etag", "Content-MD5", "Last-Modified")
_OPEN_AT_A_TIME = 16  # files indexed in parallel when a source is opened


@dataclass(frozen=True)
class Limits:
    """Limits for reading untrusted files.

    Attributes:
        allow_outside_paths: Whether rows may name images outside the source's folder.
        max_row_bytes: Largest row, encoded images included.
        max_shard_bytes: Largest shard that is read as a whole, decompressed.
    """

    allow_outside_paths: bool = False
    max_row_bytes: int = 2**26
    max_shard_bytes: int = 2**32

    def check_row(self, size: int) -> None:
        """Raise SampleError if a row of `size` bytes is too large."""
        if size > self.max_row_bytes:
            raise SampleError(
                "row-size", f"{size:,} bytes exceed data.max_row_bytes = {self.max_row_bytes:,}"
            )

    def check_shard(self, size: int, name: str) -> None:
        """Raise SoloError if a shard of `size` bytes is too large: skipping it would lose many rows."""
        if size > self.max_shard_bytes:
            raise SoloError(
                f"{name} takes more memory than data.max_shard_bytes = {self.max_shard_bytes:,}: split it, "
                "or raise the limit"
            )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class DataFile:
    """File of a source.

    Attributes:
        url: Local path, or URL of a file system of fsspec (`s3://`, `hf://`, `https://`).
        size: Size in bytes.
        root: Folder of the source, which must contain the images of its rows.
        limits: Limits for reading the file.
        modified: Time of the last modification in ns; None for remote files.
        images: Folder that relative paths in the file refer to; default: the file's own.
        content: Hash of the content, if the file system states it, as the hub and S3 do.
        cached: Whether to download the file into the hub's cache when it is first read.
    """

    url: str
    size: int
    root: str = ""
    limits: Limits = DEFAULT_LIMITS
    modified: int | None = None
    images: str = ""
    content: str = ""
    cached: bool = False

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        """Folder of the file."""
        return self.url.rpartition("/")[0]

    def open(self, ahead: bool = True) -> BinaryIO:
        """Open for reading; the file object can seek.

        Args:
            ahead: Whether to read ahead from remote files, for sequential reading.

        Raises:
            SoloError: The file is gone, or has changed since the source was opened.
        """
        with self._unchanged():
            system, path = self._locate()
            options: dict[str, Any] = {} if ahead else {"cache_type": "none"}
            if self.url.startswith("hf://") and not self.cached:
                options["size"] = self.size  # else each process would list the folder
            return system.open(path, "rb", **options)

    def read(self, *places: tuple[int, int]) -> list[bytes]:
        """Return the bytes of each (start, end) range, fetching nothing else.

        Raises:
            SoloError: The file is gone, or has changed since the source was opened; or a web server does not
                support range requests.
        """
        filled = [(start, end) for start, end in places if end > start]
        parts = self._read_ranges(filled)
        for part, (start, end) in zip(parts, filled, strict=True):
            if len(part) > end - start:
                raise SoloError(f"{self.url}: its server does not support range requests; download it first")
        return [parts.pop(0) if end > start else b"" for start, end in places]

    def _read_ranges(self, places: list[tuple[int, int]]) -> list[bytes]:
        system, path = self._locate()
        if not system.async_impl:  # `cat_ranges` would read ahead
            with self.open(ahead=False) as stream:
                return _read_from(stream, places)
        with self._unchanged():
            parts = system.cat_ranges([path] * len(places), [s for s, _ in places], [e for _, e in places])
        if failure := next((part for part in parts if isinstance(part, Exception)), None):
            raise failure
        return parts

    def _locate(self) -> tuple[Any, str]:
        """Return the file system and the path on it; a cached file is downloaded first."""
        system, path = file_system(self.url)
        if not self.cached:
            return system, path
        at = system.resolve_path(path)
        try:
            local = hf_hub_download(
                at.repo_id,
                at.path_in_repo,
                repo_type=at.repo_type,
                revision=at.revision,
                endpoint=system.endpoint,
            )
        except LocalEntryNotFoundError as error:  # the hub does not answer
            raise ConnectionError(f"cannot download {self.url}: {first_line(error)}") from error
        return fsspec.filesystem("file"), local

    def read_decompressed(self) -> bytes:
        """Return the whole content, decompressed if it is .gz, .zst or .lz4; raise if it is truncated."""
        codec = CODECS[self.name[self.name.rindex(".") :].lower()]
        content = BytesIO()
        with self.open() as stream, pa.CompressedInputStream(stream, codec) as plain:
            while block := plain.read(_BLOCK_SIZE):
                self.limits.check_shard(content.tell() + len(block), self.url)
                content.write(block)
        return content.getvalue()

    def locate_images(self, row: dict[str, Any]) -> dict[str, Any]:
        """Resolve the images of a row of the file, so that they do not depend on the working directory.

        Raises:
            SampleError: An image is outside the folder of images, or the source's, and the limits do not
                allow that.
        """
        root = None if self.limits.allow_outside_paths else self.images or self.root
        try:
            return locate_images(row, self.images or self.folder, root)
        except OutsidePathError as error:
            raise SampleError(
                "outside-path", f"{error}; data.allow_outside_paths = true allows that"
            ) from error

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Raise SoloError if the file is not as it was when the source was opened."""
        try:
            if self.modified is not None:
                now = Path(self.url).stat()
                if (now.st_size, now.st_mtime_ns) != (self.size, self.modified):
                    raise SoloError(
                        f"{self.url} was changed while it was in use: put it back, or start a new run"
                    )
            yield
        except FileNotFoundError as error:
            raise SoloError(f"{self.url} is gone: put it back and run the same command again") from error


def _read_from(stream: BinaryIO, places: list[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of each range; those close together, as a row's in a tar, are read at once."""
    if not places:
        return []
    first, last = min(places)[0], max(end for _, end in places)
    if last - first > sum(end - start for start, end in places) + _CLOSE * len(places):
        return [part for place in places for part in _read_from(stream, [place])]
    stream.seek(first)
    block = stream.read(last - first)
    return [block[start - first : end - first] for start, end in places]


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path on it."""
    if url.startswith("hf://"):
        bound_waits_for_hub()
    return fsspec.core.url_to_fs(url)


def read_url(url: str) -> bytes:
    """Return the content of a file on any file system of fsspec.

    Raises:
        ValueError, ImportError: The protocol is unknown, or its package is not installed.
        OSError: There is no such file, or the network failed.
    """
    system, path = file_system(url)
    return system.cat_file(path)


@retried_at_start
def find_files(path: str, suffixes: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> list[DataFile]:
    """Find the data files of a path: a single file, or those of a folder or a glob pattern, sorted.

    Args:
        path: Local path or URL.
        suffixes: Suffixes of data files, such as ".parquet", in any case. A single file may have any suffix.
        limits: Limits for reading the files.

    Raises:
        SoloError: A folder is named like a data file, as Spark's are, or a subfolder contains data files,
            which would be missed.
    """
    system, root = file_system(path)
    entries: dict[str, dict[str, Any]] = {}
    if system.isfile(root):
        names, source_folder = [root], root.rpartition("/")[0]
    else:
        listed = system.isdir(root)
        found = system.ls(root, detail=True) if listed else system.glob(root, detail=True).values()
        fixed = root if listed else re.split(r"[*?\[]", root)[0]
        source_folder = root if listed else fixed.rpartition("/")[0]
        entries = {entry["name"]: entry for entry in found}
        folders = {
            entry["name"]: is_directory(system, entry)
            for entry in found
            # Hidden files and folders may be incomplete downloads of other programs.
            if not _is_hidden(entry["name"], fixed)
        }
        names = sorted(name for name in folders if _is_data(name, suffixes))
        if folder := next((name for name in names if folders[name]), None):
            raise SoloError(f"{folder} is a folder among files: make it a separate source, or move it away")
        for folder in [name for name, is_one in folders.items() if listed and is_one]:
            inner = system.ls(folder, detail=False)
            if suffix := next(
                (end for end in suffixes if any(_is_data(name, [end]) for name in inner)), None
            ):
                raise SoloError(
                    f"{folder}, a folder in {path}, has data files, too: use a pattern for all, such as "
                    f"{path.rstrip('/')}/**/*{suffix}, or make each folder a separate source"
                )
    if _is_local(system):
        found_at = [(name, Path(name).stat()) for name in names]
        for name, state in found_at:
            if not stat.S_ISREG(state.st_mode):  # reading a pipe may never end
                raise SoloError(f"{name} is not a regular file: move it away")
        return [
            DataFile(name, state.st_size, source_folder, limits, state.st_mtime_ns)
            for name, state in found_at
        ]
    folder = system.unstrip_protocol(source_folder)
    unstated = [name for name in names if not stated_content(entries.get(name, {}))]
    entries |= zip(unstated, read_each(system.info, unstated), strict=True)
    return [
        DataFile(
            system.unstrip_protocol(name),
            entries[name]["size"],
            folder,
            limits,
            content=stated_content(entries[name]),
        )
        for name in names
    ]


def stated_content(entry: dict[str, Any]) -> str:
    """Return what a file system states that changes with a file's content; empty if it states nothing."""
    return next((str(entry[name]) for name in _CONTENT_STATED if entry.get(name)), "")


def _is_hidden(name: str, fixed: str) -> bool:
    """Return whether a part of a path starts with a dot that the start of the pattern does not have."""
    rest = name[len(fixed) :]
    return "/." in rest or (fixed.endswith("/") and rest.startswith("."))


def is_directory(system: Any, entry: dict[str, Any]) -> bool:
    """Return whether an entry of a listing is a folder, or a link to one."""
    return entry["type"] == "directory" or bool(entry.get("islink") and system.isdir(entry["name"]))


@retried_at_start
def is_folder(path: str) -> bool:
    """Return whether a path or URL is a folder."""
    system, folder = file_system(path)
    return bool(system.isdir(folder))


@retried_at_start
def find_folder(path: str) -> str:
    """Return the absolute path or the URL of a folder.

    Raises:
        SoloError: There is no such folder.
    """
    system, folder = file_system(path)
    if not system.isdir(folder):
        raise SoloError(f"no folder {path}")
    return folder if _is_local(system) else system.unstrip_protocol(folder)


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def _is_data(name: str, suffixes: Sequence[str]) -> bool:
    return name.lower().endswith(tuple(suffixes))


def fingerprint(files: Sequence[DataFile]) -> str:
    """Return a hash of the names and sizes of files, and one of their contents, if those are known.

    Of a large local file, blocks are hashed, so that runs start fast: a file that was replaced has other
    blocks. Of remote files, it is what their file systems state.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.size}\n".encode())
    names = digest.hexdigest()[:16]
    if any(file.modified is None and not file.content for file in files):
        return names
    read = iter(read_each(hash_content, [file for file in files if not file.content]))
    contents = hashlib.sha256("".join(file.content or next(read) for file in files).encode())
    return f"{names}-{contents.hexdigest()[:16]}"


@lru_cache(maxsize=100_000)  # a run compares fingerprints several times
@retried
def hash_content(file: DataFile) -> str:
    """Return a hash of a small file's content, or of blocks of a large one."""
    with file.open() as content:
        return hash_blocks(content, file.size, _HASH_BLOCK_SIZE, _HASH_BLOCKS)


def read_each(read: Callable[[T], R], files: Sequence[T]) -> list[R]:
    """Return `read` of each file, called in parallel because remote files have a high latency."""
    with ThreadPoolExecutor(_OPEN_AT_A_TIME) as pool:
        return list(pool.map(read, files))


class RawSource(ABC):
    """Data set of numbered shards of raw rows, as they are in the files.

    Attributes:
        name: Path of the source.
        own_format: Format of rows that are not in another one.
    """

    name: str
    own_format: FormatName = "samples"

    @abstractmethod
    def __len__(self) -> int:
        """Number of shards."""

    @abstractmethod
    def read(self, shard: int) -> Sequence[Any]:
        """Return all rows of a shard, in file order; accessing a broken row raises SampleError."""

    @abstractmethod
    def file(self, shard: int) -> DataFile:
        """Return the file of a shard, which relative paths in its rows refer to."""

    def memory(self, shard: int) -> int:
        """Return about how many bytes an open shard takes, without opening it."""
        return self.file(shard).size

    @abstractmethod
    def where(self, shard: int, row: int) -> str:
        """Name file and row, for messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when files are added, removed or rewritten."""

    def first_rows(self, count: int) -> list[Any]:
        """Return up to `count` readable rows of the first shard that has any, among the first few."""
        found = (self._first_of(shard, count) for shard in range(min(len(self), _FIRST_SHARDS)))
        return next(filter(None, found), [])

    def _first_of(self, shard: int, count: int) -> list[Any]:
        """Return up to `count` readable rows of a shard."""
        return readable_rows(self.read(shard), count)


def readable_rows(rows: Sequence[Any], count: int) -> list[Any]:
    """Return the first `count` readable rows."""
    found: list[Any] = []
    for number in range(len(rows)):
        if len(found) == count:
            break
        with suppress(SampleError):
            found.append(rows[number])
    return found


class BrokenShard(Sequence[Any]):
    """Placeholder of an unreadable shard: one row, which raises the error when it is accessed."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        if index != 0:
            raise IndexError(index)
        raise self._error


def broken_shard(error: Exception, where: str) -> BrokenShard:
    """Return the placeholder of a shard that pyarrow cannot parse.

    Args:
        error: Error of pyarrow. A disk or network error is raised again, since the shard may be intact.
        where: File and position, for the message.
    """
    if isinstance(error, OSError) and is_system_error(error):
        raise error
    return BrokenShard(SampleError("broken-shard", f"{where}: {first_line(error)}"))


class ShardIndex:
    """Compact index of possibly millions of shards: the file of each, and numbers that locate it there.

    Args:
        files: Files in order.
        find_shards: Function that returns (shards, numbers) of a file, such as each shard's byte range.
    """

    def __init__(
        self, files: Sequence[DataFile], find_shards: Callable[[DataFile], NDArray[np.int64]]
    ) -> None:
        self.files = files
        shards = read_each(find_shards, files)
        self._ends = np.cumsum([len(numbers) for numbers in shards])
        self._numbers = np.concatenate(shards)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, shard: int) -> tuple[DataFile, list[int]]:
        """Return the file of a shard, and the numbers that locate it there."""
        file = int(np.searchsorted(self._ends, shard, side="right"))
        return self.files[file], self._numbers[shard].tolist()
