"""The options and the right answer of a multiple-choice row, in all forms in which they are published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from string import ascii_lowercase, ascii_uppercase
from typing import Any, TypeGuard

from solo_vlm.evaluate.extract import parse_literal, plain, same_text
from solo_vlm.evaluate.predictions import Prediction

_UNKNOWN = [""] * 5  # no benchmark here has more options


def options_of(row: Mapping[str, Any]) -> list[str]:
    """Texts of a row's options A, B, C, ...; empty texts where the row has none, so that letters still count.

    They stand in columns a, b, ... (VLMEvalKit), in `choice_a`, ... (SEED-Bench), in `options` or `choices`
    (a list, or text that spells one), or in the question, after "Options:" (MMStar).
    """
    for prefix in ("", "choice_"):
        lettered = list(takewhile(present, (row.get(prefix + letter) for letter in ascii_lowercase)))
        if len(lettered) > 1:
            return [str(option) for option in lettered]
    return _listed(row) or _in_question(str(row.get("question", ""))) or _UNKNOWN


def right_letter(prediction: Prediction, options: Sequence[str], answers_are_places: bool) -> str | None:
    """The letter of the right option, or None where the row's answer names no option.

    The answer (`answer` or `gt_answer`) is a letter, the text of an option, or, with `answers_are_places` and
    unless the options have columns of their own, the option's place counted from 0.

    Raises:
        SoloError: the row has no such column.
    """
    answer = str(prediction.column("answer", "gt_answer")).strip()
    letters = ascii_uppercase[: len(options)]
    if answers_are_places and "a" not in prediction.row and re.fullmatch(r"\d+(\.0)?", answer):
        place = int(float(answer))
        return letters[place] if place < len(letters) else None
    letter = answer.strip("().: ").upper()
    if len(letter) == 1 and letter in letters:
        return letter
    alike = [place for place, option in enumerate(options) if option and plain(option) == plain(answer)]
    return letters[alike[0]] if alike else None


def present(value: Any) -> TypeGuard[Any]:
    """Whether a cell of a table holds something: neither nothing, nor NaN, nor blank text."""
    return value is not None and value == value and (not isinstance(value, str) or value.strip() != "")


def as_list(value: Any) -> list[str]:
    """Options of a list, an object by letter, or text that spells one or marks them with A, B, ..."""
    if not present(value):
        return []
    if isinstance(value, str):
        lines = [line.strip() for line in value.splitlines() if line.strip()]
        value = parsed(value) or _marked(value) or lines
    return [str(option) for option in (value.values() if isinstance(value, Mapping) else value)]


def parsed(text: str) -> dict[str, Any] | list[Any] | None:
    """The object or list that a text spells as JSON or Python, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        value = parse_literal(text)
    return value if isinstance(value, dict | list) else None


def _listed(row: Mapping[str, Any]) -> list[str]:
    column = next((name for name in ("options", "choices") if present(row.get(name))), None)
    return as_list(row[column]) if column else []


def _in_question(question: str) -> list[str]:
    return _marked(re.split(r"\b(?:Options|Choices)\s*:", question)[-1])


def _marked(text: str) -> list[str]:
    """The texts behind "A:", "B:", ..., or "A.", or "(A)": in this order, and all with the same mark."""
    for mark in ":.)":
        places: list[re.Match[str]] = []
        for place in re.finditer(rf"(?:^|[\s,;(])([A-Z])\s*{re.escape(mark)}\s*", text):
            if place.group(1) == ascii_uppercase[len(places)]:
                places.append(place)
        if len(places) > 1:
            ends = [place.start() for place in places[1:]] + [len(text)]
            return [text[place.end() : end].strip(" \n,;(") for place, end in zip(places, ends, strict=True)]
    return []
