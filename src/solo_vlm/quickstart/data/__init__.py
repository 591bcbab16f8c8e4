"""Embedded toy data: synthetic scenes, real handwritten digits, generated text."""

from solo_vlm.data.sources.parquet import SCHEMA

from .files import write_toy_data
from .samples import CAPTION_REQUEST, Sample
from .scenes import DIGIT_QUESTION, FAMILIES, DigitSplit, Scene, digit_splits, is_reserved

__all__ = [
    "CAPTION_REQUEST",
    "DIGIT_QUESTION",
    "FAMILIES",
    "SCHEMA",
    "DigitSplit",
    "Sample",
    "Scene",
    "digit_splits",
    "is_reserved",
    "write_toy_data",
]
