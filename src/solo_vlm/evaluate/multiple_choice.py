"""Judging multiple-choice answers, and accuracy by category."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from solo_vlm.evaluate.extract import read_choice
from solo_vlm.evaluate.options import options_of, reference_letter
from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.score import Part, ScoredAnswer, question_units
from solo_vlm.evaluate.statistics import proportion_interval, score_of

Category = Callable[[Mapping[str, Any]], Sequence[str]]


def score_choices(predictions: Sequence[Prediction]) -> list[ScoredAnswer]:
    """Judge answers to questions whose right answer is a letter or an option's text."""
    return [_score(prediction, answers_are_places=False) for prediction in predictions]


def score_listed_choices(predictions: Sequence[Prediction]) -> list[ScoredAnswer]:
    """As `score_choices`, where a number as the right answer is a place in the list, counted from 0."""
    return [_score(prediction, answers_are_places=True) for prediction in predictions]


def score_answer(prediction: Prediction, extracted: str | None, reference: str | None) -> ScoredAnswer:
    """What was read, compared with the truth; a row without a response or a reference is a bad one."""
    if prediction.response is None:
        return ScoredAnswer(prediction, None, reference, False, "no response")
    if reference is None:
        return ScoredAnswer(prediction, extracted, None, False, "no usable right answer")
    return ScoredAnswer(prediction, extracted, reference, extracted == reference)


def by_column(
    group: str, column: str, sizes: Mapping[str, int] | None = None
) -> Callable[[Sequence[ScoredAnswer]], dict[str, Part]]:
    """A breakdown by what stands in a column.

    Args:
        group: what the categories are.
        column: its name; a row without it is in no category.
        sizes: rows of each category in the whole benchmark; gives the order, too.
    """

    def category(row: Mapping[str, Any]) -> list[str]:
        return [str(row[column])] if present(row.get(column)) else []

    return lambda answers: by_category(answers, group, category, sizes)


def by_category(
    answers: Sequence[ScoredAnswer],
    group: str,
    categories: Category,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Part]:
    """Accuracy of each category; a row may have none or several."""
    sizes = sizes or {}
    found: dict[str, list[ScoredAnswer]] = {name: [] for name in sizes}
    for answer in answers:
        for category in categories(answer.prediction.row):
            found.setdefault(category, []).append(answer)
    return {name: accuracy(members, group, sizes.get(name)) for name, members in found.items() if members}


def accuracy(answers: Sequence[ScoredAnswer], group: str, expected_n: int | None = None) -> Part:
    """The accuracy of one category in per cent, with Wilson's interval."""
    units = question_units(answers)
    return Part(score_of(units), len(units), proportion_interval(units), group, expected_n=expected_n)


def _score(prediction: Prediction, answers_are_places: bool) -> ScoredAnswer:
    options = options_of(prediction.row)
    reference = reference_letter(prediction, options, answers_are_places)
    return score_answer(prediction, read_choice(prediction.response or "", options), reference)
