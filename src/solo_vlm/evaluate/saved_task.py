"""Saved answers to a task, question by question: a benchmark, a file of questions, a task of lmms-eval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.predictions import ROW_VALUES, Prediction, load_predictions
from solo_vlm.evaluate.questions import Answer, saved_question, score_answers
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.evaluate.scoring.score import (
    Score,
    ScoredAnswer,
    Unit,
    Units,
    interval_of_mean,
    question_units,
    score_of,
)
from solo_vlm.utils.errors import SoloError


class UnscoredRowsError(SoloError):
    """The score of a task does not follow from values of its questions."""


@dataclass(frozen=True)
class SavedTask:
    """Scored answers to a task.

    Attributes:
        title: Name of the task in print.
        answers: Answers that are part of the score.
        units: Function that returns their units.
        asked: Function that returns what two answers to the same question have in common.
        maximum: Score of a perfect model; None if it is unknown, as for lmms-eval's metrics.
    """

    title: str
    answers: list[ScoredAnswer]
    units: Units = question_units
    asked: Callable[[Prediction], object] = lambda prediction: prediction.row
    maximum: float | None = 100.0


def load_task(folder: RunFolder, task: str) -> SavedTask:
    """Score the saved answers of a run to a task.

    Raises:
        UnscoredRowsError: lmms-eval computes the score from all answers at once.
        SoloError: The answers cannot be read, or are of no known task.
    """
    predictions = folder.read_predictions(task)
    if _is_scored_by_harness(predictions):
        answers, score = _harness_answers(folder, task, predictions)
        return SavedTask(score.title, answers, _value_units, _without_values, score.maximum)
    if _is_of_questions(predictions):
        return SavedTask(task, [_scored(each) for each in predictions])
    if task in BENCHMARKS:
        benchmark = get(task)
        answers = benchmark.filter(benchmark.scorer(predictions))
        return SavedTask(benchmark.title, answers, benchmark.units, _question, benchmark.maximum)
    raise SoloError(
        f"{folder.predictions_file(task)} answers no benchmark, file of questions or task of lmms-eval"
    )


def rescore(task: str, path: Path) -> Score:
    """Score a file of predictions; those of a benchmark may be in any format that `load_predictions` reads.

    Raises:
        SoloError: The predictions cannot be read, or do not have what the score needs.
    """
    predictions = load_predictions(path)
    if _is_scored_by_harness(predictions):
        answers, stored = _harness_answers(RunFolder(path.parent.parent), task, predictions)
        values = [answer.credit for answer in answers]
        mean, interval = score_of(_value_units(answers)), interval_of_mean(values)
        return replace(stored, score=mean, interval=interval, n=len(values), breakdown={})
    if _is_of_questions(predictions):
        return score_answers(task, str(path), [_answer(each) for each in predictions], len(predictions))
    return get(task).score(predictions)


def harness_answers(predictions: Sequence[Prediction], metric: str) -> list[ScoredAnswer]:
    """Return scored answers with lmms-eval's value of each row; none if a row has no number as the metric."""
    values = [prediction.row.get(ROW_VALUES, {}).get(metric) for prediction in predictions]
    if any(value is None for value in values):
        return []
    return [
        ScoredAnswer(
            prediction,
            prediction.response,
            str(prediction.row.get("answer", prediction.row.get("answers"))),
            float(value),
            None if prediction.response is not None else "no response",
        )
        for prediction, value in zip(predictions, values, strict=True)
    ]


def _harness_answers(
    folder: RunFolder, task: str, predictions: Sequence[Prediction]
) -> tuple[list[ScoredAnswer], Score]:
    """Return answers with lmms-eval's values, whose mean is the run's score, and that score.

    Raises:
        UnscoredRowsError: There are no such values.
    """
    score = next((score for score in folder.read_scores() if score.task == task), None)
    if score is None:
        raise SoloError(f"{folder.path / 'scores.json'} has no score of {task}: run solo eval run again")
    metric = next(iter(score.breakdown))
    answers = harness_answers(predictions, metric)
    if not answers or not math.isclose(score_of(_value_units(answers)), score.score, rel_tol=1e-6):
        raise UnscoredRowsError(
            f"{task}: lmms-eval's {metric} is no mean of one value per question, so answers cannot be scored "
            "or compared one by one: see the scores of solo eval run"
        )
    return answers, score


def _is_scored_by_harness(predictions: Sequence[Prediction]) -> bool:
    return bool(predictions) and ROW_VALUES in predictions[0].row


def _is_of_questions(predictions: Sequence[Prediction]) -> bool:
    return bool(predictions) and predictions[0].row.keys() == {"question", "answer", "options", "metric"}


def _answer(prediction: Prediction) -> Answer:
    return Answer.of(saved_question(prediction), prediction.response)


def _scored(prediction: Prediction) -> ScoredAnswer:
    answer = _answer(prediction)
    return ScoredAnswer.of(prediction, answer.extracted, answer.question.expected, answer.credit)


def _value_units(answers: Sequence[ScoredAnswer]) -> list[Unit]:
    """Return a unit per question, in the units of lmms-eval."""
    return [Unit(answer.prediction.id, answer.credit) for answer in answers]


def _without_values(prediction: Prediction) -> object:
    return {name: value for name, value in prediction.row.items() if name != ROW_VALUES}


def _question(prediction: Prediction) -> object:
    return prediction.row.get("question")
