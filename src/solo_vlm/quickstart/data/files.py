"""Parquet files of the toy data: one for each stage, three held out."""

import itertools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from solo_vlm.data.samples_file import write_samples

from .digits import HELD_OUT_DIGITS
from .samples import (
    Build,
    Sample,
    held_out_caption_sample,
    held_out_digit_sample,
    held_out_question_sample,
    instruction_sample,
    stage1_sample,
    stage2_sample,
    stage3_sample,
    text_sample,
)

_HELD_OUT_SEED = 2024


def write_toy_data(
    out_dir: Path,
    seed: int = 0,
    *,
    text: int = 6_000,
    stage1: int = 20_000,
    stage2: int = 10_000,
    stage3: int = 8_000,
    sft: int = 18_000,
    heldout_digits: int = HELD_OUT_DIGITS,
    heldout_captions: int = 200,
    heldout_qa: int = 300,
) -> dict[str, int]:
    """Writes the toy data as `out_dir`/NAME.parquet; returns the rows of each name.

    The same seed and sizes give the same bytes. The held-out files are the same for every seed,
    and no image of theirs is in a training file.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    held_out = {
        "heldout_digits": [held_out_digit_sample(i) for i in range(heldout_digits)],
        "heldout_captions": [
            held_out_caption_sample(i, _rng(_HELD_OUT_SEED, "heldout_captions", i))
            for i in range(heldout_captions)
        ],
        "heldout_qa": [
            held_out_question_sample(i, _rng(_HELD_OUT_SEED, "heldout_qa", i)) for i in range(heldout_qa)
        ],
    }
    hidden = {image for samples in held_out.values() for s in samples for image in _images(s)}
    training: dict[str, tuple[Build, int]] = {
        "text": (text_sample, text),
        "stage1": (stage1_sample, stage1),
        "stage2": (stage2_sample, stage2),
        "stage3": (stage3_sample, stage3),
        "sft": (instruction_sample, sft),
    }
    rows = {}
    for name, (build, count) in training.items():
        samples = _training_samples(name, build, count, seed, hidden)
        rows[name] = _write(out_dir / f"{name}.parquet", samples)
    for name, kept in held_out.items():
        rows[name] = _write(out_dir / f"{name}.parquet", kept)
    return rows


def _training_samples(name: str, build: Build, count: int, seed: int, hidden: set[bytes]) -> Iterator[Sample]:
    """`count` samples, each from its own seed, and built anew where it shows a hidden image."""
    for index in range(count):
        tries = (build(_rng(seed, name, index, again)) for again in itertools.count())
        yield next(sample for sample in tries if hidden.isdisjoint(_images(sample)))


def _rng(seed: int, name: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *numbers])


def _images(sample: Sample) -> list[bytes]:
    return [image["bytes"] for image in sample["images"]]


def _write(path: Path, samples: Iterable[Sample]) -> int:
    return write_samples(path, ({**sample, "id": f"{path.stem}-{i}"} for i, sample in enumerate(samples)))
