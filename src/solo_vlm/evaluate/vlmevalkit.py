"""Rows of VLMEvalKit's TSV files in the schema of the benchmark's data on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from solo_vlm.errors import SoloError
from solo_vlm.evaluate.benchmarks.seedbench import DIMENSIONS
from solo_vlm.evaluate.options import as_list, options_of, present

Row = dict[str, Any]


def hub_row(task: str, row: Mapping[str, Any]) -> Row:
    """A row, as the hub has it, of one that VLMEvalKit's file has; one that is so already stays as it is.

    Args:
        task: the benchmark's name on the command line.
        row: column names in lower case; options in a, b, ..., the right answer as a letter.
    """
    rest = {name: value for name, value in row.items() if name not in set(ascii_lowercase)}
    return {**rest, **_CONVERTERS[task](row)}


def _mmstar(row: Mapping[str, Any]) -> Row:
    if not present(row.get("a")) or "Options:" in row["question"]:
        return {}
    lettered = zip(ascii_uppercase, options_of(row), strict=False)
    options = ", ".join(f"{letter}: {text}" for letter, text in lettered)
    return {"question": f"{row['question']}\nOptions: {options}"}


def _mme(row: Mapping[str, Any]) -> Row:
    if "question_id" in row:
        return {}
    return {"question_id": f"{row['category']}/{PurePath(row['image_path']).name}"}


def _seedbench(row: Mapping[str, Any]) -> Row:
    if not present(row.get("a")):
        return {}
    lettered = zip(ascii_lowercase, options_of(row), strict=False)
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
    return {"options": options_of(row), "answer": str(_place(row))} if present(row.get("a")) else {}


def _scienceqa(row: Mapping[str, Any]) -> Row:
    if not present(row.get("a")):
        return {}
    return {"choices": options_of(row), "answer": _place(row), "hint": row.get("hint") or ""}


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


def _place(row: Mapping[str, Any]) -> int:
    return ascii_uppercase.index(str(row["answer"]).strip().upper())


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
