"""Toy data of chosen sizes in a folder, drawn once, with held-out data of the same kinds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from solo_vlm.data.samples_file import write_samples
from solo_vlm.data.sources import all_rows
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file
from solo_vlm.utils.settings import Settings

from .files import write_toy_data

_KINDS = ("text", "stage1", "stage2", "stage3", "sft", "heldout_digits", "heldout_captions", "heldout_qa")
_AGAIN = ("text", "stage2")  # kinds of training data of which some can be held out


class ToySettings(Settings):
    """How many samples of each kind of toy data: one file each, none where there are 0.

    Attributes:
        text: texts.
        stage1: images with class names.
        stage2: images with captions.
        stage3: images with captions, questions and answers.
        sft: chats.
        heldout_digits: questions about handwritten digits that no training file has.
        heldout_captions: requests for captions of such images.
        heldout_qa: questions about such images.
        heldout_text: texts that are none of `text`.
        heldout_stage2: images with captions that are none of `stage2`.
        seed: of the draw; `heldout_text` and `heldout_stage2` have the next one.
    """

    text: NonNegativeInt = 0
    stage1: NonNegativeInt = 0
    stage2: NonNegativeInt = 0
    stage3: NonNegativeInt = 0
    sft: NonNegativeInt = 0
    heldout_digits: NonNegativeInt = 0
    heldout_captions: NonNegativeInt = 0
    heldout_qa: NonNegativeInt = 0
    heldout_text: NonNegativeInt = 0
    heldout_stage2: NonNegativeInt = 0
    seed: int = 0


def draw_toy_data(folder: Path, settings: ToySettings) -> None:
    """Write `folder/KIND.parquet` for each kind, unless that was done before.

    Raises:
        SoloError: what is there was drawn with other settings.
    """
    mark = folder / "toy.json"
    if mark.is_file():
        if ToySettings.parse(json.loads(mark.read_text()), origin=str(mark)) != settings:
            raise SoloError(f"{folder} holds other toy data: remove {folder.parent}, or choose another root")
        return
    _write(folder, settings.seed, settings.model_dump())
    for kind in _AGAIN:
        _hold_out(folder, kind, getattr(settings, f"heldout_{kind}"), settings.seed + 1)
    with new_file(mark) as partial:
        partial.write_text(settings.model_dump_json() + "\n")


def _write(folder: Path, seed: int, counts: dict[str, int]) -> None:
    write_toy_data(folder, seed, **{kind: counts.get(kind, 0) for kind in _KINDS})
    for kind in _KINDS:
        if not counts.get(kind):
            (folder / f"{kind}.parquet").unlink()


def _hold_out(folder: Path, kind: str, count: int, seed: int) -> None:
    if not count:
        return
    known = {_content(row) for row in all_rows(folder / f"{kind}.parquet")}
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        # Twice as many, as some will turn out to be known: short texts of a small vocabulary repeat.
        _write(Path(fresh), seed, {kind: 2 * count})
        new = [row for row in all_rows(Path(fresh) / f"{kind}.parquet") if _content(row) not in known]
    write_samples(folder / f"heldout_{kind}.parquet", new[:count])


def _content(row: dict[str, Any]) -> str:
    return repr((row["messages"], row["images"]))
