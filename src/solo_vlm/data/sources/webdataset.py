"""WebDataset tars; a shard is a tar, a row is the members that share a name up to the first dot."""

from __future__ import annotations

import posixpath
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.files import DataFile, RawSource, broken_shard, fingerprint, readable_rows
from solo_vlm.data.sources.retries import retried
from solo_vlm.data.values import COLUMNS, load_json, natural_key

_FIRST_MEMBERS = 64  # members read to recognize the format
_BYTES_PER_POSITION = 64  # bytes of a tar for each byte of its index, at least about that
_MAX_LINKS = 8  # longest chain of links
_MAX_MEMBERS = 1_000_000
_MAX_HEADER_BYTES = 1 << 20
_BROKEN = (
    tarfile.TarError,
    ValueError,
    OverflowError,
    RecursionError,
)  # errors for invalid headers
_MISSING = (-1, -1)  # position of a link without a target


class WebDatasetSource(RawSource):
    """Rows of tar files, as webdataset and img2dataset write them.

    A row has the columns of its `.json`, and its other members by suffix, if they are text. `image` has its
    image members, in natural order of their names. Hidden members are ignored.
    """

    own_format = "webdataset"

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return all rows of a tar; if it is truncated, accessing the last one raises SampleError."""
        file = self._files[shard]
        try:
            return _Rows(file, *_index(file))
        except _BROKEN as broken:
            return broken_shard(broken, file.url)

    def file(self, shard: int) -> DataFile:
        """Return the tar."""
        return self._files[shard]

    def memory(self, shard: int) -> int:
        """Return the size of the positions of a tar's members, each of which takes a kilobyte at least."""
        return self._files[shard].size // _BYTES_PER_POSITION

    def _first_of(self, shard: int, count: int) -> list[Any]:
        """Return up to `count` readable rows from the first members of a tar."""
        file = self._files[shard]
        try:
            rows = _Rows(file, *_index(file, _FIRST_MEMBERS))
        except _BROKEN:  # reported when the shard is read
            return []
        return readable_rows(rows, min(count, len(rows) - 1) or len(rows))

    def where(self, shard: int, row: int) -> str:
        """Name file and row."""
        return f"{self._files[shard].url}, row {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._files)


class _Member(NamedTuple):
    extension: str
    start: int
    end: int


class _Rows(Sequence[dict[str, Any]]):
    """Samples of a tar, read from their position in the file when they are accessed."""

    def __init__(self, file: DataFile, samples: list[list[_Member]], error: SampleError | None) -> None:
        self._file = file
        self._error = error
        # Arrays save memory: every stream has tars open, each with tens of thousands of members.
        members = [member for sample in samples for member in sample]
        self._extensions = [member.extension for member in members]
        self._places = np.array([(member.start, member.end) for member in members], np.int64)
        self._ends = np.cumsum([0, *map(len, samples)])

    def __len__(self) -> int:
        return len(self._ends) - 1 + (self._error is not None)

    def __getitem__(self, index: Any) -> Any:
        if self._error is not None and index == len(self) - 1:
            raise self._error
        own = slice(self._ends[index], self._ends[index + 1])
        places = self._places[own].tolist()
        if any(tuple(place) == _MISSING for place in places):
            raise SampleError("image", "a sparse file, or a link to a file that is not in the tar")
        self._file.limits.check_row(sum(end - start for start, end in places))
        members = list(zip(self._extensions[own], _read(self._file, places), strict=True))
        return _row(members)


@retried
def _index(file: DataFile, first: int | None = None) -> tuple[list[list[_Member]], SampleError | None]:
    """Return the positions of each sample's members, and the error if the file is truncated.

    Args:
        file: Tar.
        first: Number of members to read; default: all.
    """
    members: list[tarfile.TarInfo] = []
    error = None
    with file.open() as stream:
        headers: Any = _HeaderReader(stream)
        tar = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 - it does not open a file
        try:
            for member in tar:
                _check_member(member, file.size)
                members.append(member)
                if len(members) == first:
                    break
                if len(members) > _MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {_MAX_MEMBERS:,} members: split it")
            else:
                _check_end(stream, tar.offset)
        except _BROKEN as broken:
            error = SampleError("broken-shard", f"{file.url}: {broken}")
    by_name = {posixpath.normpath(member.name): member for member in members}
    samples: dict[str, list[_Member]] = {}
    for member in members:
        if member.isfile() or member.islnk() or member.issym():
            folder, name = posixpath.split(posixpath.normpath(member.name))
            stem, _, extension = name.partition(".")
            if not stem:  # hidden, as macOS adds ._a.png to each a.png
                continue
            place = _Member(sys.intern(extension.lower()), *_place(member, by_name))
            samples.setdefault(f"{folder}/{stem}", []).append(place)
    return list(samples.values()), error


class _HeaderReader:
    """Stream of a tar from which only headers are read; excessively long ones are rejected."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)


def _check_member(member: tarfile.TarInfo, file_size: int) -> None:
    """Reject a negative size or one beyond the end of the file; the size of a sparse file is another one."""
    if member.size < 0:
        raise tarfile.ReadError(f"a member of {member.size} bytes")
    if member.isfile() and not member.issparse() and member.offset_data + member.size > file_size:
        raise tarfile.ReadError("unexpected end of data")


def _place(member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tuple[int, int]:
    """Return start and end of a member's content, or of its target's if it is a link."""
    target: tarfile.TarInfo | None = member
    for _ in range(_MAX_LINKS):
        if target is None or not (target.islnk() or target.issym()):
            break
        folder = posixpath.dirname(target.name) if target.issym() else ""
        target = by_name.get(posixpath.normpath(posixpath.join(folder, target.linkname)))
    if target is None or not target.isfile() or target.issparse():
        return _MISSING
    return target.offset_data, target.offset_data + target.size


def _check_end(stream: BinaryIO, end: int) -> None:
    """Reject a tar that is truncated between two members or has data after its end.

    Raises:
        tarfile.ReadError: The tar is rejected.
    """
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end marker: the tar is truncated")
    while rest := stream.read(tarfile.RECORDSIZE):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("there is data after its end, as in tars joined by cat")


@retried
def _read(file: DataFile, places: list[tuple[int, int]]) -> list[bytes]:
    return file.read(*places)


def _row(members: list[tuple[str, bytes]]) -> dict[str, Any]:
    content = dict(members)
    if len(content) < len(members):
        raise SampleError(
            "duplicate", f"two members have the name and the suffix of one of {sorted(content)}"
        )
    names = sorted(filter(_is_image, content), key=natural_key)
    images = [content.pop(name) for name in names]
    facts = _facts(content.pop("json", b"{}"))
    if images:
        facts = {name: value for name, value in facts.items() if name not in COLUMNS}
    texts = {name: data for name, data in content.items() if name != "txt"}
    if not images:
        _check_for_lost_image(texts)
    row = facts | ({"txt": _caption(content["txt"])} if "txt" in content else {})
    row |= {name: text for name, data in texts.items() if (text := _text(data)) is not None}
    return row | {"image": images} if images else row


def _text(data: bytes) -> str | None:
    with suppress(UnicodeDecodeError):
        return data.decode()
    return None


def _is_image(extension: str) -> bool:
    from solo_vlm.models.solo.image_loading_solo import image_suffixes

    return f".{extension.rpartition('.')[2]}" in image_suffixes()


def _facts(data: bytes) -> dict[str, Any]:
    try:
        facts = load_json(data)
    except ValueError as error:
        raise SampleError("json", str(error)) from error
    if not isinstance(facts, dict):
        raise SampleError("json", "not an object")
    return facts


def _caption(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise SampleError("no-caption", f".txt is not UTF-8: {error}") from error


def _check_for_lost_image(others: dict[str, bytes]) -> None:
    """Reject a row without images that has members other than text, whose caption alone is of no use."""
    for extension, data in others.items():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise SampleError("image", f".{extension} is not a known image format") from error
