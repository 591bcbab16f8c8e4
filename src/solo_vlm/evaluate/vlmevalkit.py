"""Rows of VLMEvalKit's TSV files in the schema of the benchmark's data on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import PurePath
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from solo_vlm.evaluate.benchmarks.seedbench import DIMENSIONS
from solo_vlm.evaluate.options import as_list, options_in_columns, reference_letter
from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.utils.errors import SoloError

Row = dict[str, Any]
_SEED_OPTIONS = 4


def hub_row(task: str, row: Mapping[str, Any]) -> Row:
    """A row, as the hub has it, of one that VLMEvalKit's file has; one that is so already stays as it is.

    Args:
        task: the benchmark's name on the command line.
        row: column names in lower case; options in a, b, ..., the right answer as a letter.
    """
    rest = {name: value for name, value in row.items() if name not in set(ascii_lowercase)}
    return {**rest, **_CONVERTERS[task](row)}


def _mmstar(row: Mapping[str, Any]) -> Row:
    options = options_in_columns(row)
    if not options or "Options:" in row["question"]:
        return {}
    lettered = zip(ascii_uppercase, options, strict=False)
    text = ", ".join(f"{letter}: {option}" for letter, option in lettered)
    return {"question": f"{row['question']}\nOptions: {text}"}


def _mme(row: Mapping[str, Any]) -> Row:
    if "question_id" in row:
        return {}
    return {"question_id": f"{row['category']}/{PurePath(row['image_path']).name}"}


def _seedbench(row: Mapping[str, Any]) -> Row:
    if "choice_a" in row:
        return {}
    options = options_in_columns(row)
    if len(options) > _SEED_OPTIONS:
        raise SoloError(f"row {_name(row)}: SEED-Bench asks with {_SEED_OPTIONS} options, not {len(options)}")
    lettered = zip_longest(ascii_lowercase[:_SEED_OPTIONS], options, fillvalue="")
    dimension = next((number for number, name in DIMENSIONS.items() if name == row["category"].lower()), None)
    if dimension is None:
        raise SoloError(f"SEED-Bench has no dimension {row['category']}: {', '.join(DIMENSIONS.values())}")
    return {
        **{f"choice_{letter}": text for letter, text in lettered},
        "data_type": "image" if dimension <= 9 else "video",
        "question_type_id": dimension,
        "question_id": str(row["index"]),
        "image": [row["image"]],
    }


def _ai2d(row: Mapping[str, Any]) -> Row:
    options, place = _listed(row)
    return {"options": options, "answer": str(place)}


def _scienceqa(row: Mapping[str, Any]) -> Row:
    options, place = _listed(row)
    return {"choices": options, "answer": place, "hint": row.get("hint") or ""}


def _mathvista(row: Mapping[str, Any]) -> Row:
    if "metadata" in row:
        return {}
    precision, choices = row.get("precision"), row.get("choices")
    return {
        "pid": str(row.get("pid", row["index"])),
        "choices": as_list(choices) or None,
        "precision": float(precision) if present(precision) else None,
        "unit": row.get("unit") or None,
        "decoded_image": row["image"],
        "image": f"images/{row['index']}.jpg",
        "query": row.get("query") or row["question"],
        "metadata": {"task": row.get("task"), "skills": as_list(row.get("skills"))},
    }


def _listed(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """Options, and the place of the right one."""
    options = options_in_columns(row)
    if not options:
        raise SoloError(f"row {_name(row)} has no options; its columns are: {', '.join(row)}")
    letter = reference_letter(Prediction(_name(row), None, row), options, answers_are_places=True)
    if letter is None:
        raise SoloError(
            f"row {_name(row)}: the answer {row.get('answer')!r} is none of its options {options}"
        )
    return options, ascii_uppercase.index(letter)


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("index", row.get("question", "?")))


_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "mmstar": _mmstar,
    "mme": _mme,
    "seedbench": _seedbench,
    "ai2d": _ai2d,
    "ai2d_no_mask": _ai2d,
    "scienceqa": _scienceqa,
    "scienceqa_full": _scienceqa,
    "mathvista": _mathvista,
}
