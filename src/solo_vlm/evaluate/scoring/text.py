"""Comparison of a short text with its accepted answers."""

from __future__ import annotations

from collections.abc import Sequence

from solo_vlm.evaluate.scoring.extract import clean, plain
from solo_vlm.utils.errors import SoloError

_ANLS_THRESHOLD = 0.5


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether a response is one of the answers, up to case, white space and surrounding punctuation.

    Special tokens, reasoning blocks and boxes are read as everywhere, see `clean`.
    """
    text = clean(prediction)
    spoken = plain(text)
    return any(text == answer.strip() or (spoken and spoken == plain(answer)) for answer in answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the normalized Levenshtein similarity to the nearest answer, 0 if below 0.5; at most 1.

    Its mean over questions is ANLS (Biten et al. 2019, arXiv 1905.13648), equal to the script of the Robust
    Reading Competition, which divides by the longer text as it stands, before case and white space are
    unified. A response to score is the text alone: call `clean` first where it may have special tokens.

    Raises:
        SoloError: The levenshtein package is missing.
    """
    try:
        from Levenshtein import distance
    except ImportError as error:
        raise SoloError("ANLS needs the levenshtein package: pip install levenshtein") from error

    def similarity(answer: str) -> float:
        length = max(len(answer.upper()), len(prediction.upper()))
        return 1 - distance(_unified(answer), _unified(prediction)) / length if length else 1.0

    nearest = max(map(similarity, answers))
    return nearest if nearest >= _ANLS_THRESHOLD else 0.0


def _unified(text: str) -> str:
    return " ".join(text.lower().split())
