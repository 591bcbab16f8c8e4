"""Units of many files under one numbering, in a few bytes each: a data set can have millions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sources.files import DataFile, read_each


class UnitIndex:
    """Where each unit lies: a file, and numbers that say where in it.

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
