"""Perceptual hashes of images, and the search for hashes that differ in few bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

from PIL import Image

from solo_vlm.utils.errors import SoloError

BITS = 64

T = TypeVar("T")


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of an image's 64 lowest frequencies lie above their median (pHash, Zauner 2010).

    It survives another size, another compression and small changes of colour; not a crop or a mirror.

    Raises:
        SoloError: the imagehash package is missing.
    """
    try:
        from imagehash import phash
    except ImportError as error:
        raise SoloError("comparing images needs a package more: pip install imagehash") from error
    return int(str(phash(image)), 16)


class HashIndex(Generic[T]):
    """Finds all hashes within a Hamming distance, and looks at few others.

    The bits are cut into `distance + 1` bands. Two hashes that differ in at most `distance` bits agree in at
    least one band, so only those that share a band have to be compared (Manku et al. 2007, "Detecting
    near-duplicates for web crawling").

    Args:
        entries: hashes, and what they are of.
        distance: bits that may differ.
    """

    def __init__(self, entries: Iterable[tuple[int, T]], distance: int) -> None:
        self.distance = distance
        self._bands = list(_bands(distance + 1))
        self._buckets: list[dict[int, list[tuple[int, T]]]] = [{} for _ in self._bands]
        for entry in entries:
            for buckets, (shift, mask) in zip(self._buckets, self._bands, strict=True):
                buckets.setdefault(entry[0] >> shift & mask, []).append(entry)

    def near(self, wanted: int) -> Iterator[tuple[T, int]]:
        """What lies within the distance, each once, with the bits in which it differs."""
        for number, (shift, mask) in enumerate(self._bands):
            for known, value in self._buckets[number].get(wanted >> shift & mask, ()):
                differing = known ^ wanted
                if differing.bit_count() <= self.distance and not _agree(differing, self._bands[:number]):
                    yield value, differing.bit_count()


def _bands(count: int) -> Iterator[tuple[int, int]]:
    """Shift and mask of bands as equally wide as can be."""
    widths = [BITS // count + (number < BITS % count) for number in range(count)]
    for start, end in pairwise(accumulate(widths, initial=0)):
        yield start, (1 << (end - start)) - 1


def _agree(differing: int, bands: Sequence[tuple[int, int]]) -> bool:
    """Whether two hashes agree in one of these bands, where they have been found already."""
    return any(not differing >> shift & mask for shift, mask in bands)
