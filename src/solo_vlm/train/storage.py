"""Storage of checkpoints: a folder on a disk, or on an object store at a URL of fsspec."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, ParamSpec, Self, TypeVar

import fsspec
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from solo_vlm.data.sources.retries import retried
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError, first_line
from solo_vlm.utils.files import causes, explain_os_error, remove, sync, write_text

P = ParamSpec("P")
R = TypeVar("R")

STATE_FILE = "training_state.json"
CHECKSUMS_FILE = "checksums.json"
_METADATA_FILE = ".metadata"  # torch's
_OWNER_FILE = "owner"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL_PREFIX = ".partial-"  # as in utils/files.py, but with a name that all processes know
_BLOCK_SIZE = 1 << 20
_OWN_MODULES = {"builtins", "solo_vlm", "torch"}  # their errors are not those of a store

logger = logging.getLogger(__name__)

Checksum = tuple[int, str]  # size and CRC-32: finds damage, not intent


class Folder:
    """Folder on a disk or an object store.

    Operations on an object store are retried, then raise SoloError; a missing file is a FileNotFoundError.

    Attributes:
        url: Path or URL.
        is_local: Whether it is on a disk.
    """

    def __init__(self, place: str | Path) -> None:
        self.url = str(place).removeprefix("file://")
        self.is_local = "://" not in self.url
        if not self.is_local:
            self.url = self.url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """Name without the folders that it is in."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """Folder that it is in."""
        return Folder(self.url.rpartition("/")[0])

    @property
    def path(self) -> Path:
        """Path of a local folder."""
        return Path(self.url)

    @property
    def system(self) -> fsspec.AbstractFileSystem:
        """File system, which must not remember lists of files, since other processes write, too."""
        if self.is_local:
            return fsspec.filesystem("file")
        try:
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False)[0]
        except (ImportError, ValueError) as error:
            hint = " (pip install 'solo-vlm[s3]')" if self.url.startswith("s3") else ""
            raise SoloError(f"cannot use {self}: {first_line(error)}{hint}") from error

    def at(self, name: str = "") -> str:
        """Return the absolute path or the URL of a file, or of the folder."""
        url = f"{self.url}/{name}" if name else self.url
        return str(Path(url).absolute()) if self.is_local else url

    def retried(self, call: Callable[P, R]) -> Callable[P, R]:
        """Retry a call on an object store."""
        return call if self.is_local else retried(call)

    def entries(self) -> dict[str, int | None]:
        """Return the sizes of its files, and None for folders, by name; empty if there is no such folder."""
        try:
            found = self._call("ls", self.at(), detail=True)
        except FileNotFoundError:
            return {}
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] if entry["type"] == "file" else None
            for entry in found
        }

    def read(self, name: str) -> str:
        """Return the content of a text file."""
        return self._call("cat_file", self.at(name)).decode()

    def find(self, name: str) -> str | None:
        """Return the content of a text file, or None if there is no such file."""
        with suppress(FileNotFoundError):
            return self.read(name)
        return None

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        if self.is_local:
            write_text(self.path / name, text)
        else:
            self._call("pipe_file", self.at(name), text.encode())

    def checksum(self, name: str) -> Checksum:
        """Return the size and checksum of a file."""

        def compute() -> Checksum:
            with self.system.open(self.at(name), "rb") as stream:
                counted = _ChecksumStream(stream)
                while counted.read(_BLOCK_SIZE):
                    pass
            return counted.checksum

        with self.accessing():
            return self.retried(compute)()

    def remove(self, name: str = "") -> None:
        """Remove a file, or the whole folder; no-op if it does not exist."""
        if self.is_local:
            return remove(self.path / name)
        for found in self._call("find", self.at(name)):  # `rm` would take brackets for a pattern
            with suppress(FileNotFoundError):
                self._call("rm_file", found)

    @contextmanager
    def accessing(self, *passed: type[BaseException]) -> Iterator[None]:
        """Raise SoloError if the body cannot read or write the folder, unless its error is `passed`."""
        try:
            yield
        except passed:
            raise
        except BaseException as error:  # torch's error of a distributed checkpoint is not an Exception
            explained = self._explain(error)
            if explained is None or explained is error:
                raise
            raise explained from error

    def _explain(self, error: BaseException) -> SoloError | None:
        """Return a one-line error for a failure of disk or store; None for other exceptions."""
        found = list(causes(error))
        if known := [cause for cause in found if isinstance(cause, SoloError)]:
            return known[0]
        if self.is_local:
            return explain_os_error(error, self.path)
        for cause in filter(_is_of_store, found):
            return SoloError(
                f"cannot access {self}: {first_line(cause)}; check bucket, credentials and network, then run "
                "the same command again"
            )
        return None

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        with self.accessing(FileNotFoundError):
            return self.retried(getattr(self.system, method))(*arguments, **options)


def _is_of_store(error: BaseException) -> bool:
    """Return whether an error comes from a file system, its network or its client library."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | NotImplementedError) or module not in _OWN_MODULES


class CheckpointStore:
    """Checkpoints of a run, as folders `step-NNNNNNNN`.

    On a disk, a checkpoint is written under another name and renamed when it is complete. Object stores
    cannot rename: there, a checkpoint is complete once it has its checksums, which are written last.

    Attributes:
        folder: Folder of the checkpoints.
        is_separate: Whether it is outside the output directory. Then the lock of that directory does not
            protect it, and the directory may be lost without it.
    """

    def __init__(self, folder: str | Path, is_separate: bool = False) -> None:
        self.folder = Folder(folder)
        self.is_separate = is_separate
        self._owner = f"{socket.gethostname()}, process {os.getpid()}, start {uuid.uuid4().hex}"

    @classmethod
    def of(cls, recipe: Recipe, out: Path) -> Self:
        """Return the store that a recipe names, of the run in an output directory."""
        if (own := recipe.checkpoint.folder) is None:
            return cls(out / "checkpoints")
        return cls(recipe.mixture.source_path(own), is_separate=True)

    def check_access(self, rank: int) -> None:
        """Write, read and delete a file in a separate folder.

        Raises:
            SoloError: One of these fails, or the package of the file system is not installed.
        """
        if not self.is_separate:
            return
        with self.folder.accessing():
            system, probe = self.folder.system, self.folder.at(f".probe-{rank}")
            if self.folder.is_local:
                self.folder.path.mkdir(parents=True, exist_ok=True)
            # Without further retries than those of the store's client: a mistake should not take minutes.
            system.pipe_file(probe, b"probe")
            system.cat_file(probe)
            system.rm_file(probe)

    def claim(self) -> None:
        """Make this process the only one that saves in a separate folder: the last to start owns it."""
        if self.is_separate:
            self.folder.write(_OWNER_FILE, self._owner)

    def checkpoints(self) -> list[Folder]:
        """Return the complete checkpoints, oldest first; copies under other names do not count."""
        found = [self.folder / name for name in self._folders() if _NAME.fullmatch(name)]
        return sorted(filter(self._is_complete, found), key=step_of)

    def newest(self) -> Folder | None:
        """Return the newest complete checkpoint, if there is one."""
        return next(reversed(self.checkpoints()), None)

    def begin(self, step: int, state: str) -> Folder | None:
        """Create the folder to write a checkpoint into, with its state; return None if there is one."""
        self._check_owner()
        path = self.folder / f"step-{step:08d}"
        if self._is_complete(path):
            return None
        partial = self._partial(path)
        partial.remove()
        try:
            partial.write(STATE_FILE, state)
        except BaseException:
            self.discard(partial)
            raise
        return partial

    def commit(self, partial: Folder, checksums: dict[str, Checksum]) -> None:
        """Make a checkpoint complete, whose files are all written."""
        own = {name: partial.checksum(name) for name in (_METADATA_FILE, STATE_FILE)}
        self._check_owner()
        partial.write(CHECKSUMS_FILE, json.dumps(own | checksums, indent=1))
        if self.folder.is_local:
            sync(partial.path)
            partial.path.rename(partial.path.with_name(partial.name.removeprefix(_PARTIAL_PREFIX)))
            sync(self.folder.path)

    def discard(self, partial: Folder) -> None:
        """Remove what a failed save left on a disk, maybe full; a store is cleaned at the next start."""
        if self.folder.is_local:
            with suppress(OSError):
                partial.remove()

    def delete(self, path: Folder) -> None:
        """Delete a checkpoint so that a crash cannot leave half of it as a complete one."""
        if self.folder.is_local:
            path.path.rename(self._partial(path).path)
        else:
            path.remove(CHECKSUMS_FILE)
        self._partial(path).remove()

    def remove_partial(self) -> None:
        """Remove checkpoints that a crash left half saved or half deleted; requires the lock of the run."""
        for name in self._folders():
            path = self.folder / name
            if _NAME.fullmatch(name.removeprefix(_PARTIAL_PREFIX)) and not self._is_complete(path):
                logger.warning("removing %s, which is incomplete", path)
                path.remove()

    def _folders(self) -> list[str]:
        return [name for name, size in self.folder.entries().items() if size is None]

    def _is_complete(self, path: Folder) -> bool:
        if path.is_local:
            return path.path.exists() and not path.name.startswith(_PARTIAL_PREFIX)
        return CHECKSUMS_FILE in path.entries()

    def _partial(self, path: Folder) -> Folder:
        return self.folder / f"{_PARTIAL_PREFIX}{path.name}" if path.is_local else path

    def _check_owner(self) -> None:
        if self.is_separate and (owner := self.folder.find(_OWNER_FILE)) != self._owner:
            raise SoloError(
                f"another run ({owner}) saves in {self.folder}: this one ends, so that they do not mix; give "
                "each run its own checkpoint.folder"
            )


def step_of(path: Folder) -> int:
    """Return the step of a checkpoint from the name of its folder."""
    return int(path.name.removeprefix("step-"))


@dataclass(frozen=True)
class _CheckedResult(WriteResult):
    """Torch's record of a written tensor, with the checksum of its file."""

    checksum: Checksum


class CheckpointWriter(FileSystemWriter):
    """Torch's writer on any file system, with checksums computed while writing.

    Attributes:
        folder: Folder to write into.
        checksums: Checksums of the files of all processes; in rank 0, once they are written.
    """

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.url, sync_files=folder.is_local)
        self._streams = _Streams(folder)
        self.fs, self.path = self._streams, folder.at()  # type: ignore[assignment]
        self.folder = folder
        self.checksums: dict[str, Checksum] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with self.folder.parent.accessing():
            written = self.folder.retried(super().write_data)(plan, planner).wait()
        checksums = self._streams.checksums
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                _CheckedResult(**vars(each), checksum=checksums[each.storage_data.relative_path])
                for each in written
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        checked = [each for of_rank in results for each in of_rank if isinstance(each, _CheckedResult)]
        self.checksums = {each.storage_data.relative_path: each.checksum for each in checked}
        with self.folder.parent.accessing():
            self.folder.retried(super().finish)(metadata, results)


class CheckpointReader(FileSystemReader):
    """Torch's reader on any file system; reads each file in order."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.url)
        self.fs, self.path = _Streams(folder), folder.at()  # type: ignore[assignment]
        self.folder = folder

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        with self.folder.accessing():
            return self.folder.retried(super().read_metadata)(*arguments, **options)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def place(item: ReadItem) -> tuple[str, int]:
            stored = self.storage_data[item.storage_index]
            return stored.relative_path, stored.offset

        with self.folder.accessing():
            return super().read_data(replace(plan, items=sorted(plan.items, key=place)), planner)

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """Read a tensor at once: torch would read a zip archive from its end, in many requests."""

        def read() -> bytes:
            file.seek(sinfo.offset)
            return file.read(sinfo.length)

        return BytesIO(self.folder.retried(read)())


class _Streams(FileSystem):
    """Torch's access to a file system of fsspec.

    Attributes:
        checksums: Checksums of the written files, by name.
    """

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self.fs: Any = folder.system
        self.checksums: dict[str, Checksum] = {}
        self._is_local = folder.is_local

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode == "rb":
                yield stream
                return
            counted = _ChecksumStream(stream)
            yield counted
        self.checksums[Path(path).name] = counted.checksum

    def init_path(self, path: str | os.PathLike[str], **options: Any) -> str | os.PathLike[str]:
        return path

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        if self._is_local:  # an object store has no folders, and s3fs would create a missing bucket
            super().mkdir(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        if self._is_local:
            return super().rename(path, new_path)
        self.fs.cp_file(path, new_path)
        self.fs.rm_file(path)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self.fs.rm_file(path)


class _ChecksumStream:
    """Stream that computes the size and checksum of what is read from it or written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._size = self._value = 0

    @property
    def checksum(self) -> Checksum:
        return self._size, f"{self._value:08x}"

    def write(self, data: Any) -> int:
        self._add(data)
        return self._stream.write(data)

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._add(data)
        return data

    def _add(self, data: Any) -> None:
        self._size += memoryview(data).nbytes
        self._value = zlib.crc32(data, self._value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
