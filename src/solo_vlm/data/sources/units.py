"""Units of many files under one numbering, and units that several streams read at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sources.files import DataFile, read_each

if TYPE_CHECKING:
    from solo_vlm.data.sources import Source


class UnitIndex:
    """Where each unit lies: a file, and numbers that say where in it, in a few bytes: there can be millions.

    Args:
        files: in order.
        find_units: for a file (units, numbers), such as the first and last byte of each unit.
    """

    def __init__(
        self, files: Sequence[DataFile], find_units: Callable[[DataFile], NDArray[np.int64]]
    ) -> None:
        self.files = files
        units = read_each(find_units, files)
        self._ends = np.cumsum([len(of_file) for of_file in units])
        self._numbers = np.concatenate(units)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, unit: int) -> tuple[DataFile, list[int]]:
        """The file of a unit, and its numbers there."""
        file = int(np.searchsorted(self._ends, unit, side="right"))
        return self.files[file], self._numbers[unit].tolist()


class SharedUnits:
    """A source whose units are read and held once for all streams of a process that have them open.

    Args:
        source: what is read.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._source = source
        self._held: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._source)

    def __reduce__(self) -> tuple[type[SharedUnits], tuple[Source]]:
        return SharedUnits, (self._source,)  # another process holds units of its own

    def read(self, unit: int) -> Sequence[dict[str, Any]]:
        """All rows of a unit, the same object as long as somebody holds it."""
        if (rows := self._held.get(unit)) is None:
            rows = self._held[unit] = self._source.read(unit)
        return rows

    def where(self, unit: int, row: int) -> str:
        """Name file and row, for messages."""
        return self._source.where(unit, row)

    def fingerprint(self) -> str:
        """Fingerprint of the source."""
        return self._source.fingerprint()
