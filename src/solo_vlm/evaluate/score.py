"""What was read of each answer, and the score that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from solo_vlm.evaluate.predictions import Prediction


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer, read and compared with the truth.

    Attributes:
        prediction: what was answer.
        reading: what was read of the response (a letter, yes or no, a value); None where nothing was.
        reference: the right answer, in the same form.
        correct: whether the two agree.
        problem: why the row could not be scored at all: no response, or no usable truth.
    """

    prediction: Prediction
    extracted: str | None
    reference: str | None
    correct: bool
    problem: str | None = None


@dataclass(frozen=True)
class Unit:
    """The smallest thing that a benchmark draws by itself: a question, or an image with its questions.

    A score is the sum, over strata, of the mean value of the stratum's units.
    """

    id: str
    value: float
    stratum: str = ""


def question_units(answers: Sequence[ScoredAnswer]) -> list[Unit]:
    """Each question by itself: 100 where the answer is right, else 0. Their mean is the accuracy."""
    return [Unit(answer.prediction.id, 100.0 * answer.correct) for answer in answers]


@dataclass(frozen=True)
class Part:
    """The score of one category.

    Attributes:
        score: on the scale from 0 to `maximum`.
        n: rows.
        interval: 95%, from low to high.
        group: what the categories beside it have in common ("subtask", "skill", ...).
        maximum: the score of a perfect model.
        expected_n: rows in the whole benchmark, where its paper or card says so.
        more: further figures of this category, such as MME's acc and acc+.
    """

    score: float
    n: int
    interval: tuple[float, float]
    group: str
    maximum: float = 100.0
    expected_n: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The score of a model on one task.

    Attributes:
        task: the benchmark's name on the command line.
        title: the benchmark's name in print.
        score: from 0 to `maximum`; per cent unless the metric says otherwise.
        interval: 95%, from low to high: how far another draw of as many questions might have fallen.
        n: scored rows.
        expected_n: rows of the whole benchmark.
        metric: how the score is computed.
        source: the paper or script that computes it so.
        breakdown: the score of each category.
        raw: other figures for the same answers, by name, such as the harness's own average.
        unreadable: answers that could not be read; they count as wrong.
        bad_rows: ids of rows that failed or cannot be scored; they count as wrong.
        filtered: rows that do not belong to the score (video questions in an image score).
        maximum: the score of a perfect model.
    """

    task: str
    title: str
    score: float
    interval: tuple[float, float]
    n: int
    expected_n: int
    metric: str
    source: str
    breakdown: Mapping[str, Part] = field(default_factory=dict)
    raw: Mapping[str, float] = field(default_factory=dict)
    unreadable: int = 0
    bad_rows: tuple[str, ...] = ()
    filtered: int = 0
    maximum: float = 100.0

    @property
    def partial(self) -> bool:
        """Whether other rows were scored than the whole benchmark."""
        return self.n != self.expected_n

    @property
    def name(self) -> str:
        """The title; says so where the score is partial."""
        return f"{self.title} (partial: {self.n:,} of {self.expected_n:,})" if self.partial else self.title

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `bad_rows` is their count, `bad_ids` are their ids."""
        facts = asdict(self)
        bad_ids = list(facts.pop("bad_rows"))
        return {
            **facts,
            "name": self.name,
            "partial": self.partial,
            "bad_rows": len(bad_ids),
            "bad_ids": bad_ids,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        derived = ("name", "partial", "bad_rows", "bad_ids")
        plain = {key: value for key, value in facts.items() if key not in derived}
        breakdown = {
            name: Part(**{**part, "interval": tuple(part["interval"])})
            for name, part in facts["breakdown"].items()
        }
        return cls(
            **{
                **plain,
                "interval": tuple(facts["interval"]),
                "breakdown": breakdown,
                "bad_rows": tuple(facts["bad_ids"]),
            }
        )
