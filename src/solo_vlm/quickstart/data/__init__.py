"""The embedded default data: small drawn scenes, real handwritten digits, generated text."""

from solo_vlm.data.samples_file import SCHEMA

from .digits import DIGIT_QUESTION, DigitSplit, digit_splits
from .files import write_toy_data
from .samples import CAPTION_REQUEST, Sample
from .scenes import FAMILIES, Scene, is_reserved

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
