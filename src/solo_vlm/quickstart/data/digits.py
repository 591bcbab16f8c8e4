"""Real handwritten digits: scikit-learn's 1,797 scans of 8 x 8 pixels, and their fixed split."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import PATCH
from .scenes import Scene
from .vocabulary import NUMBERS

HELD_OUT_DIGITS = 300
DIGIT_QUESTION = "Which digit is this?"
_SPLIT_SEED = 0
_SCAN = 8  # pixels a side
_FULL_INK = 16  # the scans' largest value


@dataclass(frozen=True, slots=True)
class DigitSplit:
    """Scans (n, 8, 8) uint8, dark on white, and labels (n,) of 0 to 9."""

    scans: NDArray[np.uint8]
    labels: NDArray[np.int64]


@cache
def digit_splits() -> tuple[DigitSplit, DigitSplit]:
    """The training and the held-out digits, each label in proportion; the same ones always."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, held_out = train_test_split(
        np.arange(len(data.target)),
        test_size=HELD_OUT_DIGITS,
        stratify=data.target,
        random_state=_SPLIT_SEED,
    )
    scans = (255 - data.images * (255 / _FULL_INK)).round().astype(np.uint8)
    return (
        DigitSplit(scans[train], data.target[train]),
        DigitSplit(scans[held_out], data.target[held_out]),
    )


def training_digit(rng: np.random.Generator) -> Scene:
    """A digit of the training split, a little moved, turned and resized."""
    split, _ = digit_splits()
    index = int(rng.integers(len(split.labels)))
    turn, growth = rng.uniform(-0.1, 0.1), rng.uniform(0.95, 1.05)
    shift = rng.uniform(-0.5, 0.5, size=2)
    return _scene(split, index, turn, growth, (shift[0], shift[1]))


def held_out_digit(index: int) -> Scene:
    """The held-out digit number `index`, as it is."""
    _, split = digit_splits()
    return _scene(split, index, 0.0, 1.0, (0.0, 0.0))


def _scene(split: DigitSplit, index: int, turn: float, growth: float, shift: tuple[float, float]) -> Scene:
    """One patch that shows a scan turned (radians), grown (factor) and moved (scan pixels)."""
    name = NUMBERS[split.labels[index]]
    parity = "odd" if split.labels[index] % 2 else "even"
    step = _SCAN / PATCH / growth  # scan pixels from one drawn pixel to the next
    cos, sin = step * np.cos(turn), step * np.sin(turn)
    centre, middle = _SCAN / 2, PATCH / 2
    placing = (
        *(cos, -sin, centre - shift[0] - (cos - sin) * middle),
        *(sin, cos, centre - shift[1] - (sin + cos) * middle),
    )
    image = Image.fromarray(split.scans[index]).transform(
        (PATCH, PATCH),
        Image.Transform.AFFINE,
        placing,
        resample=Image.Resampling.BICUBIC,
        fillcolor=255,
    )
    questions = ((DIGIT_QUESTION, name), ("Is the digit odd or even?", parity))
    return Scene(image.convert("RGB"), f"the digit {name}", name, questions)
