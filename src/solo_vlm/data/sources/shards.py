"""Shards of many files under one numbering, and shards that several streams read at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sources.files import DataFile, read_each

if TYPE_CHECKING:
    from solo_vlm.data.sources import Source


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


class SharedShards:
    """A source whose shards are read and held once for all streams of a process that have them open.

    Args:
        source: what is read.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._source = source
        self._held: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._source)

    def __reduce__(self) -> tuple[type[SharedShards], tuple[Source]]:
        return SharedShards, (self._source,)  # another process holds shards of its own

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """All rows of a shard, the same object as long as somebody holds it."""
        if (rows := self._held.get(shard)) is None:
            rows = self._held[shard] = self._source.read(shard)
        return rows

    def where(self, shard: int, row: int) -> str:
        """Name file and row, for messages."""
        return self._source.where(shard, row)

    def fingerprint(self) -> str:
        """Fingerprint of the source."""
        return self._source.fingerprint()
