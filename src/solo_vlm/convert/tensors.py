"""Tensors that lie in files: where each is, read one at a time, so that memory holds only one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: where it is.
        key: its name in the file.
        dtype: of its elements.
        shape: its shape.
        offset: bytes from the beginning of the file to its first element.
        strides: elements from one to the next, for each dimension.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Bytes from its first to after its last element."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read it: not mapped into memory, since mapped pages count as the process's own.

        Raises:
            SoloError: the file ends before the tensor does.
        """
        if not self.span:
            return torch.empty(self.shape, dtype=self.dtype)
        buffer = bytearray(self.span)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            if _fill(stream.readinto, memoryview(buffer)) < self.span:
                raise SoloError(f"{self.file} is truncated: it ends inside {self.key}; fetch it again")
        return torch.frombuffer(buffer, dtype=self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is yet to be written: what it will be is known, its values come when asked for."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor whose last dimension varies fastest."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _fill(readinto: Callable[[memoryview], int | None], buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends: one call returns at most 2 GB. Bytes read."""
    done = 0
    while done < len(buffer) and (count := readinto(buffer[done:])):
        done += count
    return done
