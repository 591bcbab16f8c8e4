"""WebDataset tars; a unit is a tar, a row is the members that share a name up to the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from solo_vlm.data.schema import SampleError
from solo_vlm.data.sources.files import DataFile, broken_unit, fingerprint, retried

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class WebDatasetSource:
    """Rows of tar files, as webdataset and img2dataset write them.

    A row with a `.json` that has `messages` is a chat; its images are the row's image members, by name. Any
    other is a document: its image, then the caption in `.txt`, or in the JSON's `caption` or `text`.
    """

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, unit: int) -> Sequence[dict[str, Any]]:
        """All rows of a tar. Where it is cut short, the last row says so when it is asked for."""
        file = self._files[unit]
        try:
            members, error = _index(file)
        except tarfile.TarError as broken:
            return broken_unit(broken, file.url)
        return _Rows(file, members, error)

    def where(self, unit: int, row: int) -> str:
        """Name file and row."""
        return f"{self._files[unit].url}, row {row}"

    def fingerprint(self) -> str:
        """Names and sizes of the files."""
        return fingerprint(self._files)


class _Member(NamedTuple):
    extension: str
    offset: int
    size: int


class _Rows(Sequence[dict[str, Any]]):
    """Samples of a tar, read from their place in the file when they are asked for."""

    def __init__(self, file: DataFile, samples: list[list[_Member]], error: SampleError | None) -> None:
        self._file = file
        self._samples = samples
        self._error = error

    def __len__(self) -> int:
        return len(self._samples) + (self._error is not None)

    def __getitem__(self, index: Any) -> Any:
        if self._error is not None and index == len(self._samples):
            raise self._error
        return _row(_read_members(self._file, self._samples[index]))


@retried
def _index(file: DataFile) -> tuple[list[list[_Member]], SampleError | None]:
    """Where the members of each sample lie, and what is wrong with the end of the file."""
    samples: dict[str, list[_Member]] = {}
    error = None
    with file.open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        try:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.offset_data + member.size > file.size:
                    raise tarfile.ReadError("unexpected end of data")
                place = _Member(extension.lower(), member.offset_data, member.size)
                samples.setdefault(f"{folder}/{stem}", []).append(place)
        except tarfile.TarError as broken:
            error = SampleError("broken-shard", f"{file.url}: {broken}")
    return list(samples.values()), error


@retried
def _read_members(file: DataFile, members: list[_Member]) -> list[tuple[str, bytes]]:
    contents = []
    with file.open() as stream:
        for member in members:
            stream.seek(member.offset)
            contents.append((member.extension, stream.read(member.size)))
    return contents


def _row(members: list[tuple[str, bytes]]) -> dict[str, Any]:
    images = [data for extension, data in sorted(members, key=lambda m: m[0]) if extension.endswith(_IMAGES)]
    others = {extension: data for extension, data in members if not extension.endswith(_IMAGES)}
    try:
        facts = json.loads(others.get("json", b"{}"))
        caption = others["txt"].decode() if "txt" in others else facts.get("caption") or facts.get("text")
    except (ValueError, AttributeError) as error:
        raise SampleError("json", str(error)) from error
    if "messages" in facts:
        return {**facts, "images": images}
    if not isinstance(caption, str):
        raise SampleError("no-caption", f"neither .txt nor a caption in .json among {sorted(others)}")
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": caption}]
    return {"messages": [{"role": "assistant", "content": parts}], "images": images}
