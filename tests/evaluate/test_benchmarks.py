"""Scores of answers that are known, on made-up rows in the true schemas."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tests.evaluate.benchmark_rows import FLOATS, MATHVISTA_TASKS, MME_IMAGES, correct_response, make_rows

from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.predictions import Prediction, without_images
from solo_vlm.evaluate.scoring.score import Score
from solo_vlm.utils.errors import SoloError

CHOICE_TASKS = [name for name in BENCHMARKS if BENCHMARKS[name].kind == "multiple choice"]


def predictions(task, answer, full=False):
    rows = make_rows(task, full)
    return [Prediction(str(n), answer(row), without_images(row)) for n, row in enumerate(rows)]


def oracle(task):
    return lambda row: correct_response(task, row)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_an_oracle_is_perfect_on_the_whole_benchmark(task):
    score = get(task).score(predictions(task, oracle(task), full=True))
    assert score.score == score.maximum
    assert score.n == score.expected_n
    assert score.name == score.title
    assert (score.unreadable, score.bad_rows) == (0, ())
    assert all(part.score == part.maximum for part in score.breakdown.values())
    assert all(
        part.n == part.expected_n for part in score.breakdown.values() if part.group in ("category", "task")
    )


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_a_constant_answer_scores_its_share(task):
    answered = predictions(task, lambda row: "B", full=task != "seedbench")
    chosen = [p.row for p in answered if p.row.get("data_type") != "video"]
    truths = Counter(correct_response(task, row) for row in chosen)
    score = get(task).score(answered)
    assert score.score == pytest.approx(100 * truths["B"] / len(chosen))
    low, high = score.interval
    assert low < score.score < high


@pytest.mark.parametrize("constant", ["Yes", "no"])
def test_a_constant_answer_to_mme(constant):
    """Each image has one question of either answer: acc is 50, acc+ is 0 in every subtask."""
    score = get("mme").score(predictions("mme", lambda row: constant, full=True))
    assert score.score == 14 * 50
    assert score.breakdown["perception"].score == 10 * 50
    assert score.breakdown["cognition"].score == 4 * 50
    assert score.maximum == 2800
    for subtask, images in MME_IMAGES.items():
        part = score.breakdown[subtask]
        assert (part.score, part.n, part.more) == (50, 2 * images, {"acc": 50, "acc_plus": 0})


def test_a_constant_answer_to_mathvista():
    rows = make_rows("mathvista", full=True)
    score = get("mathvista").score(predictions("mathvista", lambda row: "B", full=True))
    assert score.score == pytest.approx(sum(correct_response("mathvista", row) == "B" for row in rows) / 10)
    assert score.unreadable == sum(row["question_type"] == "free_form" for row in rows)


@pytest.mark.parametrize("task", CHOICE_TASKS)
@pytest.mark.parametrize(
    "form", ["{low}", "({up})", "{up}) {text}", "The answer is {up}.", " {up}", "{text}"]
)
def test_every_multiple_choice_task_reads_the_usual_forms(task, form):
    def answer(row):
        letter = correct_response(task, row)
        text = ("dog", "cat", "bird", "fish")["ABCD".index(letter)]
        return form.format(low=letter.lower(), up=letter, text=text)

    assert get(task).score(predictions(task, answer)).score == 100


@pytest.mark.parametrize("task", BENCHMARKS)
def test_a_failed_row_counts_as_wrong_and_is_named(task):
    answered = predictions(task, oracle(task))
    answered[0] = Prediction("0", None, answered[0].row)
    answered[1] = Prediction("1", "Hm.", answered[1].row)
    score = get(task).score(answered)
    assert score.score < score.maximum
    assert (score.bad_rows, score.unreadable) == (("0",), 1)
    assert score.partial
    assert f"(partial: {score.n} of {score.expected_n:,})" in score.name
    assert Score.from_dict(score.as_dict()) == score
    assert score.as_dict()["bad_rows"] == 1


def test_mmstar_is_a_mean_over_questions_and_names_the_mean_over_axes():
    answered = predictions(
        "mmstar", lambda row: correct_response("mmstar", row) if row["l2_category"] == "geometry" else "none"
    )
    right = sum(p.row["l2_category"] == "geometry" for p in answered)
    score = get("mmstar").score(answered)
    assert score.score == pytest.approx(100 * right / len(answered))
    assert score.breakdown["math"].score == pytest.approx(100 * right / 5)
    (macro,) = score.raw.values()
    assert macro == pytest.approx(100 / 18)


def test_mme_gives_acc_plus_only_for_both_questions_of_an_image():
    wrong = {"count/0000.png": {"Yes"}, "OCR/0000.png": {"Yes", "No"}}

    def answer(row):
        flip = row["answer"] in wrong.get(row["question_id"], ())
        return {"Yes": "no", "No": "yes"}[row["answer"]] if flip else f"Answer: {row['answer'].lower()}"

    score = get("mme").score(predictions("mme", answer))  # two images a subtask
    assert score.breakdown["count"].more == {"acc": 75, "acc_plus": 50}
    assert score.breakdown["OCR"].more == {"acc": 50, "acc_plus": 50}
    assert score.score == 2800 - 75 - 100


def test_mme_without_the_second_question_of_an_image():
    score = get("mme").score(predictions("mme", oracle("mme"))[:1])
    assert score.score == 100
    assert score.partial


def test_mme_with_a_third_question_of_an_image_is_an_error():
    """Counted, the image could never have both of its questions right."""
    answered = predictions("mme", oracle("mme"))
    answered.append(Prediction("again", answered[0].response, answered[0].row))
    with pytest.raises(SoloError, match=r"existence/0000.png has rows 0, 1, again"):
        get("mme").score(answered)


def test_seed_counts_images_only_and_by_dimension():
    def answer(row):
        return row["answer"] if row["data_type"] == "image" and row["question_type_id"] != 3 else "none"

    score = get("seedbench").score(predictions("seedbench", answer))
    assert score.score == pytest.approx(100 * 16 / 18)
    assert (score.n, score.filtered) == (18, 3)
    assert score.breakdown["instance location"].score == 0
    assert score.breakdown["instance attributes"].score == 100
    assert len([part for part in score.breakdown.values() if part.group == "image dimension"]) == 9
    assert score.raw == {"images and videos": pytest.approx(100 * 16 / 21)}


def test_scienceqa_parts():
    score = get("scienceqa_full").score(predictions("scienceqa_full", oracle("scienceqa"), full=True))
    parts = score.breakdown
    assert parts["image context"].n == 2017
    assert parts["grades 1-6"].n + parts["grades 7-12"].n == 4241
    assert parts["natural science"].n == 1414
    image_only = get("scienceqa").score(predictions("scienceqa_full", oracle("scienceqa")))
    assert (image_only.n, image_only.filtered) == (6, 4)


def test_all_float_questions_of_mathvista_score():
    answered = predictions(
        "mathvista",
        lambda row: f"It is about {float(row['answer']) + 0.001:.6f}" if row["precision"] else "?",
        full=True,
    )
    score = get("mathvista").score(answered)
    assert (score.breakdown["float"].n, score.breakdown["float"].score) == (FLOATS, 100)
    assert {name: part.n for name, part in score.breakdown.items() if part.group == "task"} == MATHVISTA_TASKS
    assert score.breakdown["logical reasoning"].n == 500


@pytest.mark.parametrize(
    ("answer", "answer_type", "precision", "response", "right"),
    [
        ("14", "integer", None, "The number is 14.", True),
        ("14", "integer", float("nan"), "14.0", True),
        ("14", "integer", None, "15", False),
        ("0.6", "float", 1.0, "The fraction is 0.6, 6 of 10", False),  # the last number is not the answer
        ("0.6", "float", 1.0, "The answer is 0.6, six of 10", True),
        ("1.45", "float", 2, "Luca needs $1.45", True),
        ("2.50", "float", "2.0", "2.5", True),
        ("1.45", "float", 2.0, "1e999", False),
        ("0.0", "float", 1.0, "-0.04", True),
        ("0.5", "float", 1.0, "The answer is 1/2", True),
        ("-5", "integer", None, "–5", True),
        ("1234", "integer", None, "1{,}234", True),
        ("1,234", "integer", None, "1234", True),
        ("7", "integer", None, "7</s>", True),
        ("12", "integer", None, "3-12", False),
        ("dog", "text", None, "Dog.<|im_end|>", True),
        ("[2007, 2008]", "list", None, "between [2007,2008]", True),
        ("[2007, 2008]", "list", None, "2007", False),
    ],
)
def test_free_answers_of_mathvista(answer, answer_type, precision, response, right):
    row = {"question_type": "free_form", "answer_type": answer_type, "precision": precision, "answer": answer}
    assert get("mathvista").score([Prediction("1", response, row)]).score == 100 * right


def test_rules_never_guess_the_nearest_option_but_an_extraction_does():
    row = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["hong kong", "osaka"],
        "answer": "osaka",
    }
    mathvista = get("mathvista")
    assert mathvista.score([Prediction("1", "osakaa", row)]).score == 0
    assert mathvista.score([Prediction("1", "so B", {**row, "extraction": "osakaa"})]).score == 100
    assert mathvista.score([Prediction("1", "x", {**row, "extraction": "(B) hong kong"})]).score == 100


def test_the_same_scores_as_the_formulas_of_the_papers_on_random_answers():
    rng = np.random.default_rng(0)
    answered = predictions("mme", lambda row: str(rng.choice(["yes", "no", "perhaps"])), full=True)
    score = get("mme").score(answered)
    total = 0.0
    for subtask in MME_IMAGES:
        right = [p.response == p.row["answer"].lower() for p in answered if p.row["category"] == subtask]
        pairs = np.array(right).reshape(-1, 2)
        total += 100 * pairs.mean() + 100 * pairs.all(axis=1).mean()
    assert score.score == pytest.approx(total)
    assert score.unreadable == sum(p.response == "perhaps" for p in answered)


def choice_of_mathvista(choices, answer, response, **more):
    row = {"question_type": "multi_choice", "answer_type": "text", "choices": choices, "answer": answer}
    return get("mathvista").score([Prediction("1", response, {**row, **more})])


def test_choices_of_mathvista_beside_an_empty_one():
    for empty in (None, "", float("nan")):
        for response in ("D", "three", "The answer is (D) three"):
            assert choice_of_mathvista(["two", "one", empty, "three"], "three", response).score == 100
    assert choice_of_mathvista("['two' 'one' nan 'three']", "three", "D").score == 100
    # The empty text would be the nearest to anything short.
    assert choice_of_mathvista(["thee", "", "osaka"], "thee", "x", extraction="hee").score == 100


def test_choices_of_mathvista_that_differ_in_case_or_stand_there_twice():
    assert choice_of_mathvista(["mW", "MW"], "MW", "MW").score == 100
    assert choice_of_mathvista(["mW", "MW"], "MW", "mW").score == 0
    assert choice_of_mathvista(["5", "7", "5"], "5", "C").score == 100


@pytest.mark.parametrize("task", CHOICE_TASKS)
@pytest.mark.parametrize("response", ["A, B", "A. dog\nB. cat\nC. bird\nD. fish", "Answer: A, B", ""])
def test_several_letters_are_unreadable_in_every_task(task, response):
    score = get(task).score(predictions(task, lambda row: response))
    assert (score.score, score.unreadable) == (0, score.n)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("mmstar", [], "no rows"),
        ("mmstar", [{"question": "?"}], "no column answer or gt_answer; its columns are: question"),
        ("mme", [{"answer": "yes", "question_id": "1", "category": "colour"}], "no subtask colour"),
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
def test_rows_that_cannot_be_scored_are_an_error(task, rows, message):
    with pytest.raises(SoloError, match=message):
        get(task).score([Prediction(str(n), "x", row) for n, row in enumerate(rows)])


def test_two_predictions_with_one_id_are_an_error():
    twice = predictions("ai2d", oracle("ai2d"))[:1] * 2
    with pytest.raises(SoloError, match="two predictions have the ID 0"):
        get("ai2d").score(twice)


def test_an_unknown_benchmark():
    with pytest.raises(SoloError, match="did you mean mmstar"):
        get("mmstars")
