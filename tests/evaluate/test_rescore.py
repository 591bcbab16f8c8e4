"""`solo eval rescore` on the kinds of files in which people save predictions."""

from __future__ import annotations

import csv
import json

import pytest
from openpyxl import Workbook
from tests.evaluate.benchmark_rows import TASKS, correct_response, make_rows, rescore

from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.predictions import Prediction, load_predictions, without_images
from solo_vlm.evaluate.run_folder import RunFolder


def answered_rows(task):
    return [{**row, "prediction": correct_response(task, row)} for row in make_rows(task)]


def write_delimited(path, rows, delimiter=","):
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_xlsx(path, rows):
    book = Workbook()
    names = list(rows[0])
    book.active.append(names)
    for row in rows:
        cells = [row[name] for name in names]
        book.active.append([str(cell) if isinstance(cell, list | dict) else cell for cell in cells])
    book.save(path)


def write(path, rows):
    kinds = {
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".csv": lambda: write_delimited(path, rows),
        ".tsv": lambda: write_delimited(path, rows, "\t"),
        ".xlsx": lambda: write_xlsx(path, rows),
    }
    kinds[path.suffix]()
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "xlsx"])
@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_task_in_every_kind_of_file(task, kind, tmp_path):
    rows = answered_rows(task)
    score = rescore(get(task), write(tmp_path / f"predictions.{kind}", rows))
    assert score.score == score.maximum
    assert score.n + score.filtered == len(rows)
    assert all(part.score == part.maximum for part in score.breakdown.values())


@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx", "json"])
def test_vlmevalkits_columns(kind, tmp_path):
    rows = [
        {
            "index": 1,
            "Question": "?",
            "A": "dog",
            "B": "cat",
            "C": "",
            "answer": "B",
            "Category": "math",
            "Prediction": "Cat",
        },
        {
            "index": 2,
            "Question": "?",
            "A": "1",
            "B": "2",
            "C": "3",
            "answer": "C",
            "Category": "math",
            "Prediction": "(C)",
        },
        {
            "index": 3,
            "Question": "?",
            "A": "dog",
            "B": "cat",
            "C": "",
            "answer": "A",
            "Category": "math",
            "Prediction": "cat",
        },
    ]
    score = rescore(get("mmstar"), write(tmp_path / f"x.{kind}", rows))
    assert score.score == pytest.approx(200 / 3)
    assert score.breakdown["math"].n == 3


@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx", "json", "jsonl"])
@pytest.mark.parametrize("response", ["D", "Three", "(D) Three", "The answer is three."])
@pytest.mark.parametrize("task", ["mmstar", "seedbench", "ai2d", "scienceqa"])
def test_letters_keep_their_places_beside_an_empty_option(task, response, kind, tmp_path):
    options = {"A": "Two", "B": "One", "C": None, "D": "Three"}
    row = {"index": 391, "question": "How many?", **options, "answer": "D", "prediction": response}
    score = rescore(get(task), write(tmp_path / f"x.{kind}", [row]))
    assert (score.score, score.bad_rows, score.unreadable) == (100, (), 0)


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["dog", "cat"], "answer": "1"},
        {"options": ["dog", "cat"], "answer": 1},
        {"options": "['dog', 'cat']", "gt_answer": "B"},
        {"options": "['dog'\n 'cat']", "answer": "B"},
        {"options": "array(['dog', 'cat'], dtype=object)", "answer": "1"},
        {"options": "('dog', 'cat')", "answer": "1"},
        {"options": {"B": "cat", "A": "dog"}, "answer": "b"},
        {"choices": {"label": ["A", "B"], "text": ["dog", "cat"]}, "answer": "B"},
        {"options": ["A. dog", "B. cat"], "answer": "cat"},
        {"choices": '["dog", "cat"]', "answer": "cat"},
        {"options": "A. dog\nB. cat", "answer": "(B)"},
        {"options": "dog\ncat", "answer": "1"},
        {"options": {"A": "dog", "B": "cat"}, "answer": "b"},
        {"choice_a": "dog", "choice_b": "cat", "answer": "B"},
        {"A": "1", "B": "cat", "answer": "B"},
        {"question": "Which?\nOptions: A: a dog, or so, B: cat, C: Vitamin B. or C", "answer": "B"},
        {"question": "Which?\nChoices:\n(A) dog\n(B) cat\n(C) fish", "answer": "B"},
        {"question": "Which?\nA. dog\nB. cat", "answer": "B"},
    ],
)
@pytest.mark.parametrize("response", ["B", "cat"])
def test_forms_of_options_and_answers(row, response, tmp_path):
    path = write(tmp_path / "x.jsonl", [{**row, "response": response}])
    assert rescore(get("ai2d"), path).score == 100
    assert rescore(get("ai2d"), write(path, [{**row, "response": "A"}])).score == 0


def test_numbers_as_options_are_not_places_where_options_have_columns(tmp_path):
    rows = [{"A": "3", "B": "1", "answer": "1", "prediction": "B"}]
    assert rescore(get("ai2d"), write(tmp_path / "x.csv", rows)).score == 100


def test_letters_suffice(tmp_path):
    rows = [{"answer": "A", "prediction": "The answer is A."}, {"answer": "D", "prediction": "C"}]
    assert rescore(get("mmstar"), write(tmp_path / "x.csv", rows)).score == 50


def test_a_row_without_a_response_is_a_bad_row(tmp_path):
    rows = [{"answer": "A", "prediction": "A"}, {"answer": "A", "prediction": None}, {"answer": "A"}]
    score = rescore(get("mmstar"), write(tmp_path / "x.jsonl", rows))
    assert score.score == pytest.approx(100 / 3)
    assert score.bad_rows == ("2", "3")


def test_mmes_text_files(tmp_path):
    """Two images in each of two subtasks; the first image's second question is answered wrongly."""
    for subtask in ("existence", "OCR"):
        lines = [
            "1.jpg\tIs there a dog? Please answer yes or no.\tYes\tyes",
            "1.jpg\tIs there a cat? Please answer yes or no.\tNo\tYes, there is.",
            "2.jpg\tIs there a dog? Please answer yes or no.\tYes\tAnswer: yes",
            "2.jpg\tIs there a cat? Please answer yes or no.\tNo\tno",
        ]
        (tmp_path / f"{subtask}.txt").write_text("\n".join(lines) + "\n")
    score = rescore(get("mme"), tmp_path)
    assert score.score == 2 * (75 + 50)
    assert score.breakdown["OCR"].more == {"acc": 75, "acc_plus": 50}
    assert rescore(get("mme"), tmp_path / "OCR.txt").score == 125


def test_mathvistas_result_json(tmp_path):
    free = {"question_type": "free_form", "choices": None}
    choice = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["tokyo", "osaka"],
        "precision": None,
    }
    metadata = {"task": "figure question answering", "skills": ["logical reasoning"]}
    results = {
        "7": {
            **free,
            "answer_type": "float",
            "precision": 1.0,
            "answer": "0.6",
            "response": "It is 0.6",
            "metadata": metadata,
        },
        "8": {**free, "answer_type": "integer", "precision": None, "answer": "3", "extraction": "3.0"},
        "9": {**choice, "answer": "osaka", "extraction": "osakka", "response": "So osakka."},
        "10": {**choice, "answer": "osaka", "response": "So osakka.", "prediction": "osaka"},
    }
    path = tmp_path / "output.json"
    path.write_text(json.dumps(results))
    score = rescore(get("mathvista"), path)
    assert score.score == 75
    assert [prediction.id for prediction in load_predictions(path)] == ["7", "8", "9", "10"]
    assert score.breakdown["logical reasoning"].n == 1


def test_lines_end_where_json_says(tmp_path):
    """Some characters end a line for Python's splitlines, but not in JSON."""
    answered = [Prediction("1", "A\u2028\x85B", {"answer": "A"})]
    RunFolder(tmp_path).write_predictions("mmstar", answered)
    assert RunFolder(tmp_path).read_predictions("mmstar") == answered
    path = tmp_path / "x.jsonl"
    path.write_text('{"answer": "A", "response": "A\u2028"}\n', encoding="utf-8")
    assert rescore(get("mmstar"), path).score == 100


@pytest.mark.parametrize("task", TASKS)
def test_the_predictions_of_a_run(task, tmp_path):
    answered = [
        Prediction(f"row {n}", correct_response(task, row), without_images(row))
        for n, row in enumerate(make_rows(task))
    ]
    folder = RunFolder(tmp_path)
    folder.write_predictions(task, answered)
    assert folder.tasks == [task]
    assert folder.read_predictions(task) == answered
    assert rescore(get(task), folder.predictions_file(task)) == get(task).score(answered)


def test_json_on_the_command_line(run, tmp_path):
    path = write(tmp_path / "x.csv", answered_rows("mmstar"))
    code, out, error = run("eval", "rescore", "--task", "mmstar", "--predictions", path, "--json")
    assert (code, error) == (0, "")
    score = json.loads(out)
    assert (score["task"], score["n"], score["score"]) == ("mmstar", 30, 100)
    assert score["partial"] is True
    assert score["name"] == "MMStar (partial: 30 of 1,500)"
    assert score["breakdown"]["math"]["n"] == 5
    assert 80 < score["interval"][0] < score["interval"][1] == 100


def test_the_table_on_the_command_line(run, tmp_path):
    path = write(tmp_path / "x.jsonl", [*answered_rows("mme"), {**make_rows("mme")[0], "question_id": "9"}])
    code, out, error = run("eval", "rescore", "--task", "mme", "--predictions", path)
    assert (code, error) == (0, "")
    plain = " ".join(out.split())
    for text in (
        "MME (partial: 57 of 2,374)",
        "perception",
        "OCR │ 100.0 │ 100.0 │ 200.0",
        "counted as wrong: 1 (rows 57)",
        "2306.13394",
    ):
        assert text in plain


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "answer,text\nA,B\n", "no column prediction or response; its columns are: answer, text"),
        ("x.csv", "prediction,text\nA,B\n", "row 1 has no column answer or gt_answer; its columns are: text"),
        ("x.csv", "answer,prediction\nA,B,C\n", "line 2 has more cells"),
        ("x.csv", "answer,prediction\n", "has no rows"),
        ("x.json", "{", "cannot read"),
        ("x.jsonl", "[1]\n", "cannot read"),
        ("x.xlsx", "no workbook", "cannot read"),
        ("x.parquet", "", "predictions are read from .jsonl, .json, .csv, .tsv, .xlsx, .txt"),
        ("x.txt", "1.jpg\tIs it?\tYes\n", "line 1 of x.txt is not image, question, answer, response"),
    ],
)
def test_a_file_that_cannot_be_scored_is_one_line(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    code, out, error = run("eval", "rescore", "--task", "mmstar", "--predictions", tmp_path / name)
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "mmstarr"], "did you mean mmstar"),
        (["--task", "mmstar"], "does not exist"),
        (["--task", "mmstar", "--judge", "m"], "--judge is for mathvista only"),
        (["--task", "mathvista", "--judge-url", "http://x"], "needs --judge MODEL"),
    ],
)
def test_wrong_options(run, options, message):
    code, _, error = run("eval", "rescore", *options, "--predictions", "nowhere.csv")
    assert code == 2
    assert message in error
