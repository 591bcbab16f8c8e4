"""Near-duplicate search: perceptual hashes of images, and n-grams that questions share with other text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from solo_vlm.utils.errors import SoloError

BITS = 64
MIN_LENGTH, MAX_LENGTH = 8, 13  # words of an n-gram
MAX_OCCURRENCES = 10
"""An n-gram in more training documents, or in more questions, is a common phrase."""

_WORD = re.compile(r"\w+")

T = TypeVar("T")
Question = tuple[str, str]  # task, row ID


def perceptual_hash(image: Image.Image) -> int:
    """Return 64 bits: which of the 64 lowest frequencies exceed their median (pHash, Zauner 2010).

    The hash tolerates resizing, compression and small color changes, but neither crops nor mirroring.

    Raises:
        SoloError: The imagehash package is missing.
    """
    try:
        from imagehash import phash
    except ImportError as error:
        raise SoloError("comparing images needs the imagehash package: pip install imagehash") from error
    return int(str(phash(image)), 16)


class HashIndex(Generic[T]):
    """Index of hashes that finds all within a Hamming distance.

    The bits are cut into `distance + 1` bands. Two hashes that differ in at most `distance` bits agree in at
    least one band, so only hashes that share a band are compared (Manku et al. 2007, "Detecting
    near-duplicates for web crawling").
    """

    def __init__(self, entries: Iterable[tuple[int, T]], distance: int) -> None:
        self.distance = distance
        self._bands = list(_bands(distance + 1))
        self._buckets: list[dict[int, list[tuple[int, T]]]] = [{} for _ in self._bands]
        for entry in entries:
            for buckets, (shift, mask) in zip(self._buckets, self._bands, strict=True):
                buckets.setdefault(entry[0] >> shift & mask, []).append(entry)

    def near(self, query: int) -> Iterator[tuple[T, int]]:
        """Yield each value within the distance once, with its Hamming distance."""
        for number, (shift, mask) in enumerate(self._bands):
            for known, value in self._buckets[number].get(query >> shift & mask, ()):
                differing = known ^ query
                found = any(not differing >> shift & mask for shift, mask in self._bands[:number])
                if differing.bit_count() <= self.distance and not found:
                    yield value, differing.bit_count()


def _bands(count: int) -> Iterator[tuple[int, int]]:
    """Yield shift and mask of bands of nearly equal width."""
    widths = [BITS // count + (number < BITS % count) for number in range(count)]
    for start, end in pairwise(accumulate(widths, initial=0)):
        yield start, (1 << (end - start)) - 1


@dataclass(frozen=True)
class NgramIndex:
    """Index of questions by their n-grams, as GPT-3's authors detected contamination.

    Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: text is compared by words, in
    lower case and without punctuation. The length N of an n-gram is the 5th percentile of the lengths of a
    benchmark's examples, clipped to 8 to 13 words; shorter examples are not compared. N-grams in more than 10
    training documents are common phrases and do not count, nor, here, do those in more than 10 questions.
    """

    questions: Mapping[str, Sequence[Question]]  # by n-gram
    lengths: Mapping[str, int]  # words per n-gram, by task
    compared: Mapping[str, int]  # number of questions that are long enough, by task

    @classmethod
    def of(cls, texts: Mapping[Question, str]) -> NgramIndex:
        """Index questions with their options."""
        words = {question: split_words(text) for question, text in texts.items()}
        counts: dict[str, list[int]] = {}
        for (task, _), its_words in words.items():
            counts.setdefault(task, []).append(len(its_words))
        lengths = {
            task: int(np.clip(np.percentile(values, 5), MIN_LENGTH, MAX_LENGTH))
            for task, values in counts.items()
        }
        questions: dict[str, list[Question]] = {}
        compared: Counter[str] = Counter()
        for question, its_words in words.items():
            ngrams = set(_ngrams(its_words, lengths[question[0]]))
            compared[question[0]] += bool(ngrams)
            for ngram in ngrams:
                questions.setdefault(ngram, []).append(question)
        rare = {ngram: found for ngram, found in questions.items() if len(found) <= MAX_OCCURRENCES}
        return cls(rare, lengths, dict(compared))

    def find(self, text: str) -> set[str]:
        """Return the n-grams of any question that occur in a text."""
        words = split_words(text)
        lengths = set(self.lengths.values())
        return {ngram for n in lengths for ngram in _ngrams(words, n) if ngram in self.questions}


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
