"""Scored answers, and the score of a benchmark with its categories and 95% intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.utils.errors import SoloError

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class ScoredAnswer:
    """Response, compared with the reference.

    Attributes:
        prediction: The response and its row.
        extracted: Answer extracted from the response (a letter, yes or no, a value); None if unreadable.
        reference: Correct answer in the same form.
        credit: Share of a correct answer, from 0 to 1; between them only for soft metrics.
        problem: Reason why the row cannot be scored: no response, or no usable reference.
    """

    prediction: Prediction
    extracted: str | None
    reference: str | None
    credit: float
    problem: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the answer has full credit."""
        return self.credit == 1

    @classmethod
    def of(
        cls, prediction: Prediction, extracted: str | None, reference: str | None, credit: float | None = None
    ) -> Self:
        """Compare an extracted answer with the reference; a row without a response or reference is bad.

        `credit` is that of a scorable row; default: 1 if the two are equal, else 0.
        """
        if prediction.response is None:
            return cls(prediction, None, reference, 0.0, "no response")
        if reference is None:
            return cls(prediction, extracted, None, 0.0, "no usable reference")
        return cls(
            prediction, extracted, reference, float(extracted == reference) if credit is None else credit
        )


@dataclass(frozen=True)
class Unit:
    """Sampling unit of a benchmark: a question, or an image with its questions.

    A score is the sum over strata of the mean value of the stratum's units.
    """

    id: str
    value: float
    stratum: str = ""


@dataclass(frozen=True)
class Part:
    """Score of one category.

    Attributes:
        score: Value between 0 and `maximum`.
        n: Number of rows.
        interval: 95% interval (low, high); None if there is no way to compute it.
        group: Kind of the category ("subtask", "skill", ...).
        maximum: Score of a perfect model; None if it is unknown, as for lmms-eval's own metrics.
        expected_n: Rows of the category in the whole benchmark, if published.
        more: Further metrics of the category, such as MME's acc and acc+.
    """

    score: float
    n: int
    interval: tuple[float, float] | None
    group: str
    maximum: float | None = 100.0
    expected_n: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """Score of a model on one task.

    Attributes:
        task: Name of the benchmark on the command line.
        title: Name of the benchmark in print.
        score: Value between 0 and `maximum`, in percent unless `metric` specifies otherwise.
        interval: 95% interval (low, high) under resampling of the questions; None as for `Part`.
        n: Number of scored rows.
        expected_n: Rows of the whole benchmark.
        metric: Definition of the score.
        source: Paper or script that defines the metric.
        raw: Further metrics of the same answers by name, such as lmms-eval's own.
        unreadable: Number of responses without an extractable answer; they count as wrong.
        bad_rows: IDs of rows that failed or cannot be scored; they count as wrong.
        filtered: Number of rows that are not part of the score (video questions in an image score).
        maximum: Score of a perfect model; None as for `Part`.
    """

    task: str
    title: str
    score: float
    interval: tuple[float, float] | None
    n: int
    expected_n: int
    metric: str
    source: str
    breakdown: Mapping[str, Part] = field(default_factory=dict)
    raw: Mapping[str, float] = field(default_factory=dict)
    unreadable: int = 0
    bad_rows: tuple[str, ...] = ()
    filtered: int = 0
    maximum: float | None = 100.0

    @property
    def partial(self) -> bool:
        """Whether the scored rows are not exactly the whole benchmark."""
        return self.n != self.expected_n

    @property
    def name(self) -> str:
        """Title, marked where the score is partial."""
        return f"{self.title} (partial: {self.n:,} of {self.expected_n:,})" if self.partial else self.title

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `bad_rows` is the number of bad rows, `bad_ids` lists them."""
        values = asdict(self)
        bad_ids = list(values.pop("bad_rows"))
        derived = {"name": self.name, "partial": self.partial, "bad_rows": len(bad_ids), "bad_ids": bad_ids}
        return {**values, **derived}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `as_dict`."""
        values = {key: value for key, value in values.items() if key not in ("name", "partial")}
        values["bad_rows"] = tuple(values.pop("bad_ids"))
        values["interval"] = _pair(values["interval"])
        values["breakdown"] = {
            name: Part(**{**part, "interval": _pair(part["interval"])})
            for name, part in values["breakdown"].items()
        }
        return cls(**values)


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def points(part: Score | Part) -> str:
    """Return the score in print, see `digits`."""
    return digits(part.score, part.maximum)


def span(part: Score | Part) -> str:
    """Return the interval in print; empty if there is none."""
    return " to ".join(digits(value, part.maximum) for value in part.interval or ())


def digits(value: float, maximum: float | None, sign: Literal["", "+"] = "") -> str:
    """Return a score or a difference in print: one decimal, or four digits of a metric in unknown units."""
    return f"{value:{sign},.4g}" if maximum is None else f"{value:{sign},.1f}"


Category = Callable[[Mapping[str, Any]], Sequence[str]]
Scorer = Callable[[Sequence[Prediction]], list[ScoredAnswer]]
Units = Callable[[Sequence[ScoredAnswer]], list[Unit]]
Breakdown = Callable[[Sequence[ScoredAnswer]], dict[str, Part]]


def question_units(answers: Sequence[ScoredAnswer]) -> list[Unit]:
    """Return one unit per question: its credit in percent. Their mean is the accuracy."""
    return [Unit(answer.prediction.id, 100.0 * answer.credit) for answer in answers]


def group_units(key: Callable[[Mapping[str, Any]], str]) -> Units:
    """Return a function that returns one unit per group of rows: 100 if all are correct, else 0."""

    def units(answers: Sequence[ScoredAnswer]) -> list[Unit]:
        groups: dict[str, bool] = {}
        for answer in answers:
            name = key(answer.prediction.row)
            groups[name] = groups.get(name, True) and answer.correct
        return [Unit(name, 100.0 * correct) for name, correct in groups.items()]

    return units


def score_of(units: Sequence[Unit]) -> float:
    """Return the sum over strata of the mean of each stratum's units."""
    return float(sum(np.mean(values) for values in _strata(units)))


def mean_interval(units: Sequence[Unit]) -> tuple[float, float]:
    """Return the 95% interval of a mean in percent: Wilson's if all units are 0 or 100, else by bootstrap."""
    from scipy.stats import binomtest

    if not all(unit.value in (0, 100) for unit in units):
        return bootstrap_interval(units)
    correct = sum(unit.value > 0 for unit in units)
    interval = binomtest(correct, len(units)).proportion_ci(method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean of some values, Wilson's if all of them are 0 or 1."""
    low, high = mean_interval([Unit(str(number), 100 * value) for number, value in enumerate(values)])
    return low / 100, high / 100


def bootstrap_interval(units: Sequence[Unit]) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a score; zero width if all units of a stratum agree."""
    return _percentiles(_bootstrap(units))


def paired_difference(
    units: Sequence[Unit], others: Sequence[Unit]
) -> tuple[float, tuple[float, float], float]:
    """Compare two runs by paired bootstrap over the same units in the same order.

    Returns:
        The second score minus the first; its 95% interval; the two-sided p-value of no difference: twice the
        fraction of resampled differences on the other side of zero (Efron and Tibshirani 1993, section
        15.4), at least 2/10,001.
    """
    differences = [
        Unit(unit.id, other.value - unit.value, unit.stratum)
        for unit, other in zip(units, others, strict=True)
    ]
    resampled = _bootstrap(differences).round(9)  # sums of strata that cancel are zero
    tails = [np.sum(resampled <= 0), np.sum(resampled >= 0)]
    p_value = min(1.0, 2 * (min(tails) + 1) / (_RESAMPLES + 1))
    return score_of(differences), _percentiles(resampled), float(p_value)


def _bootstrap(units: Sequence[Unit]) -> NDArray[np.float64]:
    """Return (10,000,) scores of seeded resamples of the units within their strata.

    Units of equal value are interchangeable, so a resample is a multinomial draw of the count of each value:
    scipy.stats.bootstrap would draw every unit.
    """
    rng = np.random.default_rng(_SEED)
    scores = np.zeros(_RESAMPLES)
    for values in _strata(units):
        distinct, counts = np.unique(values, return_counts=True)
        draws = rng.multinomial(len(values), counts / len(values), size=_RESAMPLES)  # (resamples, distinct)
        scores += draws @ distinct / len(values)
    return scores


def _strata(units: Sequence[Unit]) -> list[list[float]]:
    strata: dict[str, list[float]] = {}
    for unit in units:
        strata.setdefault(unit.stratum, []).append(unit.value)
    return list(strata.values())


def _percentiles(scores: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def accuracy(
    answers: Sequence[ScoredAnswer],
    group: str,
    expected_n: int | None = None,
    units: Units = question_units,
) -> Part:
    """Return the accuracy of one category in percent, with its interval."""
    values = units(answers)
    return Part(score_of(values), len(answers), mean_interval(values), group, expected_n=expected_n)


def by_category(
    answers: Sequence[ScoredAnswer],
    group: str,
    categories: Category,
    sizes: Mapping[str, int] | None = None,
    units: Units = question_units,
) -> dict[str, Part]:
    """Return the accuracy of each category of a kind; a row may have none or several.

    `sizes`, the rows of each category in the whole benchmark, also set the order.
    """
    sizes = sizes or {}
    found: dict[str, list[ScoredAnswer]] = {name: [] for name in sizes}
    for answer in answers:
        for category in categories(answer.prediction.row):
            found.setdefault(category, []).append(answer)
    return {
        name: accuracy(members, group, sizes.get(name), units) for name, members in found.items() if members
    }


def by_column(
    group: str, column: str, sizes: Mapping[str, int] | None = None, units: Units = question_units
) -> Breakdown:
    """Return a breakdown by the values of a column; a row without a value is in no category."""

    def category(row: Mapping[str, Any]) -> list[str]:
        return [str(row[column])] if present(row.get(column)) else []

    return lambda answers: by_category(answers, group, category, sizes, units)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its data, its size, and how its answers are scored.

    Attributes:
        name: Name on the command line.
        title: Name in print.
        harness_task: Name of the task in lmms-eval.
        hub_id: Dataset on the hub, under the name that lmms-eval 0.7.3 uses.
        hub_files: Pattern of the files of the split.
        license: License stated by the dataset card; "(unchecked)" if the card was not available.
        size: Rows of the whole benchmark.
        size_source: Source of `size`.
        metric: Definition of the score.
        source: Paper or script that defines the metric.
        scorer: Function that extracts answers and compares them with the references.
        hub_config: Configuration of the dataset, if it has several.
        is_scored: Whether a row is part of the score; other rows are filtered out and counted.
        units: Function that returns the units of scored answers.
        interval: Function that returns the 95% interval of a score from its units.
        raw: Function that returns further metrics of the same answers.
        maximum: Score of a perfect model.
        note: Differences from other implementations.
    """

    name: str
    title: str
    harness_task: str
    hub_id: str
    hub_files: str
    split: str
    license: str
    kind: Literal["multiple choice", "yes or no", "free"]
    size: int
    size_source: str
    metric: str
    source: str
    scorer: Scorer
    breakdown: Breakdown
    hub_config: str | None = None
    is_scored: Callable[[Mapping[str, Any]], bool] = lambda row: True
    units: Units = question_units
    interval: Callable[[Sequence[Unit]], tuple[float, float]] = mean_interval
    raw: Callable[[Sequence[ScoredAnswer]], dict[str, float]] = lambda answers: {}
    maximum: float = 100.0
    note: str = ""

    def score(self, predictions: Sequence[Prediction]) -> Score:
        """Score predictions; see `summarize`. A missing column is a `SoloError` too."""
        return self.summarize(self.scorer(predictions))

    def summarize(self, answers: Sequence[ScoredAnswer]) -> Score:
        """Aggregate scored answers.

        Raises:
            SoloError: No answer is part of the score, or two have the same ID.
        """
        kept = self.filter(answers)
        units = self.units(kept)
        return Score(
            task=self.name,
            title=self.title,
            score=score_of(units),
            interval=self.interval(units),
            n=len(kept),
            expected_n=self.size,
            metric=self.metric,
            source=self.source,
            breakdown=self.breakdown(answers),
            raw=self.raw(answers),
            unreadable=sum(answer.extracted is None and not answer.problem for answer in kept),
            bad_rows=tuple(answer.prediction.id for answer in kept if answer.problem),
            filtered=len(answers) - len(kept),
            maximum=self.maximum,
        )

    def filter(self, answers: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
        """Return the answers that are part of the score; raise like `summarize`."""
        seen = set()
        for answer in answers:
            if answer.prediction.id in seen:
                raise SoloError(f"two predictions have the ID {answer.prediction.id}")
            seen.add(answer.prediction.id)
        kept = [answer for answer in answers if self.is_scored(answer.prediction.row)]
        if not kept:
            raise SoloError(f"{self.name}: no rows to score among {len(answers)}")
        return kept
