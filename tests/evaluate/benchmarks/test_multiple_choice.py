"""Scores of known answers to the multiple-choice benchmarks."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.evaluate.benchmark_rows import (
    correct_response,
    oracle,
    predictions,
)

from solo_vlm.evaluate.benchmarks import BENCHMARKS, get

CHOICE_TASKS = [
    name
    for name in BENCHMARKS
    if BENCHMARKS[name].kind == "multiple choice" and name != "mmbench_en_dev"  # it reads like VLMEvalKit
]


@pytest.mark.parametrize("task", CHOICE_TASKS)
@pytest.mark.parametrize(
    "form", ["{low}", "({up})", "{up}) {text}", "The answer is {up}.", " {up}", "{text}"]
)
def test_every_multiple_choice_task_reads_common_forms(task, form):
    def answer(row):
        letter = correct_response(task, row)
        text = ("dog", "cat", "bird", "fish")["ABCD".index(letter)]
        return form.format(low=letter.lower(), up=letter, text=text)

    assert get(task).score(predictions(task, answer)).score == 100


def test_mmstar_is_a_mean_over_questions_and_reports_the_mean_over_axes():
    answered = predictions(
        "mmstar", lambda row: correct_response("mmstar", row) if row["l2_category"] == "geometry" else "none"
    )
    correct = sum(p.row["l2_category"] == "geometry" for p in answered)
    score = get("mmstar").score(answered)
    assert score.score == pytest.approx(100 * correct / len(answered))
    assert score.breakdown["math"].score == pytest.approx(100 * correct / 5)
    (macro,) = score.raw.values()
    assert macro == pytest.approx(100 / 18)


def test_seedbench_scores_images_only_and_by_dimension():
    def answer(row):
        return row["answer"] if row["data_type"] == "image" and row["question_type_id"] != 3 else "none"

    score = get("seedbench").score(predictions("seedbench", answer))
    assert score.score == pytest.approx(100 * 16 / 18)
    assert (score.n, score.filtered) == (18, 3)
    assert score.breakdown["instance location"].score == 0
    assert score.breakdown["instance attributes"].score == 100
    assert len([part for part in score.breakdown.values() if part.group == "image dimension"]) == 9
    assert score.raw == {"images and videos": pytest.approx(100 * 16 / 21)}


def test_scienceqa_breakdown():
    score = get("scienceqa_full").score(predictions("scienceqa_full", oracle("scienceqa"), full=True))
    parts = score.breakdown
    assert parts["image context"].n == 2017
    assert parts["grades 1-6"].n + parts["grades 7-12"].n == 4241
    assert parts["natural science"].n == 1414
    image_only = get("scienceqa").score(predictions("scienceqa_full", oracle("scienceqa")))
    assert (image_only.n, image_only.filtered) == (6, 4)


@pytest.mark.parametrize("task", CHOICE_TASKS)
@pytest.mark.parametrize("response", ["A, B", "A. dog\nB. cat\nC. bird\nD. fish", "Answer: A, B", ""])
def test_several_letters_are_unreadable_in_every_multiple_choice_task(task, response):
    score = get(task).score(predictions(task, lambda row: response))
    assert (score.score, score.unreadable) == (0, score.n)


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_constant_answer_scores_its_share(task):
    answered = predictions(task, lambda row: "B", full=task != "seedbench")
    chosen = [p.row for p in answered if p.row.get("data_type") != "video"]
    references = Counter(correct_response(task, row) for row in chosen)
    score = get(task).score(answered)
    assert score.score == pytest.approx(100 * references["B"] / len(chosen))
    low, high = score.interval
    assert low < score.score < high
