"""WebDataset tars; a unit is a tar, a row is the members that share a name up to the first dot."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

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
            return _Rows(file, *_index(file))
        except tarfile.TarError as broken:
            return broken_unit(broken, file.url)

    def where(self, unit: int, row: int) -> str:
        """Name file and row."""
        return f"{self._files[unit].url}, row {row}"

    def fingerprint(self) -> str:
        """Names and sizes of the files."""
        return fingerprint(self._files)


class _Member(NamedTuple):
    extension: str
    start: int
    end: int


class _Rows(Sequence[dict[str, Any]]):
    """Samples of a tar, read from their place in the file when they are asked for."""

    def __init__(self, file: DataFile, samples: list[list[_Member]], error: SampleError | None) -> None:
        self._file = file
        self._error = error
        # Arrays: every stream has tars open, each with ten thousands of members.
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
        return _row(list(zip(self._extensions[own], _read(self._file, places), strict=True)))


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
                end = member.offset_data + member.size
                place = _Member(sys.intern(extension.lower()), member.offset_data, end)
                samples.setdefault(f"{folder}/{stem}", []).append(place)
        except tarfile.TarError as broken:
            error = SampleError("broken-shard", f"{file.url}: {broken}")
    return list(samples.values()), error


@retried
def _read(file: DataFile, places: list[tuple[int, int]]) -> list[bytes]:
    return file.read(*places)


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
