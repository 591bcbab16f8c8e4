"""What a benchmark is: where its data are, how large it is, how its answers are answer and summed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.score import Part, Score, ScoredAnswer, Unit, question_units
from solo_vlm.evaluate.statistics import proportion_interval, score_of
from solo_vlm.utils.errors import SoloError

Scorer = Callable[[Sequence[Prediction]], list[ScoredAnswer]]
Units = Callable[[Sequence[ScoredAnswer]], list[Unit]]
Breakdown = Callable[[Sequence[ScoredAnswer]], dict[str, Part]]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as the command line knows it.

    Attributes:
        name: on the command line.
        title: in print.
        harness_task: what lmms-eval calls it.
        hub_id: the data on the hub, under the name that lmms-eval 0.7.3 uses.
        hub_config: the data set's configuration, where it has several.
        hub_files: pattern of the files there that hold the split.
        split: the split that is scored.
        licence: as the data's card states it; "(unchecked)" where the card was not at hand.
        kind: the form of the questions.
        size: rows of the whole benchmark.
        size_source: who says so.
        metric: how the score is computed.
        source: the paper or script that computes it so.
        judge: reads answers and compares them with the truth.
        breakdown: the score of each category.
        belongs: whether a row is part of the score; others are counted as set aside.
        units: what the score is the mean of; see `Unit`.
        interval: a 95% interval of the score from its units.
        raw: other figures for the same answers.
        maximum: the score of a perfect model.
        note: what else a user should know.
    """

    name: str
    title: str
    harness_task: str
    hub_id: str
    hub_files: str
    split: str
    licence: str
    kind: Literal["multiple choice", "yes or no", "free"]
    size: int
    size_source: str
    metric: str
    source: str
    scorer: Scorer
    breakdown: Breakdown
    hub_config: str | None = None
    belongs: Callable[[Mapping[str, Any]], bool] = lambda row: True
    units: Units = question_units
    interval: Callable[[Sequence[Unit]], tuple[float, float]] = proportion_interval
    raw: Callable[[Sequence[ScoredAnswer]], dict[str, float]] = lambda answers: {}
    maximum: float = 100.0
    note: str = ""

    def score(self, predictions: Sequence[Prediction]) -> Score:
        """The score of predictions.

        Raises:
            SoloError: there are none, two have the same id, or a column is missing.
        """
        return self.summarise(self.scorer(predictions))

    def summarise(self, answers: Sequence[ScoredAnswer]) -> Score:
        """The score of answers that are answer already.

        Raises:
            SoloError: there are none, or two have the same id.
        """
        scored = self.counted(answers)
        units = self.units(scored)
        return Score(
            task=self.name,
            title=self.title,
            score=score_of(units),
            interval=self.interval(units),
            n=len(scored),
            expected_n=self.size,
            metric=self.metric,
            source=self.source,
            breakdown=self.breakdown(answers),
            raw=self.raw(answers),
            unreadable=sum(answer.extracted is None and not answer.problem for answer in scored),
            bad_rows=tuple(answer.prediction.id for answer in scored if answer.problem),
            filtered=len(answers) - len(scored),
            maximum=self.maximum,
        )

    def counted(self, answers: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
        """The answers that belong to the score.

        Raises:
            SoloError: there are none, or two have the same id.
        """
        _check_ids(answers)
        scored = [answer for answer in answers if self.belongs(answer.prediction.row)]
        if not scored:
            raise SoloError(f"{self.name}: no rows to score among {len(answers)}")
        return scored


def _check_ids(answers: Sequence[ScoredAnswer]) -> None:
    seen = set()
    for answer in answers:
        if answer.prediction.id in seen:
            raise SoloError(f"two predictions have the id {answer.prediction.id}")
        seen.add(answer.prediction.id)
