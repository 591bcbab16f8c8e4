"""MME against the formulas of its paper."""

from __future__ import annotations

import numpy as np
import pytest
from tests.evaluate.benchmark_rows import (
    MME_IMAGES,
    oracle,
    predictions,
)

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.utils.errors import SoloError


@pytest.mark.parametrize("constant", ["Yes", "no"])
def test_constant_answer_to_mme(constant):
    """Each image has one question of either answer: acc is 50, acc+ is 0 in every subtask."""
    score = get("mme").score(predictions("mme", lambda row: constant, full=True))
    assert score.score == 14 * 50
    assert score.breakdown["perception"].score == 10 * 50
    assert score.breakdown["cognition"].score == 4 * 50
    assert score.maximum == 2800
    for subtask, images in MME_IMAGES.items():
        part = score.breakdown[subtask]
        assert (part.score, part.n, part.more) == (50, 2 * images, {"acc": 50, "acc_plus": 0})


def test_acc_plus_needs_both_questions_of_an_image():
    wrong = {"count/0000.png": {"Yes"}, "OCR/0000.png": {"Yes", "No"}}

    def answer(row):
        flip = row["answer"] in wrong.get(row["question_id"], ())
        return {"Yes": "no", "No": "yes"}[row["answer"]] if flip else f"Answer: {row['answer'].lower()}"

    score = get("mme").score(predictions("mme", answer))  # two images per subtask
    assert score.breakdown["count"].more == {"acc": 75, "acc_plus": 50}
    assert score.breakdown["OCR"].more == {"acc": 50, "acc_plus": 50}
    assert score.score == 2800 - 75 - 100


def test_image_without_its_second_question_has_no_acc_plus():
    score = get("mme").score(predictions("mme", oracle("mme"))[:1])
    assert score.score == 100
    assert score.partial


def test_third_question_of_an_image_is_rejected():
    """Otherwise, the image could never have both questions correct."""
    answered = predictions("mme", oracle("mme"))
    answered.append(Prediction("again", answered[0].response, answered[0].row))
    with pytest.raises(SoloError, match=r"existence/0000.png has rows 0, 1, again"):
        get("mme").score(answered)


def test_random_answers_match_the_papers_formula():
    rng = np.random.default_rng(0)
    answered = predictions("mme", lambda row: str(rng.choice(["yes", "no", "perhaps"])), full=True)
    score = get("mme").score(answered)
    total = 0.0
    for subtask in MME_IMAGES:
        correct = [p.response == p.row["answer"].lower() for p in answered if p.row["category"] == subtask]
        pairs = np.array(correct).reshape(-1, 2)
        total += 100 * pairs.mean() + 100 * pairs.all(axis=1).mean()
    assert score.score == pytest.approx(total)
    assert score.unreadable == sum(p.response == "perhaps" for p in answered)
