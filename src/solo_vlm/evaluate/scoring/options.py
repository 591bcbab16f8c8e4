"""Options and reference of a multiple-choice row, in all published formats."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.scoring.extract import parse_literal, same_text, without_markup
from solo_vlm.utils.errors import SoloError

_UNKNOWN = [""] * 5  # no benchmark here has more options
_LETTERS = ascii_lowercase[:10]  # other single-letter columns are not options: VLMEvalKit's tables go to I
_LIST_COLUMNS = ("options", "choices")
_CHOICE_COLUMNS = tuple(f"choice_{letter}" for letter in _LETTERS)

_NUMPY_REPR = re.compile(r"array\((\[.*\])(?:,\s*dtype=[^()]*)?\)", re.DOTALL)
# A printed NumPy array: no commas, line breaks anywhere.
_NUMPY_ITEM = r"'(?:[^'\\]|\\.)*+'|\"(?:[^\"\\]|\\.)*+\"|[^\s,'\"\[\]]++"
_NUMPY_PRINT = re.compile(rf"\[\s*+(?:(?:{_NUMPY_ITEM})(?=[\s\]])\s*+)++\]")
_SET_APART = re.compile(r"[\n,;]\s*[(\[（【]?$")
_BARE_NAN = re.compile(r"(?<=[\[,\s])(?:nan|NaN|null|<NA>)(?=\s*[,\]])")


def options_of(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row's options A, B, C, ...; one without a text is empty and keeps its letter.

    They are read from columns a, b, ... (VLMEvalKit), from `choice_a`, ... (SEED-Bench), from `options` or
    `choices` (a list, or the text of one), or from the question, after "Options:" (MMStar). If the row has
    none, all are empty, so letters still count.

    Raises:
        SoloError: An option in a list is not a text, or a text lists no options.
    """
    after_options = re.split(r"\b(?:Options|Choices)\s*[:：]", str(row.get("question", "")))[-1]
    return options_in_columns(row) or _marked(after_options) or _UNKNOWN


def options_in_columns(row: Mapping[str, Any]) -> list[str]:
    """Return `options_of` a row from its columns only; empty if no column has options."""
    for columns in (_LETTERS, _CHOICE_COLUMNS):
        if sum(column in row for column in columns) > 1:
            texts = [_text(row.get(column)) for column in columns]
            # A column that this row lacks is not an option, even if the reference has its letter.
            last = max((place for place, column in enumerate(columns) if column in row), default=0)
            if options := _trimmed(texts[: last + 1], row):
                return options
    lists = (row[name] for name in _LIST_COLUMNS if present(row.get(name)))
    return next((_trimmed(_texts(options), row) for options in lists), [])


def with_option_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row for the prompt: options as lists of texts, "" for an empty one."""
    lists = {
        name: _trimmed(_texts(row[name]), row) for name in _LIST_COLUMNS if isinstance(row.get(name), list)
    }
    choices = {name: _text(row[name]) for name in _CHOICE_COLUMNS if name in row}
    return {**row, **lists, **choices}


def reference_letter(prediction: Prediction, options: Sequence[str], answers_are_indices: bool) -> str | None:
    """Return the letter of the correct option, or None if the row does not name exactly one.

    The reference (`answer` or `gt_answer`) is a letter, the text of an option, or, with `answers_are_indices`
    and unless the options have separate columns, the option's index from 0.

    Raises:
        SoloError: The row has no such column.
    """
    value = prediction.column("answer", "gt_answer")
    if not present(value):
        return None
    answer = without_markup(str(value)).strip()
    letters = ascii_uppercase[: len(options)]
    if answers_are_indices and not set("ab") & set(prediction.row) and re.fullmatch(r"\d+(\.0)?", answer):
        place = int(float(answer))
        return letters[place] if place < len(letters) else None
    letter = _single_letter(answer)
    if letter and letter in letters:
        return letter
    same = same_text(answer, options)
    return None if same is None else letters[same]


def as_list(value: Any) -> list[str]:
    """Return the texts of a list, of an object by letter, or of text in any of the formats of options.

    Raises:
        SoloError: An element is not a text.
    """
    return _trimmed(_texts(value), {}) if present(value) else []


def parsed(text: str) -> dict[str, Any] | list[Any] | None:
    """Return the object or list that a text contains as JSON, Python or NumPy, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _literal(text.strip())
    return list(value) if isinstance(value, tuple) else value if isinstance(value, dict | list) else None


def _literal(text: str) -> Any:
    if array := _NUMPY_REPR.fullmatch(text):
        text = array.group(1)
    if _NUMPY_PRINT.fullmatch(text):  # Python would join 'a' 'b' into 'ab'
        items = [match.group() for match in re.finditer(_NUMPY_ITEM, text[1:-1])]
        return None if "..." in items else [_numpy_item(item) for item in items]
    value = parse_literal(text)
    return parse_literal(_BARE_NAN.sub("None", text)) if value is None else value


def _numpy_item(item: str) -> Any:
    if item[0] in "'\"":
        return ast.literal_eval(item)
    return None if item in ("None", "nan") else item


def _texts(value: Any) -> list[str]:
    """Return the texts of options in order, including empty ones."""
    if isinstance(value, str):
        value = parsed(value) or _marked(value) or _lines(value)
    if isinstance(value, Mapping):
        return _by_label(value)
    if value and all(isinstance(option, Mapping) and {"label", "text"} <= set(option) for option in value):
        return _placed([(str(option["label"]), option["text"]) for option in value])
    return _unmarked([_text(option) for option in value])


def _lines(text: str) -> list[str]:
    """Return the options of a text with one per line; empty for an unreadable list.

    Raises:
        SoloError: The text is a single line or has empty lines, so its options are ambiguous.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    if lines[0][0] in "[{":
        return []
    if len(lines) < 2 or not all(lines):
        raise SoloError(
            f"the options {text[:80]!r} are not a list: write them as JSON, one per line, or in columns"
        )
    return lines


def _by_label(options: Mapping[Any, Any]) -> list[str]:
    """Return the texts of {"A": ..., "B": ...}, in any order, or of {"label": [...], "text": [...]}."""
    if set(options) == {"label", "text"} and all(isinstance(part, list) for part in options.values()):
        if len(options["label"]) != len(options["text"]):
            raise SoloError(f"options and labels differ in number: {str(options)[:80]}")
        pairs = zip(options["label"], options["text"], strict=True)
        return _placed([(str(label), text) for label, text in pairs])
    return _placed([(str(label), text) for label, text in options.items()])


def _placed(options: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the texts ordered by labels if all are letters or all are numbers, else in the given order."""
    letters = [_single_letter(label) for label, _ in options]
    if all(letters):
        places = [ascii_uppercase.index(str(letter)) for letter in letters]
    elif all(label.isdecimal() for label, _ in options):
        order = sorted(range(len(options)), key=lambda number: int(options[number][0]))
        places = [order.index(number) for number in range(len(options))]
    else:
        places = list(range(len(options)))
    texts = {place: _text(text) for place, (_, text) in zip(places, options, strict=True)}
    if len(texts) < len(options):
        raise SoloError(f"two options have the same label: {str(options)[:80]}")
    return [texts.get(place, "") for place in range(max(texts, default=-1) + 1)]


def _text(value: Any) -> str:
    if isinstance(value, list | Mapping):
        raise SoloError(f"an option must be a text, not {str(value)[:80]}")
    return str(value).strip() if present(value) else ""


def _unmarked(options: list[str]) -> list[str]:
    """Remove the letters of options if every text begins with its own: "A. dog"."""
    matches = [
        re.match(rf"\(?{letter}\s*[.):]\s*(?=\S|$)", option)
        for letter, option in zip(ascii_uppercase, options, strict=False)
        if option
    ]
    if len(matches) < 2 or not all(matches):
        return options
    return [re.sub(r"^\(?[A-Z]\s*[.):]\s*", "", option) for option in options]


def _trimmed(options: Sequence[str], row: Mapping[str, Any]) -> list[str]:
    """Return the options up to the last with a text or the correct one; empty if none has a text."""
    last = max((place for place, option in enumerate(options) if option), default=-1)
    return list(options[: max(last, _answer_place(row)) + 1]) if last >= 0 else []


def _answer_place(row: Mapping[str, Any]) -> int:
    """Return the index of the correct option if the row gives a letter or a number; else -1."""
    answer = str(row.get("answer", row.get("gt_answer"))).strip()
    if re.fullmatch(r"\d(\.0)?", answer):
        return int(answer[0])
    letter = _single_letter(answer)
    return ascii_uppercase.index(letter) if letter else -1


def _single_letter(text: str) -> str | None:
    letter = text.strip("()[].:*_ ").upper()
    return letter if len(letter) == 1 and letter in ascii_uppercase else None


def _marked(text: str) -> list[str]:
    """Return the texts after "A:", "B:", ..., or "A.", or "(A)": in this order, all with the same mark.

    A missing letter, as in "A: dog, C: cat", is an empty option.
    """
    for marks in (":：", ".．", ")）", r"\]】"):
        matches = list(re.finditer(rf"(?<![^\s,;(\[（【])([A-Z])\s*[{marks}]", text))
        places: dict[int, re.Match[str]] = {}
        wanted, start = 0, 0
        while match := _next(matches, wanted, start) or (places and _next(matches, wanted + 1, start, text)):
            place = ascii_uppercase.index(match.group(1))
            places[place], wanted, start = match, place + 1, match.end()
        if len(places) > 1:
            ends = [*(match.start() for match in places.values()), len(text)][1:]
            texts = {
                place: text[match.end() : end].strip(" \n,;([（【")
                for (place, match), end in zip(places.items(), ends, strict=True)
            }
            return [texts.get(place, "") for place in range(max(texts) + 1)]
    return []


def _next(
    matches: Sequence[re.Match[str]], wanted: int, start: int, text: str | None = None
) -> re.Match[str] | None:
    """Return the first mark of a letter after a position; with `text`, only after a comma or line break."""
    for match in matches:
        is_wanted = match.start() >= start and ascii_uppercase[wanted : wanted + 1] == match.group(1)
        if is_wanted and (text is None or _SET_APART.search(text, 0, match.start())):
            return match
    return None
