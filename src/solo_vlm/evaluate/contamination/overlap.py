"""Runs of words that a benchmark's questions share with other text, as GPT-3's authors looked for them.

Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: text is compared by its words, in
lower case and without punctuation. The length N of a run is the 5th percentile of the lengths of a
benchmark's examples, at least 8 words and at most 13; examples shorter than N are not compared. A run that is
found in more than 10 training documents is a common phrase and does not count; nor does one here that is in
more than 10 of the questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST, LONGEST = 8, 13
COMMON = 10
"""A run in more training documents, or in more questions, is a common phrase."""

_WORD = re.compile(r"\w+")

Question = tuple[str, str]  # task, row


@dataclass(frozen=True)
class Overlap:
    """Questions by the runs of words in them.

    Attributes:
        questions: task and row of the questions with a run.
        lengths: words in a run, by task.
        compared: questions that are long enough, by task.
    """

    questions: Mapping[str, Sequence[Question]]
    lengths: Mapping[str, int]
    compared: Mapping[str, int]

    @classmethod
    def of(cls, texts: Mapping[Question, str]) -> Overlap:
        """Collect the runs of all questions.

        Args:
            texts: questions with their options, by task and row.
        """
        words = {question: normalised(text) for question, text in texts.items()}
        lengths = {task: _run_length(words, task) for task in {task for task, _ in words}}
        questions: dict[str, list[Question]] = {}
        compared: Counter[str] = Counter()
        for question, its_words in words.items():
            runs = set(_runs(its_words, lengths[question[0]]))
            compared[question[0]] += bool(runs)
            for run in runs:
                questions.setdefault(run, []).append(question)
        rare = {run: found for run, found in questions.items() if len(found) <= COMMON}
        return cls(rare, lengths, dict(compared))

    def runs_in(self, text: str) -> set[str]:
        """The runs of any question that occur in a text."""
        words = normalised(text)
        return {
            run
            for length in set(self.lengths.values())
            for run in _runs(words, length)
            if run in self.questions
        }


def normalised(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _run_length(words: Mapping[Question, Sequence[str]], task: str) -> int:
    counts = [len(its_words) for (its_task, _), its_words in words.items() if its_task == task]
    return int(np.clip(np.percentile(counts, 5), SHORTEST, LONGEST))


def _runs(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
