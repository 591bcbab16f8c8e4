"""Scores of known answers on synthetic rows in the schemas of all benchmarks."""

from __future__ import annotations

import pytest
from tests.evaluate.benchmark_rows import oracle, predictions

from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.score import Score
from solo_vlm.utils.errors import SoloError

SHORT = ("docvqa_val", "infovqa_val", "textvqa_val", "vqav2_val")  # made up in part only
NEVER_UNREADABLE = {*SHORT, "pope", "chartqa", "ocrbench"}  # every text is an answer


@pytest.mark.parametrize("task", BENCHMARKS)
def test_oracle_is_perfect_on_the_whole_benchmark(task):
    score = get(task).score(predictions(task, oracle(task), full=True))
    assert score.score == score.maximum
    if task not in SHORT:
        assert score.n == score.expected_n
        assert score.name == score.title
    assert (score.unreadable, score.bad_rows) == (0, ())
    assert all(part.score == part.maximum for part in score.breakdown.values())
    assert all(
        part.n == part.expected_n for part in score.breakdown.values() if part.group in ("category", "task")
    )


@pytest.mark.parametrize("task", BENCHMARKS)
def test_failed_row_counts_as_wrong_and_is_listed(task):
    answered = predictions(task, oracle(task))
    answered[0] = Prediction("0", None, answered[0].row)
    answered[1] = Prediction("1", "Hm.", answered[1].row)
    score = get(task).score(answered)
    assert score.score < score.maximum
    assert (score.bad_rows, score.unreadable) == (("0",), 0 if task in NEVER_UNREADABLE else 1)
    assert score.partial
    assert f"(partial: {score.n} of {score.expected_n:,})" in score.name
    assert Score.from_dict(score.as_dict()) == score
    assert score.as_dict()["bad_rows"] == 1


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("mmstar", [], "no rows"),
        ("mmstar", [{"question": "?"}], "no column answer or gt_answer; its columns are: question"),
        ("mme", [{"answer": "yes", "question_id": "1", "category": "colors"}], "no subtask colors"),
        ("mathvista", [{"answer": "1"}], "no column question_type"),
        (
            "mathvista",
            [{"answer": "1", "question_type": "choice"}],
            "question_type is 'choice'; expected",
        ),
        (
            "mathvista",
            [{"answer": "1", "question_type": "free_form", "answer_type": "int"}],
            "answer_type is 'int'; expected one of text, integer, float, list",
        ),
        (
            "mathvista",
            [{"answer": "1", "question_type": "multi_choice", "answer_type": "text", "choices": None}],
            "multiple choice, but its column choices has no options",
        ),
        ("ai2d", [{"answer": "0", "options": [["a"], ["b"]]}], "an option must be a text"),
    ],
)
def test_unscorable_rows_are_rejected(task, rows, message):
    with pytest.raises(SoloError, match=message):
        get(task).score([Prediction(str(n), "x", row) for n, row in enumerate(rows)])


def test_duplicate_ids_are_rejected():
    twice = predictions("ai2d", oracle("ai2d"))[:1] * 2
    with pytest.raises(SoloError, match="two predictions have the ID 0"):
        get("ai2d").score(twice)


def test_unknown_benchmark_suggests_the_nearest():
    with pytest.raises(SoloError, match="did you mean mmstar"):
        get("mmstars")
