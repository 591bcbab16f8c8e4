"""Megatron's indexed files: a `.bin` of arrays one after the other, and an `.idx` that says where each is."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sources.files import DataFile, retried
from solo_vlm.utils.errors import SoloError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, arrays, documents
# 1 to 8 as in fairseq, from which Megatron has them; 9 and 10 are the release's own, for patches.
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float64,
    8: np.uint16,
    9: np.float32,
    10: np.float16,
}


class IndexedFile:
    """Arrays of one dimension, numbered; each can be read alone, whole or in part.

    Args:
        index: the `.idx` file; the `.bin` lies beside it.
        data: the `.bin` file.

    Raises:
        SoloError: either is broken, or they do not belong together.
    """

    def __init__(self, index: DataFile, data: DataFile) -> None:
        self._data = data
        self.dtype, self.sizes, self._offsets = _read_index(index)
        if len(self) and data.size < int(self._offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize:
            raise SoloError(f"{data.url} is truncated: {index.url} lists more than it holds")

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, number: int, start: int = 0, end: int | None = None) -> NDArray[np.generic]:
        """Elements `start` to `end` of an array; by default all."""
        size = int(self.sizes[number])
        end = size if end is None else end
        if not 0 <= start <= end <= size:
            raise SoloError(f"{self._data.url}: array {number} has {size} elements, not {start} to {end}")
        position = int(self._offsets[number]) + start * self.dtype.itemsize
        return np.frombuffer(_read(self._data, position, (end - start) * self.dtype.itemsize), self.dtype)


@retried
def _read_index(file: DataFile) -> tuple[np.dtype[np.generic], NDArray[np.int32], NDArray[np.int64]]:
    with file.open() as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise SoloError(f"{file.url} is no index of Megatron's (of its 'mmap' kind)")
        _, version, kind, arrays, _ = _HEADER.unpack(header)
        if version != 1 or kind not in _DTYPES:
            raise SoloError(f"{file.url} is of a version or type that is not known ({version}, {kind})")
        body = stream.read(arrays * (4 + 8))
    if len(body) < arrays * (4 + 8):
        raise SoloError(f"{file.url} is truncated: it should list {arrays} arrays")
    sizes = np.frombuffer(body, np.int32, arrays)
    return np.dtype(_DTYPES[kind]), sizes, np.frombuffer(body, np.int64, arrays, offset=sizes.nbytes)


@retried
def _read(file: DataFile, position: int, count: int) -> bytes:
    return file.read((position, position + count))[0]
