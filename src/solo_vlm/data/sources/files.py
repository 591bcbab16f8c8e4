"""Data files wherever fsspec reaches: local disk, S3, the hub, https. Reads are retried."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, ParamSpec, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from solo_vlm.data.sample import SampleError
from solo_vlm.utils.errors import SoloError

P = ParamSpec("P")
R = TypeVar("R")

CODECS = {".gz": "gzip", ".zst": "zstd", ".lz4": "lz4"}

_OPEN_AT_A_TIME = 16  # files whose footers or lines are looked through when a source is opened
_ATTEMPTS = 5
_FIRST_WAIT = 0.5  # seconds, doubled each time
_NETWORKING = ("aiohttp", "asyncio", "botocore", "httpx", "httpx2")  # not all of their errors are OSErrors


def retried(read: Callable[P, R]) -> Callable[P, R]:
    """Try again, with growing waits, when the disk or the network fails; then let the error through."""
    return retry(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential_jitter(multiplier=_FIRST_WAIT, max=30),
        reraise=True,
    )(read)


def _may_pass(error: BaseException) -> bool:
    """Whether a second try can help. Broken content stays broken, a missing file missing."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return False
    if isinstance(error, OSError):
        return _of_the_system(error)
    return type(error).__module__.partition(".")[0] in _NETWORKING


def _of_the_system(error: OSError) -> bool:
    """Whether disk or network failed. Broken content is an OSError of pyarrow's: a plain one, unnumbered."""
    return error.errno is not None or type(error) is not OSError


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a source.

    Attributes:
        url: path, or URL with the protocol of a file system of fsspec (`s3://`, `hf://`, `https://`).
        size: bytes.
    """

    url: str
    size: int

    @property
    def name(self) -> str:
        """Without folders."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        """What relative paths in the file count from."""
        return self.url.rpartition("/")[0]

    def open(self, ahead: bool = True) -> BinaryIO:
        """Open for reading; the file object can seek.

        Args:
            ahead: fetch more from far away than was asked for, as is good for reading from end to end.
        """
        system, path = fsspec.core.url_to_fs(self.url)
        return system.open(path, "rb", **({} if ahead else {"cache_type": "none"}))

    def read(self, *places: tuple[int, int]) -> list[bytes]:
        """What stands between the (start, end) bytes of each place, and nothing more is fetched.

        Raises:
            SoloError: a web server cannot send parts of a file.
        """
        filled = [(start, end) for start, end in places if end > start]
        system, path = fsspec.core.url_to_fs(self.url)
        parts = system.cat_ranges([path] * len(filled), [s for s, _ in filled], [e for _, e in filled])
        for part, (start, end) in zip(parts, filled, strict=True):
            if isinstance(part, Exception):
                raise part
            if len(part) > end - start:
                raise SoloError(f"{self.url}: its server cannot send parts of files; download it first")
        return [parts.pop(0) if end > start else b"" for start, end in places]

    def read_decompressed(self) -> bytes:
        """The whole content; .gz, .zst and .lz4 are decompressed, and one that is cut short is an error."""
        codec = CODECS[self.name[self.name.rindex(".") :].lower()]
        with self.open() as stream, pa.CompressedInputStream(stream, codec) as plain:
            return plain.read()


def read_url(url: str) -> bytes:
    """The content of a file wherever fsspec reaches.

    Raises:
        ValueError, ImportError: the protocol is not known, or its package not installed.
        OSError: there is no such file, or the network failed.
    """
    system, path = fsspec.core.url_to_fs(url)
    return system.cat_file(path)


@retried
def find_files(path: str, suffixes: Sequence[str]) -> list[DataFile]:
    """A file as it is, or what a folder or a glob pattern holds with one of these suffixes, sorted.

    Args:
        path: local path or URL.
        suffixes: such as ".parquet", in any case; a single file is taken whatever its suffix.

    Raises:
        SoloError: a folder is named like a file, as those of Spark are, or there are data files in a folder
            of the folder: they would be passed over.
    """
    system, root = fsspec.core.url_to_fs(path)
    if system.isfile(root):
        names = [root]
    else:
        listed = system.isdir(root)
        found = system.ls(root, detail=True) if listed else system.glob(root, detail=True).values()
        fixed = len(root) if listed else len(re.split(r"[*?\[]", root)[0])
        kinds = {
            entry["name"]: entry["type"]
            for entry in found
            # Hidden files and folders are left alone: they may be somebody's half-written ones.
            if not any(part.startswith(".") for part in entry["name"][fixed:].split("/"))
        }
        names = sorted(name for name in kinds if _is_data(name, suffixes))
        if folder := next((name for name in names if kinds[name] == "directory"), None):
            raise SoloError(f"{folder} is a folder among files: make it a source of its own, or move it away")
        for folder in [name for name, kind in kinds.items() if listed and kind == "directory"]:
            if any(_is_data(name, suffixes) for name in system.ls(folder, detail=False)):
                raise SoloError(
                    f"{folder}, a folder in {path}, has data files, too: name all by a pattern, such as "
                    f"{path.rstrip('/')}/**/*{suffixes[0]}, or make each folder a source of its own"
                )
    local = "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))
    sizes = system.sizes(names)
    return [
        DataFile(name if local else system.unstrip_protocol(name), size)
        for name, size in zip(names, sizes, strict=True)
    ]


def _is_data(name: str, suffixes: Sequence[str]) -> bool:
    return name.lower().endswith(tuple(suffixes))


def fingerprint(files: Sequence[DataFile]) -> str:
    """Changes when files are added, removed, renamed or change in size."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.size}\n".encode())
    return digest.hexdigest()[:16]


def read_each(read: Callable[[DataFile], R], files: Sequence[DataFile]) -> list[R]:
    """What `read` returns for each file; several at a time, since far away files take long to answer."""
    with ThreadPoolExecutor(_OPEN_AT_A_TIME) as pool:
        return list(pool.map(read, files))


class BrokenShard(Sequence[Any]):
    """Stands for a shard that cannot be read: one row, which raises what is wrong when it is asked for."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        if index != 0:
            raise IndexError(index)
        raise self._error


def broken_shard(error: Exception, where: str) -> BrokenShard:
    """What stands for a shard whose content pyarrow could not make sense of.

    Args:
        error: pyarrow's; that of a failing disk or network is raised again, since the shard may be whole.
        where: file, and place in it.
    """
    if isinstance(error, OSError) and _of_the_system(error):
        raise error
    return BrokenShard(SampleError("broken-shard", f"{where}: {error}"))


class ShardIndex:
    """Where each shard lies: a file, and numbers that say where in it, in a few bytes: there can be millions.

    Args:
        files: in order.
        find_shards: for a file (shards, numbers), such as the first and last byte of each shard.
    """

    def __init__(
        self, files: Sequence[DataFile], find_shards: Callable[[DataFile], NDArray[np.int64]]
    ) -> None:
        self.files = files
        shards = read_each(find_shards, files)
        self._ends = np.cumsum([len(of_file) for of_file in shards])
        self._numbers = np.concatenate(shards)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, shard: int) -> tuple[DataFile, list[int]]:
        """The file of a shard, and its numbers there."""
        file = int(np.searchsorted(self._ends, shard, side="right"))
        return self.files[file], self._numbers[shard].tolist()
