"""Parquet files of the toy data: one per stage and three held out, or any number of samples per kind."""

from __future__ import annotations

import itertools
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt

from solo_vlm.data.sources import all_rows
from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import write_text
from solo_vlm.utils.settings import Settings

from .samples import (
    Build,
    Sample,
    grid_sample,
    held_out_caption_sample,
    held_out_digit_sample,
    held_out_grid_sample,
    held_out_question_sample,
    instruction_sample,
    stage1_sample,
    stage2_sample,
    stage3_sample,
    text_sample,
)
from .scenes import HELD_OUT_DIGITS

_HELD_OUT_SEED = 2024


def write_toy_data(
    out_dir: Path,
    seed: int = 0,
    *,
    text: int = 6_000,
    stage1: int = 14_000,
    stage2: int = 8_000,
    stage3: int = 8_000,
    sft: int = 6_000,
    grids: int = 0,
    heldout_digits: int = HELD_OUT_DIGITS,
    heldout_captions: int = 200,
    heldout_qa: int = 300,
    heldout_grids: int = 0,
) -> dict[str, int]:
    """Write the toy data as `out_dir`/NAME.parquet; return the number of rows by name. 0 writes no file.

    The same seed and sizes give the same bytes. The held-out files are the same for every seed, and none of
    their images is in a training file.
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
        "heldout_grids": [
            held_out_grid_sample(i, _rng(_HELD_OUT_SEED, "heldout_grids", i)) for i in range(heldout_grids)
        ],
    }
    held_out_images = {image for samples in held_out.values() for s in samples for image in _images(s)}
    training: dict[str, tuple[Build, int]] = {
        "text": (text_sample, text),
        "stage1": (stage1_sample, stage1),
        "stage2": (stage2_sample, stage2),
        "stage3": (stage3_sample, stage3),
        "sft": (instruction_sample, sft),
        "grids": (grid_sample, grids),
    }
    rows = {}
    for name, (build, count) in training.items():
        if count:
            samples = _training_samples(name, build, count, seed, held_out_images)
            rows[name] = _write(out_dir / f"{name}.parquet", samples)
    for name, kept in held_out.items():
        if kept:
            rows[name] = _write(out_dir / f"{name}.parquet", kept)
    return rows


def _training_samples(
    name: str, build: Build, count: int, seed: int, held_out_images: set[bytes]
) -> Iterator[Sample]:
    """Yield `count` samples, each from its own seed; one with a held-out image is built again."""
    for index in range(count):
        tries = (build(_rng(seed, name, index, again)) for again in itertools.count())
        yield next(sample for sample in tries if held_out_images.isdisjoint(_images(sample)))


def _rng(seed: int, name: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *numbers])


def _images(sample: Sample) -> list[bytes]:
    return [image["bytes"] for image in sample["images"]]


def _write(path: Path, samples: Iterable[Sample]) -> int:
    return write_samples(path, ({**sample, "id": f"{path.stem}-{i}"} for i, sample in enumerate(samples)))


_KINDS = (
    *("text", "stage1", "stage2", "stage3", "sft", "grids"),
    *("heldout_digits", "heldout_captions", "heldout_qa", "heldout_grids"),
)
_WITH_HELD_OUT = ("text", "stage2")  # kinds of training data with a held-out split


class ToySettings(Settings):
    """Number of samples per kind of toy data; 0 writes no file.

    Attributes:
        text: Number of texts.
        stage1: Number of images with class names.
        stage2: Number of images with captions.
        stage3: Number of images with captions, questions and answers.
        sft: Number of chats.
        grids: Number of single shapes with their names, and chats about grids of shapes, half and half;
            their questions need rows and columns.
        heldout_digits: Number of questions about held-out handwritten digits.
        heldout_captions: Number of caption requests for held-out images.
        heldout_qa: Number of questions about held-out images.
        heldout_grids: Number of questions about held-out grids.
        heldout_text: Number of texts that differ from those of `text`.
        heldout_stage2: Number of images with captions that differ from those of `stage2`.
        seed: Seed of the samples. `heldout_text` and `heldout_stage2` use the next one.
    """

    text: NonNegativeInt = 0
    stage1: NonNegativeInt = 0
    stage2: NonNegativeInt = 0
    stage3: NonNegativeInt = 0
    sft: NonNegativeInt = 0
    grids: NonNegativeInt = 0
    heldout_digits: NonNegativeInt = 0
    heldout_captions: NonNegativeInt = 0
    heldout_qa: NonNegativeInt = 0
    heldout_grids: NonNegativeInt = 0
    heldout_text: NonNegativeInt = 0
    heldout_stage2: NonNegativeInt = 0
    seed: int = 0


def draw_toy_data(folder: Path, settings: ToySettings) -> None:
    """Write `folder/KIND.parquet` for each kind, unless the folder is already complete.

    Raises:
        SoloError: The folder contains toy data with other settings.
    """
    mark = folder / "toy.json"
    if mark.is_file():
        if ToySettings.parse(json.loads(mark.read_text()), origin=str(mark)) != settings:
            raise SoloError(f"{folder} holds other toy data: remove {folder.parent}, or choose another root")
        return
    _write_kinds(folder, settings.seed, settings.model_dump())
    for kind in _WITH_HELD_OUT:
        _hold_out(folder, kind, getattr(settings, f"heldout_{kind}"), settings.seed + 1)
    write_text(mark, settings.model_dump_json() + "\n")


def _write_kinds(folder: Path, seed: int, counts: dict[str, int]) -> None:
    write_toy_data(folder, seed, **{kind: counts.get(kind, 0) for kind in _KINDS})


def _hold_out(folder: Path, kind: str, count: int, seed: int) -> None:
    if not count:
        return
    known = {_content(row) for row in all_rows(folder / f"{kind}.parquet")}
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        # Generate a surplus: short texts with a small vocabulary repeat those in `known`.
        _write_kinds(Path(fresh), seed, {kind: 2 * count})
        new = [row for row in all_rows(Path(fresh) / f"{kind}.parquet") if _content(row) not in known]
    write_samples(folder / f"heldout_{kind}.parquet", new[:count])


def _content(row: dict[str, Any]) -> str:
    return repr((row["messages"], row["images"]))
