"""Judging multiple-choice answers, and accuracy by category."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from solo_vlm.evaluate.extract import read_choice
from solo_vlm.evaluate.options import options_of, right_letter
from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.score import Judgement, Part, question_units
from solo_vlm.evaluate.statistics import proportion_interval, score_of

Category = Callable[[Mapping[str, Any]], Sequence[str]]


def judge_choices(predictions: Sequence[Prediction]) -> list[Judgement]:
    """Judge answers to questions whose right answer is a letter or an option's text."""
    return [_judge(prediction, answers_are_places=False) for prediction in predictions]


def judge_listed_choices(predictions: Sequence[Prediction]) -> list[Judgement]:
    """As `judge_choices`, where a number as the right answer is a place in the list, counted from 0."""
    return [_judge(prediction, answers_are_places=True) for prediction in predictions]


def judgement(prediction: Prediction, reading: str | None, truth: str | None) -> Judgement:
    """What was read, compared with the truth; a row without a response or a truth is a bad one."""
    if prediction.response is None:
        return Judgement(prediction, None, truth, False, "no response")
    if truth is None:
        return Judgement(prediction, reading, None, False, "no usable right answer")
    return Judgement(prediction, reading, truth, reading == truth)


def by_column(
    group: str, column: str, sizes: Mapping[str, int] | None = None
) -> Callable[[Sequence[Judgement]], dict[str, Part]]:
    """A breakdown by what stands in a column.

    Args:
        group: what the categories are.
        column: its name; a row without it is in no category.
        sizes: rows of each category in the whole benchmark; gives the order, too.
    """

    def category(row: Mapping[str, Any]) -> list[str]:
        return [str(row[column])] if present(row.get(column)) else []

    return lambda judgements: by_category(judgements, group, category, sizes)


def by_category(
    judgements: Sequence[Judgement],
    group: str,
    categories: Category,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Part]:
    """Accuracy of each category; a row may have none or several."""
    sizes = sizes or {}
    found: dict[str, list[Judgement]] = {name: [] for name in sizes}
    for judged in judgements:
        for category in categories(judged.prediction.row):
            found.setdefault(category, []).append(judged)
    return {name: accuracy(members, group, sizes.get(name)) for name, members in found.items() if members}


def accuracy(judgements: Sequence[Judgement], group: str, expected_n: int | None = None) -> Part:
    """The accuracy of one category in per cent, with Wilson's interval."""
    units = question_units(judgements)
    return Part(score_of(units), len(units), proportion_interval(units), group, expected_n=expected_n)


def _judge(prediction: Prediction, answers_are_places: bool) -> Judgement:
    options = options_of(prediction.row)
    truth = right_letter(prediction, options, answers_are_places)
    return judgement(prediction, read_choice(prediction.response or "", options), truth)
