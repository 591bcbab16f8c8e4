"""Converter of questions with accepted answers and options, also as VLMEvalKit's tables have them."""

from __future__ import annotations

import re
from string import ascii_uppercase
from typing import Any

from solo_vlm.data.formats.converters import has_options, images_of, row_images
from solo_vlm.data.formats.rows import RawRow, SampleRow, conversation, field, list_field, parts, text
from solo_vlm.data.sample import IMAGE_PLACEHOLDER, SampleError
from solo_vlm.data.values import ImageSource

CATEGORIES = ("split", "category", "l2-category")
"""Columns by whose values scores are broken down."""

READS = ("question", "answer", "options", "metric", "image", "images", "id", "index", "hint", "image_path")
"""Columns that are read, besides `CATEGORIES` and options A, B, ..."""

# As in LLaVA-1.5's data.
_ASKS_FOR_LETTER = "Answer with the option's letter from the given choices directly."
_NUMBERED = re.compile(r"<image (\d{1,3})>")  # as in MMMU


def is_question(row: RawRow) -> bool:
    """Return whether the row is one of VLMEvalKit's tables, or has its options."""
    has_index = "index" in row and ("image" in row or "image_path" in row)
    return row.get("question") is not None and "answer" in row and (has_options(row) or has_index)


def questions(row: RawRow) -> SampleRow:
    """Build a conversation of a question and its first accepted answer; options are listed with letters.

    The answer of a question with options is a letter, or the text of one option. `hint` precedes the
    question; `<image 2>` in a text is the place of the second image. What an evaluation needs stays beside
    the conversation: `answers`, a list of texts; `options`; `metric`, "number" where the answer is one,
    unless the row names another; `categories`, the values of `CATEGORIES`.
    """
    given = field(row, "answer")
    values = given if isinstance(given, list) else [given]
    if not values or any(value is None or value != value for value in values):
        raise SampleError("no-answer", "the row has no answer")
    answers, options = [_text(value) for value in values], _options(row)
    is_number = not any(isinstance(value, str) for value in values)
    metric = row["metric"] if _is_filled(row.get("metric")) else None
    lines = [f"Hint: {_text(row['hint'])}"] if _is_filled(row.get("hint")) else []
    lines.append(_question(row))
    if options:
        answers = [_letter(answers, options)]
        listed = zip(ascii_uppercase, options, strict=False)
        lines += [*(f"{letter}. {option}".rstrip() for letter, option in listed), _ASKS_FOR_LETTER]
    asked, images = _placed("\n".join(lines), row_images(row) or images_of(row.get("image_path")))
    turns = [("user", parts(asked)), ("assistant", [text(answers[0])])]
    return {
        **conversation(turns, images, row.get("id", row.get("index"))),
        "answers": answers,
        "options": options,
        "metric": metric or ("choice" if options else "number" if is_number else None),
        "categories": {name: str(row[name]) for name in CATEGORIES if _is_filled(row.get(name))},
    }


def _question(row: RawRow) -> str:
    if not isinstance(question := field(row, "question"), str):
        raise SampleError("text", f"question is {type(question).__name__}, not text")
    if not question.strip():
        raise SampleError("text-empty", "the row has an empty question")
    return question.strip()


def _is_filled(value: Any) -> bool:
    return value is not None and value == value and (not isinstance(value, str) or bool(value.strip()))


def _text(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else str(text(value)["text"])


def _options(row: RawRow) -> list[str]:
    """Return the texts of a row's options in order of their letters; one that the row lacks is empty.

    Raises:
        SampleError: Options are in columns that are not read ("raw-schema"), or one is no text ("text").
    """
    if row.get("choices") and not row.get("options"):
        raise SampleError("raw-schema", "choices are not read: columns: {options: choices} reads them")
    listed = [_text(option) for option in list_field(row, "options")] if row.get("options") else []
    cells = [row.get(letter) for letter in ascii_uppercase] if has_options(row) else []
    lettered = [_text(cell) if _is_filled(cell) else "" for cell in cells]
    while lettered and not lettered[-1]:
        lettered.pop()
    if listed and lettered and listed != lettered:
        raise SampleError("raw-schema", "options and the columns A, B, ... differ: fill one of them")
    return listed or lettered


def _letter(answers: list[str], options: list[str]) -> str:
    """Return the letter of the option that an answer names."""
    letters = ascii_uppercase[: len(options)]
    if len(answers) == 1 and 1 < len(options) == len(letters):
        (answer,) = answers
        lettered = dict(zip(letters, options, strict=True))
        same = [letter for letter, option in lettered.items() if option == answer]
        if len(same) == 1 or (not same and lettered.get(answer)):
            return same[0] if same else answer
    raise SampleError(
        "no-answer", f"answer {answers} is not the letter or the text of one of the options {options}"
    )


def _placed(asked: str, images: list[ImageSource]) -> tuple[str, list[ImageSource]]:
    """Return a text with `<image>` for `<image 1>`, and the images in the order of these marks.

    Raises:
        SampleError: Only some of the images have a mark, or there are other marks ("image-count").
    """
    numbers = list(map(int, _NUMBERED.findall(asked)))
    if not numbers:
        return asked, images
    if {*numbers} != {*range(1, len(images) + 1)}:
        marks = ", ".join(f"<image {number}>" for number in sorted({*numbers}))
        raise SampleError("image-count", f"{marks} in the text, and {len(images)} images")
    return _NUMBERED.sub(IMAGE_PLACEHOLDER, asked), [images[number - 1] for number in numbers]
