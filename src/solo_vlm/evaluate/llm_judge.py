"""A language model that extracts the answer from a response, for MathVista's original way of scoring."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from solo_vlm.evaluate.mathvista_answers import Problem
from solo_vlm.evaluate.multiple_choice import score_answer
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.score import ScoredAnswer
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from openai import OpenAI

# The original gives five examples of its own to the same end: one for each kind of answer.
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
class LlmJudge:
    """Judges answers after a language model has extracted them.

    Args:
        model: the model's name at the endpoint.
        base_url: of any OpenAI-compatible endpoint; None is OpenAI's own. The key is `OPENAI_API_KEY`.
        parallel: requests under way at once.
    """

    model: str
    base_url: str | None = None
    parallel: int = 8

    def __call__(self, predictions: Sequence[Prediction]) -> list[ScoredAnswer]:
        """Judge answers; one request each, except where the response already is a plain answer.

        Raises:
            SoloError: the endpoint fails, or a column is missing.
        """
        with ThreadPoolExecutor(self.parallel) as threads:
            return list(threads.map(self._score, predictions))

    @cached_property
    def _client(self) -> OpenAI:
        from openai import OpenAI

        # An endpoint of one's own seldom asks for a key, but the client insists on one.
        key = os.environ.get("OPENAI_API_KEY") or ("none" if self.base_url else None)
        return OpenAI(base_url=self.base_url, api_key=key, max_retries=5)

    def _score(self, prediction: Prediction) -> ScoredAnswer:
        problem = Problem.of(prediction)
        reference = problem.normalise(prediction.column("answer"))
        response = (prediction.response or "").strip()
        extracted = problem.normalise(response)
        if extracted is None and response:
            extracted = problem.read_extraction(self._extract(prediction, response))
        return score_answer(prediction, extracted, reference)

    def _extract(self, prediction: Prediction, response: str) -> str:
        from openai import OpenAIError

        question = prediction.column("query", "question")
        prompt = f"{_PROMPT}\n{question}\nResponse: {response}\nExtracted answer:"
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=256,
            )
        except OpenAIError as error:
            raise SoloError(
                f"the judge {self.model} at {self.base_url or 'OpenAI'} failed: {error}"
            ) from error
        return answer.choices[0].message.content or ""
