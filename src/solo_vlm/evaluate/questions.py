"""Questions of your own with accepted answers: their files, and how responses to them are scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import BeforeValidator, Field

from solo_vlm.data.mixture import SourceSettings
from solo_vlm.data.sample import Sample, SampleError, parse_sample
from solo_vlm.data.sources.files import DEFAULT_LIMITS, Limits
from solo_vlm.evaluate.held_out import HeldOutQuestion
from solo_vlm.evaluate.scoring.extract import clean, read_choice
from solo_vlm.evaluate.scoring.numbers import as_number, read_number
from solo_vlm.evaluate.scoring.score import Unit, mean_interval, score_of
from solo_vlm.evaluate.scoring.text import anls, exact_match
from solo_vlm.utils.errors import SoloError, did_you_mean
from solo_vlm.utils.settings import Settings

Metric = Literal["exact", "anls", "choice", "number"]

DEFAULT_MAX_NEW_TOKENS = 32
"""Maximum length of an answer: a phrase, not an explanation."""

_PRECISION = 1e-6  # relative difference up to which numbers are equal: a third may be written 0.3333333
_NAME = r"^\w[\w.-]*$"  # a part of names of metrics and files


class QuestionSettings(Settings):
    """A file of questions.

    Attributes:
        path: File, folder, glob pattern or URL of rows with `question`, `answer`, and `image` or `images`.
        images: Folder that relative image paths refer to; default: the folder of the row's file.
        columns: Columns of the rows, by the names above: `{question: query, answer: label}`.
        metric: Metric of rows that name none and have neither options nor a number as the answer.
    """

    path: str
    images: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    metric: Metric = "exact"

    @property
    def source(self) -> SourceSettings:
        """Settings of the source of the rows."""
        return SourceSettings(path=self.path, format="questions", images=self.images, columns=self.columns)


def _by_name(value: Any) -> Any:
    """Return the files by name; a single one, a path or its settings, is called "questions"."""
    is_single = isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("path"), str))
    files = {"questions": value} if is_single else value
    if not isinstance(files, dict):
        return files
    return {name: {"path": file} if isinstance(file, str) else file for name, file in files.items()}


QuestionFiles = Annotated[
    dict[Annotated[str, Field(pattern=_NAME)], QuestionSettings],
    BeforeValidator(_by_name),
    Field(min_length=1),
]
"""Files of questions by name, from a path, the settings of a file, or several of either by name."""


@dataclass(frozen=True)
class Question(HeldOutQuestion):
    """A chat with its accepted answers; the last turn is the first of them.

    Attributes:
        id: Position in the file, from 1.
        answers: Accepted answers; the letter of the correct option if there are options.
        options: Texts of the options A, B, C, ...; empty for other questions.
        metric: Comparison of a response with the answers.
    """

    id: str
    answers: tuple[str, ...]
    options: tuple[str, ...]
    metric: Metric

    @property
    def row(self) -> dict[str, Any]:
        """Columns of the question in a file of predictions."""
        return {
            "question": self.question,
            "answer": list(self.answers),
            "options": list(self.options),
            "metric": self.metric,
        }

    @property
    def expected(self) -> str:
        """Accepted answers, to read; of a question with options, the letter and its text."""
        if self.options:
            return f"{self.reference}. {self.options[ord(self.reference) - ord('A')]}"
        return " | ".join(dict.fromkeys(self.answers))


@dataclass(frozen=True)
class QuestionScore:
    """Mean credit of the responses to some questions, from 0 to 1, with its 95% interval.

    Attributes:
        n: Number of questions.
    """

    value: float
    low: float
    high: float
    n: int


def load_questions(
    settings: QuestionSettings,
    samples: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    at: Callable[[str], str] = str,
) -> tuple[list[Question], int]:
    """Load questions of a file and count them all; images are opened later.

    Args:
        settings: File, and how to read it.
        samples: Number of questions to load, spread evenly over the file; default: all.
        limits: Limits for reading the file.
        at: Function that resolves a path.

    Raises:
        SoloError: The file is missing, empty or unreadable, or a row is not a question.
    """
    source = settings.source.open(limits, at)
    places = [(shard, row) for shard in range(len(source)) for row in range(len(source.read(shard)))]
    if not places:
        raise SoloError(f"{settings.path} has no questions")
    count = min(samples or len(places), len(places))
    chosen = np.linspace(0, len(places) - 1, count).round().astype(int) if count > 1 else [0]
    questions, held = [], (-1, source.read(0))
    for number in map(int, chosen):
        shard, row = places[number]
        held = held if held[0] == shard else (shard, source.read(shard))
        try:
            questions.append(_question(held[1][row], str(number + 1), settings.metric))
        except (SampleError, SoloError) as error:
            raise SoloError(f"{source.where(shard, row)}: {error}") from error
    return questions, len(places)


def _question(row: dict[str, Any], id: str, default: Metric) -> Question:
    sample: Sample = parse_sample(row)
    answers, options, metric = row["answers"], row["options"], row["metric"] or default
    if metric not in (known := get_args(Metric)):
        hint = did_you_mean(str(metric), known)
        raise SoloError(f"unknown metric {metric}{hint} (available: {', '.join(known)})")
    if (metric == "choice") != bool(options):
        raise SoloError(f"metric {metric} with options {options}: options and choice need each other")
    if metric == "number" and (wrong := [answer for answer in answers if as_number(answer) is None]):
        raise SoloError(f"metric number, but the answer is {wrong[0]!r}: write a number, or use exact")
    return Question(sample, id, tuple(answers), tuple(options), metric)


@dataclass(frozen=True)
class Answer:
    """Response to a question with its credit.

    Attributes:
        response: Generated text; None if the question failed, which counts as wrong.
        extracted: Answer found in the response; None if it has none.
        credit: 1 or 0; the similarity if the metric is ANLS.
    """

    question: Question
    response: str | None
    extracted: str | None
    credit: float

    @classmethod
    def of(cls, question: Question, response: str | None) -> Self:
        """Compare a response with the accepted answers."""
        if response is None:
            return cls(question, None, None, 0.0)
        if question.metric == "choice":
            letter = read_choice(response, question.options)
            return cls(question, response, letter, float(letter in question.answers))
        if question.metric == "number":
            number = read_number(response)
            return cls(question, response, number, float(_is_near(number, question.answers)))
        text = clean(response)
        similarity = anls if question.metric == "anls" else exact_match
        return cls(question, response, text or None, float(similarity(text, question.answers)))


def _is_near(number: str | None, answers: Sequence[str]) -> bool:
    references = [value for value in map(as_number, answers) if value is not None]
    return number is not None and any(
        math.isclose(float(number), reference, rel_tol=_PRECISION) for reference in references
    )


def summarize(answers: Sequence[Answer]) -> QuestionScore:
    """Return the mean credit with its 95% interval: Wilson's for right and wrong, else the bootstrap's."""
    units = [Unit(answer.question.id, 100 * answer.credit) for answer in answers]
    low, high = mean_interval(units)
    return QuestionScore(score_of(units) / 100, low / 100, high / 100, len(units))
