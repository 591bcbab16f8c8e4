"""MathVista, testmini: 1,000 questions about mathematics in images, scored by rules or with an LLM judge."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Self

from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.scoring.extract import clean, plain, read_choice, read_list, same_text
from solo_vlm.evaluate.scoring.numbers import as_number, read_number
from solo_vlm.evaluate.scoring.options import as_list, parsed
from solo_vlm.evaluate.scoring.score import Benchmark, Part, ScoredAnswer, by_category, by_column
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from openai import OpenAI

_QUESTION_TYPES = ("multi_choice", "free_form")
_ANSWER_TYPES = ("text", "integer", "float", "list")
_TASKS = {
    "figure question answering": 269,
    "geometry problem solving": 208,
    "math word problem": 186,
    "textbook question answering": 158,
    "visual question answering": 179,
}
_SKILLS = {
    "algebraic reasoning": 281,
    "arithmetic reasoning": 353,
    "geometry reasoning": 239,
    "logical reasoning": 37,
    "numeric commonsense": 144,
    "scientific reasoning": 122,
    "statistical reasoning": 301,
}
_by_answer_type = by_column("answer type", "answer_type")

# MathVista's own prompt has five such examples, one for each kind of answer.
_PROMPT = """\
Below are responses to questions. Extract the final answer of the last response in the form that its hint asks
for. Write the answer only; write nothing if the response has none.

Hint: Answer with an integer.
Question: How many apples are on the table?
Response: I count two red ones and three green ones, which makes five apples.
Extracted answer: 5

Hint: Answer with a number with one decimal.
Question: What share of the bars is higher than 10?
Response: Of the ten bars four are higher, so the share is 0.4 of them all.
Extracted answer: 0.4

Hint: Answer with a number with two decimals.
Question: What do the pen and the ruler cost together? (Unit: $)
Response: The pen is $1.20 and the ruler $0.35, together $1.55.
Extracted answer: 1.55

Hint: Answer with a Python list.
Question: In which years were sales lowest?
Response: They were lowest in 2011 and in 2014.
Extracted answer: [2011, 2014]

Hint: Answer with the letter of an option.
Question: Which angle is the largest?
Choices:
(A) angle P
(B) angle Q
Response: Q lies opposite the longest side, so it is angle Q.
Extracted answer: B
"""


@dataclass(frozen=True)
class Problem:
    """Form of the answer to a question."""

    choices: list[str]  # texts of the options; empty for a free-form question
    answer_type: str  # "text", "integer", "float" or "list"
    precision: int | None  # decimals of a float; None if the row does not specify them

    @classmethod
    def of(cls, prediction: Prediction) -> Self:
        """Read the problem of a row.

        Raises:
            SoloError: A column is missing or has a value that MathVista does not use.
        """
        multiple_choice = _one_of(prediction, "question_type", _QUESTION_TYPES) == "multi_choice"
        answer_type = _one_of(prediction, "answer_type", _ANSWER_TYPES)
        # The hub stores the precision as a float: 1.0 for one decimal.
        precision = prediction.column("precision") if answer_type == "float" else None
        choices = as_list(prediction.column("choices")) if multiple_choice else []
        if multiple_choice and not choices:
            raise SoloError(f"row {prediction.id} is multiple choice, but its column choices has no options")
        return cls(choices, answer_type, _whole_number(precision))

    def read(self, response: str) -> str | None:
        """Extract the answer of a response by rules alone.

        It is an option named by its letter or its exact text, the declared number or else the last one, or
        the last list.
        """
        if self.choices:
            letter = read_choice(response, self.choices, anywhere=False)
            return self.choices[ascii_uppercase.index(letter)] if letter else None
        if self.answer_type in ("integer", "float"):
            return self.normalize(read_number(response))
        return read_list(response) if self.answer_type == "list" else self.normalize(clean(response))

    def read_extraction(self, extraction: str) -> str | None:
        """Read an answer that a language model extracted, like MathVista's calculate_score.py.

        A text that is not an option counts as the nearest one by edit distance.
        """
        extraction = clean(extraction)
        if not extraction:
            return None
        if self.choices:
            from Levenshtein import distance

            known = filter(None, self.choices)
            return self.read(extraction) or min(known, key=lambda choice: distance(extraction, choice))
        return self.normalize(extraction) or self.read(extraction)

    def normalize(self, answer: Any) -> str | None:
        """Return an answer in the spelling that is compared, or None if it is not of the type."""
        if not present(answer):
            return None
        text = str(answer).strip()
        if self.choices:
            if text in self.choices:  # possibly twice, but compared as text
                return text
            index = same_text(text, self.choices)
            return None if index is None else self.choices[index]
        if self.answer_type in ("integer", "float"):
            number = as_number(text)
            if number is None or (self.answer_type == "float" and self.precision is None):
                return None
            # Adding zero turns -0.0 into 0.0.
            return str(int(number) if self.answer_type == "integer" else round(number, self.precision) + 0.0)
        if self.answer_type == "list":
            return read_list(text) if text.startswith("[") and text.endswith("]") else None
        return plain(text)


@dataclass(frozen=True)
class LlmJudge:
    """Scorer that lets a language model extract the answers."""

    model: str  # name of the model at the endpoint
    base_url: str | None = None  # OpenAI-compatible; None is OpenAI's own. The key is `OPENAI_API_KEY`.
    concurrency: int = 8  # maximum in-flight requests

    def __call__(self, predictions: Sequence[Prediction]) -> list[ScoredAnswer]:
        """Score predictions with one request each, except where the response already is a plain answer.

        Raises:
            SoloError: The endpoint fails, or a column is missing.
        """
        with ThreadPoolExecutor(self.concurrency) as threads:
            return list(threads.map(self._score, predictions))

    @cached_property
    def _client(self) -> OpenAI:
        from openai import OpenAI

        # A local endpoint rarely checks the key, but the client requires one.
        key = os.environ.get("OPENAI_API_KEY") or ("none" if self.base_url else None)
        return OpenAI(base_url=self.base_url, api_key=key, max_retries=5)

    def _score(self, prediction: Prediction) -> ScoredAnswer:
        problem = Problem.of(prediction)
        reference = problem.normalize(prediction.column("answer"))
        response = (prediction.response or "").strip()
        extracted = problem.normalize(response)
        if extracted is None and response:
            extracted = problem.read_extraction(self._extract(prediction, response))
        return ScoredAnswer.of(prediction, extracted, reference)

    def _extract(self, prediction: Prediction, response: str) -> str:
        from openai import OpenAIError

        question = prediction.column("query", "question")
        prompt = f"{_PROMPT}\n{question}\nResponse: {response}\nExtracted answer:"
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=256,
            )
        except OpenAIError as error:
            endpoint = self.base_url or "OpenAI"
            raise SoloError(f"the LLM judge {self.model} at {endpoint} failed: {error}") from error
        return completion.choices[0].message.content or ""


def with_llm_judge(judge: LlmJudge) -> Benchmark:
    """Return MathVista as its paper scores it: a language model extracts the answers."""
    return replace(
        MATHVISTA,
        scorer=judge,
        metric="correct answers / questions, in percent; answers extracted by the language model "
        f"{judge.model}; a text that is not an option counts as the nearest one",
        source="Lu et al. 2023, arXiv 2310.02255, with its calculate_score.py; the prompt is this project's",
    )


def _score(prediction: Prediction) -> ScoredAnswer:
    problem = Problem.of(prediction)
    reference = problem.normalize(prediction.column("answer"))
    extraction = prediction.row.get("extraction")
    if present(extraction):
        extracted = problem.read_extraction(str(extraction))
    else:
        extracted = problem.read(prediction.response or "")
    return ScoredAnswer.of(prediction, extracted, reference)


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    return {
        **by_category(answers, "task", _task, _TASKS),
        **by_category(answers, "skill", lambda row: as_list(_metadata(row).get("skills")), _SKILLS),
        **_by_answer_type(answers),
    }


def _task(row: Mapping[str, Any]) -> list[str]:
    task = _metadata(row).get("task")
    return [str(task)] if present(task) else []


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the column `metadata`, text in a CSV file; VLMEvalKit has its entries as columns."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        metadata = parsed(metadata)
    return metadata if isinstance(metadata, Mapping) else row


def _one_of(prediction: Prediction, column: str, known: tuple[str, ...]) -> str:
    value = str(prediction.column(column)).strip().lower()
    if value not in known:
        raise SoloError(f"row {prediction.id}: {column} is {value!r}; expected one of {', '.join(known)}")
    return value


def _whole_number(value: Any) -> int | None:
    try:
        return int(float(value)) if present(value) else None
    except (TypeError, ValueError):
        return None


MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista (testmini)",
    harness_task="mathvista_testmini_format",
    hub_id="AI4Math/MathVista",
    hub_files="data/testmini-*",
    split="testmini",
    license="CC BY-SA 4.0",
    kind="free",
    size=1000,
    size_source="dataset card of AI4Math/MathVista; tasks and skills as VLMEvalKit counts them",
    metric="rule-based: correct answers / questions, in percent; an option's letter or exact text, or a "
    "number, is extracted without guessing (an `extraction` column is used where the file has one)",
    source="Lu et al. 2023, arXiv 2310.02255, with the normalization of its calculate_score.py; the paper "
    "extracts answers with GPT-4",
    scorer=lambda predictions: [_score(prediction) for prediction in predictions],
    breakdown=_breakdown,
)
