"""Questions of your own with accepted answers: their files, and how responses to them are scored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import BeforeValidator, Field

from solo_vlm.data.mixture import SourceSettings
from solo_vlm.data.sample import FilteredRow, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.data.sources.files import DEFAULT_LIMITS, Limits
from solo_vlm.data.sources.formatted import FormattedSource
from solo_vlm.evaluate.benchmarks.short_answers import relaxed_accuracy
from solo_vlm.evaluate.held_out import HeldOutQuestion
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.extract import final_text, read_choice, read_yes_no
from solo_vlm.evaluate.scoring.numbers import as_number, read_number
from solo_vlm.evaluate.scoring.score import Part, Score, interval_of_mean
from solo_vlm.evaluate.scoring.text import anls, exact_match
from solo_vlm.utils.errors import SoloError, did_you_mean
from solo_vlm.utils.settings import Settings, parse_yaml

Metric = Literal["exact", "anls", "relaxed", "choice", "number", "yes_no"]

DEFAULT_MAX_NEW_TOKENS = 32
"""Maximum length of an answer: a phrase, not an explanation."""

_COMPARISONS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "anls": anls,
    "relaxed": lambda text, answers: relaxed_accuracy(text, answers)[0],
}
_YES_NO = frozenset({"yes", "no"})
_PRECISION = 1e-6  # relative difference up to which numbers are equal: a third may be written 0.3333333
_NAME = r"^\w[\w.-]*$"  # a part of names of metrics and files


class QuestionSettings(Settings):
    """A file of questions.

    Attributes:
        path: File, folder, glob pattern or URL of rows with `question`, `answer`, and `image` or `images`.
        images: Folder that relative image paths refer to; default: the folder of the row's file.
        columns: Columns of the rows, by the names above: `{question: query, answer: label}`.
        filter: Rows to ask: a comparison of their columns, such as `split == "dev"`.
        metric: Metric of rows that name none and have neither options nor a number as the answer. Default:
            "yes_no" if the answer is yes or no, else "exact".
    """

    path: str
    images: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    filter: str | None = None
    metric: Metric | None = None

    def open(self, limits: Limits = DEFAULT_LIMITS, at: Callable[[str], str] = str) -> Source:
        """Open the source of the rows; see `SourceSettings.open`."""
        source = SourceSettings(
            path=self.path,
            format="questions",
            images=self.images,
            columns=self.columns,
            filter=self.filter,
        )
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
        categories: Value of each column of categories that the row has.
    """

    id: str
    where: str
    answers: tuple[str, ...]
    options: tuple[str, ...]
    metric: Metric
    categories: Mapping[str, str]

    @property
    def row(self) -> dict[str, Any]:
        """Columns of the question in a file of predictions."""
        return {
            "question": self.question,
            "answer": list(self.answers),
            "options": list(self.options),
            "metric": self.metric,
            **({"categories": dict(self.categories)} if self.categories else {}),
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
    source: Source, samples: int | None = None, metric: Metric | None = None
) -> tuple[list[Question], int]:
    """Load questions of a source, and count them all; images are opened later.

    Args:
        source: Result of `QuestionSettings.open`.
        samples: Number of questions to load, spread evenly over the source; default: all.
        metric: Metric of rows without another, see `QuestionSettings`.

    Raises:
        SoloError: The source is empty or unreadable, or a row is not a question.
    """
    places = list(_places(source))
    if not places:
        raise SoloError(f"{source.name} has no questions")
    count = min(samples or len(places), len(places))
    chosen = np.linspace(0, len(places) - 1, count).round().astype(int) if count > 1 else [0]
    questions, held = [], -1
    for number in map(int, chosen):
        position, shard, row = places[number]
        if shard != held:
            rows, held = source.read(shard), shard
        where = source.where(shard, row)
        try:
            questions.append(_question(rows[row], str(position), where, metric))
        except (SampleError, SoloError) as error:
            raise SoloError(f"{where}: {error}") from error
    return questions, len(places)


def _places(source: Source) -> Iterator[tuple[int, int, int]]:
    """Yield position, shard and row of the questions, without rows that the source's filter leaves out."""
    has_filter = isinstance(source, FormattedSource) and source.row_format.filter is not None
    position = 0
    for shard in range(len(source)):
        rows = source.read(shard)
        for row in range(len(rows)):
            position += 1
            if not (has_filter and _is_left_out(rows, row)):
                yield position, shard, row


def _is_left_out(rows: Sequence[dict[str, Any]], row: int) -> bool:
    try:
        rows[row]
    except FilteredRow:
        return True
    except SampleError:  # reported if the question is asked
        pass
    return False


def _question(row: dict[str, Any], id: str, where: str, default: Metric | None) -> Question:
    sample = parse_sample(row)
    answers, options = row["answers"], row["options"]
    is_yes_no = {answer.lower() for answer in answers} <= _YES_NO
    metric = row["metric"] or default or ("yes_no" if is_yes_no else "exact")
    if metric not in (known := get_args(Metric)):
        hint = did_you_mean(str(metric), known)
        raise SoloError(f"unknown metric {metric}{hint} (available: {', '.join(known)})")
    if (metric == "choice") != bool(options):
        raise SoloError(f"metric {metric} with options {options}: options and choice need each other")
    if metric == "number" and (wrong := [answer for answer in answers if as_number(answer) is None]):
        raise SoloError(f"metric number, but the answer is {wrong[0]!r}: write a number, or use exact")
    if metric == "yes_no" and not is_yes_no:
        raise SoloError(f"metric yes_no, but the answer is {answers[0]!r}: write yes or no, or use exact")
    return Question(sample, id, where, tuple(answers), tuple(options), metric, row.get("categories", {}))


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
        return _question(asked, prediction.id, where, None)
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
        if question.metric == "yes_no":
            word = read_yes_no(response)
            return cls(
                question, response, word, float(word in {answer.lower() for answer in question.answers})
            )
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
    whole = summarize(answers)
    metrics = _by_kind(answers, lambda question: {"metric": question.metric})
    kinds = (metrics if len(metrics) > 1 else {}) | _by_kind(answers, lambda question: question.categories)
    return Score(
        task=name,
        title=name if name in path else f"{name} ({path})",
        score=100 * whole.value,
        interval=(100 * whole.low, 100 * whole.high),
        n=whole.n,
        expected_n=total,
        metric=f"mean credit ({', '.join(name for _, name in metrics)}), in percent of questions",
        source=path,
        breakdown=_breakdown(kinds),
        unreadable=sum(answer.extracted is None and answer.response is not None for answer in answers),
        bad_rows=tuple(answer.question.id for answer in answers if answer.response is None),
    )


_Kinds = dict[tuple[str, str], list[Answer]]


def _by_kind(answers: Sequence[Answer], kinds_of: Callable[[Question], Mapping[str, str]]) -> _Kinds:
    """Return the answers by column and value, in the order of both."""
    found: _Kinds = {}
    for answer in answers:
        for kind in kinds_of(answer.question).items():
            found.setdefault(kind, []).append(answer)
    return dict(sorted(found.items()))


def _breakdown(kinds: _Kinds) -> dict[str, Part]:
    """Return the score of each kind; where two columns share a value, its name has the column."""
    values = Counter(value for _, value in kinds)
    parts = {}
    for (column, value), answers in kinds.items():
        score = summarize(answers)
        name = value if values[value] == 1 else f"{column} {value}"
        parts[name] = Part(100 * score.value, score.n, (100 * score.low, 100 * score.high), column)
    return parts
