"""Answers of a run to held-out questions: `answers.jsonl`, `answers.html`, and tables of the trackers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from solo_vlm.evaluate.question_page import (
    QuestionTable,
    Response,
    image_urls,
    shown_places,
    write_page,
)
from solo_vlm.evaluate.questions import Answer, summarize
from solo_vlm.train.metrics import Tracker, truncate_after
from solo_vlm.utils.json_lines import json_line

_COLUMNS = 6  # evaluations side by side on the page, newest last


class AnswerLog:
    """Writer of answers.

    Args:
        folder: Output directory of the run.
        trackers: Destinations of tables besides the files.
        done: Steps done before a resume; later lines of `answers.jsonl` are dropped.
    """

    def __init__(self, folder: Path, trackers: Sequence[Tracker], done: int) -> None:
        self._folder, self._trackers = folder, trackers
        self._path = folder / "answers.jsonl"
        truncate_after(self._path, done)
        self._responses: dict[tuple[str, str], dict[int, Response]] = defaultdict(dict)
        for line in self._path.read_bytes().splitlines() if self._path.is_file() else ():
            record = json.loads(line)
            response = Response(record["answer"], record["credit"])
            self._responses[record["file"], record["id"]][record["step"]] = response
        self._images: dict[tuple[str, str], list[str]] = {}

    def log(self, step: int, answers: Mapping[str, Sequence[Answer]]) -> None:
        """Log the answers of a step to the questions of each file."""
        with self._path.open("ab") as file:
            for name, answered in answers.items():
                for answer in answered:
                    question = answer.question
                    self._responses[name, question.id][step] = Response(answer.response, answer.credit)
                    record = {
                        "step": step,
                        "file": name,
                        "id": question.id,
                        "question": question.question,
                        "expected": question.expected,
                        "answer": answer.response,
                        "credit": answer.credit,
                    }
                    file.write(json_line(record))
        write_page(
            self._folder / "answers.html",
            f"Answers of {self._folder.name}",
            [self._table(name, answered) for name, answered in answers.items()],
        )
        for tracker in self._trackers:
            for name, answered in answers.items():
                tracker.log_answers(name, [answered[place] for place in shown_places(len(answered))], step)

    def _table(self, name: str, answered: Sequence[Answer]) -> QuestionTable:
        shown = [answered[place].question for place in shown_places(len(answered))]
        of_each = [self._responses[name, question.id].keys() for question in shown]
        steps = sorted(set.intersection(*map(set, of_each)))[-_COLUMNS:]  # a crash may have cut one short
        rows = []
        for question in shown:
            key = (name, question.id)
            if key not in self._images:
                self._images[key] = image_urls(question)
            rows.append((question, self._images[key], [self._responses[key][step] for step in steps]))
        score = summarize(answered)
        note = (
            f"Step {steps[-1]:,}: {score.value:.1%} of {score.n:,} questions, 95% interval {score.low:.1%} "
            f"to {score.high:.1%}. {len(rows):,} are shown; answers.jsonl has all."
        )
        return QuestionTable(name, note, [f"step {step:,}" for step in steps], rows)
