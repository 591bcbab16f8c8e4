"""Questions of your own with accepted answers: their files, and how responses to them are scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import BeforeValidator, Field

from solo_vlm.data.mixture import SourceSettings
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.data.sources.files import DEFAULT_LIMITS, Limits
from solo_vlm.evaluate.benchmarks.short_answers import relaxed_accuracy
from solo_vlm.evaluate.held_out import HeldOutQuestion
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.extract import final_text, read_choice
from solo_vlm.evaluate.scoring.numbers import as_number, read_number
from solo_vlm.evaluate.scoring.score import Part, Score, interval_of_mean
from solo_vlm.evaluate.scoring.text import anls, exact_match
from solo_vlm.utils.errors import SoloError, did_you_mean
from solo_vlm.utils.settings import Settings, parse_yaml

Metric = Literal["exact", "anls", "relaxed", "choice", "number"]

DEFAULT_MAX_NEW_TOKENS = 32
"""Maximum length of an answer: a phrase, not an explanation."""

_COMPARISONS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "anls": anls,
    "relaxed": lambda text, answers: relaxed_accuracy(text, answers)[0],
}
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

    def open(self, limits: Limits = DEFAULT_LIMITS, at: Callable[[str], str] = str) -> Source:
        """Open the source of the rows; see `SourceSettings.open`."""
        source = SourceSettings(path=self.path, format="questions", images=self.images, columns=self.columns)
        return source.open(limits, at)


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
]
"""Files of questions by name, from a path, the settings of a file, or several of either by name."""


class _Asked(Settings):
    questions: Annotated[QuestionFiles, Field(min_length=1)]


def parse_question_files(given: str) -> dict[str, QuestionSettings]:
    """Parse a path, or the YAML of what `QuestionFiles` takes, such as `{path: a.jsonl, metric: anls}`."""
    value = parse_yaml(given, f"the settings {given}") if given.lstrip().startswith("{") else given
    return _Asked.parse({"questions": value}, origin=given).questions


@dataclass(frozen=True)
class Question(HeldOutQuestion):
    """A chat with its accepted answers; the last turn is the first of them.

    Attributes:
        id: Position in the source, from 1.
        where: File and row, for messages.
        answers: Accepted answers; the letter of the correct option if there are options.
        options: Texts of the options A, B, C, ...; empty for other questions.
        metric: Comparison of a response with the answers.
    """

    id: str
    where: str
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
    source: Source, samples: int | None = None, metric: Metric = "exact"
) -> tuple[list[Question], int]:
    """Load questions of a source, and count them all; images are opened later.

    Args:
        source: Result of `QuestionSettings.open`.
        samples: Number of questions to load, spread evenly over the source; default: all.
        metric: Metric of rows without another, see `QuestionSettings`.

    Raises:
        SoloError: The source is empty or unreadable, or a row is not a question.
    """
    places = [(shard, row) for shard in range(len(source)) for row in range(len(source.read(shard)))]
    if not places:
        raise SoloError(f"{source.name} has no questions")
    count = min(samples or len(places), len(places))
    chosen = np.linspace(0, len(places) - 1, count).round().astype(int) if count > 1 else [0]
    questions, held = [], -1
    for number in map(int, chosen):
        shard, row = places[number]
        if shard != held:
            rows, held = source.read(shard), shard
        where = source.where(shard, row)
        try:
            questions.append(_question(rows[row], str(number + 1), where, metric))
        except (SampleError, SoloError) as error:
            raise SoloError(f"{where}: {error}") from error
    return questions, len(places)


def _question(row: dict[str, Any], id: str, where: str, default: Metric) -> Question:
    sample = parse_sample(row)
    answers, options, metric = row["answers"], row["options"], row["metric"] or default
    if metric not in (known := get_args(Metric)):
        hint = did_you_mean(str(metric), known)
        raise SoloError(f"unknown metric {metric}{hint} (available: {', '.join(known)})")
    if (metric == "choice") != bool(options):
        raise SoloError(f"metric {metric} with options {options}: options and choice need each other")
    if metric == "number" and (wrong := [answer for answer in answers if as_number(answer) is None]):
        raise SoloError(f"metric number, but the answer is {wrong[0]!r}: write a number, or use exact")
    return Question(sample, id, where, tuple(answers), tuple(options), metric)


def saved_question(prediction: Prediction) -> Question:
    """Return the question of a prediction whose row is `Question.row`, without its images.

    Raises:
        SoloError: The row is not.
    """
    row, where = prediction.row, f"prediction {prediction.id}"
    try:
        texts = {"user": row["question"], "assistant": row["answer"][0]}
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
        asked = {**row, "messages": chat, "answers": row["answer"]}
        return _question(asked, prediction.id, where, "exact")
    except (KeyError, IndexError, TypeError, SampleError) as error:
        raise SoloError(f"{where} has no question with answers, options and metric: {error}") from error


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
        text = final_text(response).strip()
        compare = _COMPARISONS[question.metric]
        return cls(question, response, text or None, float(compare(text, question.answers)))


def _is_near(number: str | None, answers: Sequence[str]) -> bool:
    references = [value for value in map(as_number, answers) if value is not None]
    return number is not None and any(
        math.isclose(float(number), reference, rel_tol=_PRECISION) for reference in references
    )


def summarize(answers: Sequence[Answer]) -> QuestionScore:
    """Return the mean credit with its 95% interval: Wilson's for right and wrong, else the bootstrap's."""
    credits = [answer.credit for answer in answers]
    return QuestionScore(float(np.mean(credits)), *interval_of_mean(credits), len(credits))


def score_answers(name: str, path: str, answers: Sequence[Answer], total: int) -> Score:
    """Return the score of the answers to a file of questions, which has `total` of them."""

    def metric_of(answer: Answer) -> str:
        return answer.question.metric

    whole = summarize(answers)
    kinds = {metric: list(group) for metric, group in groupby(sorted(answers, key=metric_of), metric_of)}
    parts = {metric: summarize(group) for metric, group in kinds.items()}
    return Score(
        task=name,
        title=name if name in path else f"{name} ({path})",
        score=100 * whole.value,
        interval=(100 * whole.low, 100 * whole.high),
        n=whole.n,
        expected_n=total,
        metric=f"mean credit ({', '.join(kinds)}), in percent of questions",
        source=path,
        breakdown={
            metric: Part(100 * part.value, part.n, (100 * part.low, 100 * part.high), "metric")
            for metric, part in parts.items()
            if len(parts) > 1
        },
        unreadable=sum(answer.extracted is None and answer.response is not None for answer in answers),
        bad_rows=tuple(answer.question.id for answer in answers if answer.response is None),
    )
