"""A run over files of questions: generate responses, score them, write predictions and a page."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from solo_vlm.data.values import ImageSource
from solo_vlm.evaluate.backends import Backend, generate_missing
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.question_page import QuestionTable, Response, image_urls, shown_places, write_page
from solo_vlm.evaluate.questions import (
    DEFAULT_MAX_NEW_TOKENS,
    Answer,
    Question,
    QuestionSettings,
    load_questions,
    score_answers,
)
from solo_vlm.evaluate.run import ModelInfo, ProgressBar, begin_run
from solo_vlm.evaluate.run_folder import AnswerFile, RunFolder, SavedAnswer
from solo_vlm.evaluate.scoring.score import Score, points, span
from solo_vlm.generate import GenerationRequest

_PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "numpy")


class QuestionFile(NamedTuple):
    """A loaded file of questions."""

    path: str
    questions: list[Question]


def load_files(files: Mapping[str, QuestionSettings]) -> dict[str, QuestionFile]:
    """Load all questions of files by name; see `load_questions`."""
    return {
        name: QuestionFile(file.path, load_questions(file.open(), metric=file.metric)[0])
        for name, file in files.items()
    }


@dataclass(frozen=True)
class QuestionRun:
    """A run and its folder; an interrupted run of the same model resumes."""

    out: Path  # folder: `answers/` as they arrive, `predictions/`, then scores, metadata and a page
    model: ModelInfo
    limit: int | None = None  # maximum number of questions per file, from the first; None asks all
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS  # maximum length of an answer

    def evaluate(
        self,
        backend: Backend,
        files: Mapping[str, QuestionFile],
        progress_bar: ProgressBar = lambda title: nullcontext(lambda done, total: None),
    ) -> list[Score]:
        """Ask the questions of each file, and return its score, as training logs it.

        Raises:
            SoloError: The folder is not empty and has no run of this model, or the backend fails. Earlier
                responses are kept.
        """
        folder = RunFolder(self.out)
        run = begin_run(folder, self.model, self.limit, self.max_new_tokens, _PACKAGES)
        scores, tables = [], []
        for name, (path, every) in files.items():
            started, questions = time.perf_counter(), every[: self.limit]
            with (
                progress_bar(name) as on_progress,
                AnswerFile(self.out / "answers" / f"{name}.jsonl") as saved,
            ):
                responses = self._ask(backend, questions, saved, on_progress)
            answers = [
                Answer.of(*pair) for pair in zip(questions, [r.response for r in responses], strict=True)
            ]
            predictions = (Prediction(each.question.id, each.response, each.question.row) for each in answers)
            folder.write_predictions(name, predictions)
            scores.append(score_answers(name, path, answers, len(every)))
            tables.append(_table(scores[-1], self.model.name, answers))
            run["tasks"][name] = {
                "path": path,
                "rows": len(every),
                "failures": {questions[each.row].id: each.error for each in responses if each.error},
                "max_new_tokens": self.max_new_tokens,
                "seconds": round(time.perf_counter() - started, 1),
            }
            folder.write_scores(scores)
            folder.write_metadata(run)
        write_page(self.out / "report.html", f"Answers of {self.model.name}", tables)
        return scores

    def _ask(
        self,
        backend: Backend,
        questions: Sequence[Question],
        saved: AnswerFile,
        on_progress: Callable[[int, int], None],
    ) -> list[SavedAnswer]:
        """Return the responses in order of the questions; earlier ones to the same question are reused."""
        keys = [(row, _request_hash(question, self.max_new_tokens)) for row, question in enumerate(questions)]

        def request(number: int) -> GenerationRequest:
            return GenerationRequest(number, questions[number].chat, self.max_new_tokens)

        return generate_missing(backend, keys, request, saved, on_progress)


def _request_hash(question: Question, max_new_tokens: int) -> str:
    """Return a hash of everything besides the model that determines a response."""
    images = [_image_hash(source) for source in question.sample.images]
    asked = [question.sample.messages[:-1], images, max_new_tokens]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _image_hash(source: ImageSource) -> str:
    """Return the hash of an image's file, which may have been repaired since, or of its URL."""
    if isinstance(source, str):
        is_url = "://" in source or source[:5] == "data:"
        source = source.encode() if is_url or not Path(source).is_file() else Path(source).read_bytes()
    return hashlib.sha256(source).hexdigest()


def _table(score: Score, model: str, answers: Sequence[Answer]) -> QuestionTable:
    shown = [answers[place] for place in shown_places(len(answers))]
    note = (
        f"{points(score)}% of {score.n:,} questions, 95% interval {span(score)}. "
        f"{len(shown):,} are shown; predictions/{score.task}.jsonl has all."
    )
    rows = [
        (each.question, image_urls(each.question), [Response(each.response, each.credit)]) for each in shown
    ]
    return QuestionTable(score.task, note, [model], rows)
