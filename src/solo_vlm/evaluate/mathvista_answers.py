"""MathVista's answers: an option's text, an integer, a number with so many decimals, or a list."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Self

from solo_vlm.evaluate.extract import read_choice, read_list, same_text
from solo_vlm.evaluate.numbers import as_number, read_number
from solo_vlm.evaluate.options import as_list
from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.response_text import clean, plain
from solo_vlm.utils.errors import SoloError

_QUESTION_TYPES = ("multi_choice", "free_form")
_ANSWER_TYPES = ("text", "integer", "float", "list")


@dataclass(frozen=True)
class Problem:
    """What the right answer of a question looks like.

    Attributes:
        choices: texts of the options; none for a free question.
        answer_type: "text", "integer", "float" or "list".
        precision: decimals of a float; None where the row does not say.
    """

    choices: list[str]
    answer_type: str
    precision: int | None

    @classmethod
    def of(cls, prediction: Prediction) -> Self:
        """The problem of a row.

        Raises:
            SoloError: a column is missing, or holds what MathVista has not.
        """
        multiple_choice = _one_of(prediction, "question_type", _QUESTION_TYPES) == "multi_choice"
        answer_type = _one_of(prediction, "answer_type", _ANSWER_TYPES)
        # The hub stores the precision as a float: 1.0 for one decimal.
        precision = prediction.column("precision") if answer_type == "float" else None
        choices = as_list(prediction.column("choices")) if multiple_choice else []
        if multiple_choice and not choices:
            raise SoloError(f"row {prediction.id} is multiple choice, but its column choices has no options")
        return cls(
            choices,
            answer_type,
            _whole_number(precision),
        )

    def read(self, response: str) -> str | None:
        """What a response says, by rules alone: nothing is guessed.

        An option's letter or its exact text; the declared number, else the last one; the last list.
        """
        if self.choices:
            letter = read_choice(response, self.choices, anywhere=False)
            return self.choices[ascii_uppercase.index(letter)] if letter else None
        if self.answer_type in ("integer", "float"):
            return self.normalise(read_number(response))
        return read_list(response) if self.answer_type == "list" else self.normalise(clean(response))

    def read_extraction(self, extraction: str) -> str | None:
        """What an answer says that a language model extracted: as MathVista's calculate_score.py.

        The nearest option (edit distance) stands for one that is not spelled exactly.
        """
        extraction = clean(extraction)
        if not extraction:
            return None
        if self.choices:
            return self.read(extraction) or self._nearest_choice(extraction)
        return self.normalise(extraction) or self.read(extraction)

    def normalise(self, answer: Any) -> str | None:
        """An answer in the spelling in which answers are compared, or None where it is not of the type."""
        if not present(answer):
            return None
        text = str(answer).strip()
        if self.choices:
            if text in self.choices:  # maybe twice, but it is compared as text
                return text
            place = same_text(text, self.choices)
            return None if place is None else self.choices[place]
        if self.answer_type in ("integer", "float"):
            number = as_number(text)
            if number is None or (self.answer_type == "float" and self.precision is None):
                return None
            # Adding zero turns -0.0 into 0.0.
            return str(int(number) if self.answer_type == "integer" else round(number, self.precision) + 0.0)
        if self.answer_type == "list":
            return read_list(text) if text.startswith("[") and text.endswith("]") else None
        return plain(text)

    def _nearest_choice(self, extraction: str) -> str:
        from Levenshtein import distance

        return min(filter(None, self.choices), key=lambda choice: distance(extraction, choice))


def _one_of(prediction: Prediction, column: str, known: tuple[str, ...]) -> str:
    value = str(prediction.column(column)).strip().lower()
    if value not in known:
        raise SoloError(f"row {prediction.id}: {column} is {value!r}, none of {', '.join(known)}")
    return value


def _whole_number(value: Any) -> int | None:
    try:
        return int(float(value)) if present(value) else None
    except (TypeError, ValueError):
        return None
