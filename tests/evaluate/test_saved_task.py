"""Files of questions and tasks of lmms-eval: saved answers are scored again, and runs are compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.evaluate.evaluation_runs import ScriptedBackend

from solo_vlm.evaluate.predictions import ROW_VALUES, Prediction
from solo_vlm.evaluate.question_run import QuestionRun, load_files
from solo_vlm.evaluate.questions import QuestionSettings
from solo_vlm.evaluate.run import ModelInfo
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.evaluate.scoring.score import Part, Score

QUESTIONS = [
    {"question": "Which <image> digit?", "answer": ["four", "4"]},
    {"question": "Which color?", "answer": "green", "options": ["red", "green"]},
    {"question": "2 + 2?", "answer": 4},
    {"question": "What does it say?", "answer": "no parking", "metric": "anls"},
] * 5
RIGHT = ["4", "(B)", "It is 4.", "no parking"]
HALF = ["4", "A", "4", "no paring"]
WRONG = ["5", "A", "5", "?"]


@pytest.fixture
def ask(tmp_path):
    """Return a function that answers a file of questions, and returns the folder of the run."""
    questions = [{**row, "question": row["question"].replace("<image>", "")} for row in QUESTIONS]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    def ask(name, answers, **options):
        run = QuestionRun(tmp_path / name, ModelInfo(name, "scripted", "0"), **options)
        files = load_files({"q": QuestionSettings(path=str(tmp_path / "q.jsonl"))})
        run.evaluate(ScriptedBackend(answers), files)
        return tmp_path / name

    return ask


def test_answers_to_questions_are_scored_again_as_by_the_run(run, ask):
    out = ask("a", HALF * 5)
    file = out / "predictions/q.jsonl"
    code, printed, error = run("eval", "rescore", "--task", "q", "--predictions", file, "--json")
    assert (code, error) == (0, "")
    (score,) = json.loads((out / "scores.json").read_text())
    assert json.loads(printed) == {**score, "source": str(file)}
    assert 25 < score["score"] < 75


def test_answers_to_questions_are_compared_pair_by_pair(run, ask):
    first, second = ask("a", WRONG * 5), ask("b", RIGHT * 3 + HALF * 2, limit=16)
    code, printed, error = run("eval", "compare", first, second, "--json")
    assert (code, error) == (0, "")
    (task,) = json.loads(printed)["tasks"]
    assert (task["task"], task["n"], task["left_out"], task["first"]) == ("q", 16, 4, 0)
    assert (task["only_first"], task["only_second"]) == (0, 14)
    assert task["second"] == pytest.approx(100 * (14 + 0.9) / 16)
    assert task["interval"][0] < task["difference"] < task["interval"][1]


def test_answers_to_another_file_of_questions_are_rejected(run, ask, tmp_path):
    first, second = ask("a", WRONG * 5), ask("b", RIGHT * 5)
    file = second / "predictions/q.jsonl"
    file.write_text(file.read_text().replace("Which color?", "Which tint?"))
    code, _, error = run("eval", "compare", first, second)
    assert code == 2
    assert "q: row 2 is another question" in " ".join(error.split())


def test_predictions_without_a_question_are_one_line(run, tmp_path):
    RunFolder(tmp_path).write_predictions(
        "q", [Prediction("1", "x", {"question": "?", "answer": [], "options": [], "metric": "exact"})]
    )
    code, _, error = run("eval", "rescore", "--task", "q", "--predictions", tmp_path / "predictions/q.jsonl")
    assert code == 2
    assert "prediction 1 has no question with answers, options and metric" in " ".join(error.split())


def write_harness_run(folder, values, metric="accuracy", score=None, row_metric=None):
    """Write a run of lmms-eval's tasks `colors`, as `EvaluationRun` does."""
    predictions = [
        Prediction(str(n), "red", {"question": f"color {n}?", ROW_VALUES: {row_metric or metric: value}})
        for n, value in enumerate(values)
    ]
    run, mean = RunFolder(folder), float(np.mean(values)) if score is None else score
    run.write_predictions("colors", predictions)
    count = len(values)
    parts = {metric: Part(mean, count, None, "metric", None)}
    units = f"lmms-eval's {metric}, in its units"
    run.write_scores(
        [Score("colors", "colors", mean, None, count, 40, units, "lmms-eval", parts, maximum=None)]
    )
    return folder


def test_tasks_of_lmms_eval_are_compared_by_their_values(run, tmp_path):
    first = write_harness_run(tmp_path / "a", [0.0] * 20 + [1.0] * 20)
    second = write_harness_run(tmp_path / "b", [0.0] * 5 + [1.0] * 30)
    code, printed, error = run("eval", "compare", first, second, "--json")
    assert (code, error) == (0, "")
    (task,) = json.loads(printed)["tasks"]
    assert (task["n"], task["left_out"], task["only_second"]) == (35, 5, 15)
    assert (task["first"], task["second"]) == (pytest.approx(15 / 35), pytest.approx(30 / 35))
    assert 0 < task["interval"][0] < task["difference"] < task["interval"][1] < 1
    code, printed, _ = run("eval", "compare", first, second)
    assert "+0.4286" in printed


def test_task_of_lmms_eval_is_scored_again_by_its_values(run, tmp_path):
    folder = write_harness_run(tmp_path / "a", [0.0] * 10 + [1.0] * 30)
    file = folder / "predictions/colors.jsonl"
    code, printed, error = run("eval", "rescore", "--task", "colors", "--predictions", file, "--json")
    assert (code, error) == (0, "")
    score = json.loads(printed)
    assert (score["score"], score["n"], score["partial"]) == (0.75, 40, False)
    assert 0.5 < score["interval"][0] < 0.75 < score["interval"][1] < 1


@pytest.mark.parametrize("change", [{"score": 0.3}, {"row_metric": "other"}], ids=["F1", "no value per row"])
def test_metric_that_is_no_mean_of_values_is_one_line(run, tmp_path, change):
    first, second = (write_harness_run(tmp_path / name, [0.0, 1.0], "f1", **change) for name in "ab")
    expected = "colors: lmms-eval's f1 is no mean of one value per question"
    file = first / "predictions/colors.jsonl"
    for command in (
        ("compare", first, second),
        ("rescore", "--task", "colors", "--predictions", file),
    ):
        code, _, error = run("eval", *command)
        assert (code, expected in " ".join(error.split())) == (2, True)
    for folder in (first, second):
        RunFolder(folder).write_predictions(
            "q", [Prediction("1", "x", {"question": "?", "answer": ["x"], "options": [], "metric": "exact"})]
        )
    code, printed, _ = run("eval", "compare", first, second)
    assert code == 0
    assert f"not compared: {expected}" in printed
