"""Saved predictions in every supported file format: rows are neither invented nor merged."""

from __future__ import annotations

import csv
import json
from datetime import datetime

import pytest
from openpyxl import Workbook
from openpyxl.styles import Font, PatternFill
from tests.evaluate.benchmark_rows import TASKS, correct_response, make_rows, rescore

from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.predictions import Prediction, load_predictions, read_table, without_images
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.utils.errors import SoloError


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
def test_every_task_in_every_file_format(task, kind, tmp_path):
    rows = answered_rows(task)
    score = rescore(get(task), write(tmp_path / f"predictions.{kind}", rows))
    assert score.score == score.maximum
    assert score.n + score.filtered == len(rows)
    assert all(part.score == part.maximum for part in score.breakdown.values())


@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx", "json"])
def test_vlmevalkit_columns(kind, tmp_path):
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
def test_empty_option_keeps_later_letters(task, response, kind, tmp_path):
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
def test_formats_of_options_and_references(row, response, tmp_path):
    path = write(tmp_path / "x.jsonl", [{**row, "response": response}])
    assert rescore(get("ai2d"), path).score == 100
    assert rescore(get("ai2d"), write(path, [{**row, "response": "A"}])).score == 0


def test_numeric_reference_is_not_an_index_if_options_have_columns(tmp_path):
    rows = [{"A": "3", "B": "1", "answer": "1", "prediction": "B"}]
    assert rescore(get("ai2d"), write(tmp_path / "x.csv", rows)).score == 100


def test_letters_without_options(tmp_path):
    rows = [{"answer": "A", "prediction": "The answer is A."}, {"answer": "D", "prediction": "C"}]
    assert rescore(get("mmstar"), write(tmp_path / "x.csv", rows)).score == 50


def test_row_without_a_response_is_a_bad_row(tmp_path):
    rows = [{"answer": "A", "prediction": "A"}, {"answer": "A", "prediction": None}, {"answer": "A"}]
    score = rescore(get("mmstar"), write(tmp_path / "x.jsonl", rows))
    assert score.score == pytest.approx(100 / 3)
    assert score.bad_rows == ("2", "3")


def test_mme_text_files(tmp_path):
    """Two images in each of two subtasks; the second question of the first image is wrong."""
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


def test_mathvista_result_json(tmp_path):
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


def test_json_lines_with_unicode_line_separators(tmp_path):
    """Some characters end a line for str.splitlines, but not in JSON."""
    answered = [Prediction("1", "A\u2028\x85B", {"answer": "A"})]
    RunFolder(tmp_path).write_predictions("mmstar", answered)
    assert RunFolder(tmp_path).read_predictions("mmstar") == answered
    path = tmp_path / "x.jsonl"
    path.write_text('{"answer": "A", "response": "A\u2028"}\n', encoding="utf-8")
    assert rescore(get("mmstar"), path).score == 100


@pytest.mark.parametrize("task", TASKS)
def test_predictions_of_a_run(task, tmp_path):
    answered = [
        Prediction(f"row {n}", correct_response(task, row), without_images(row))
        for n, row in enumerate(make_rows(task))
    ]
    folder = RunFolder(tmp_path)
    folder.write_predictions(task, answered)
    assert folder.tasks == [task]
    assert folder.read_predictions(task) == answered
    assert rescore(get(task), folder.predictions_file(task)) == get(task).score(answered)


def test_rescore_json(run, tmp_path):
    path = write(tmp_path / "x.csv", answered_rows("mmstar"))
    code, out, error = run("eval", "rescore", "--task", "mmstar", "--predictions", path, "--json")
    assert (code, error) == (0, "")
    score = json.loads(out)
    assert (score["task"], score["n"], score["score"]) == ("mmstar", 30, 100)
    assert score["partial"] is True
    assert score["name"] == "MMStar (partial: 30 of 1,500)"
    assert score["breakdown"]["math"]["n"] == 5
    assert 80 < score["interval"][0] < score["interval"][1] == 100


def test_rescore_table(run, tmp_path):
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
def test_unscorable_file_is_a_one_line_error(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    code, out, error = run("eval", "rescore", "--task", "mmstar", "--predictions", tmp_path / name)
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "mmstar"], "does not exist"),
        (["--task", "mmstar", "--judge", "m"], "--judge is for mathvista only"),
        (["--task", "mathvista", "--judge-url", "http://x"], "needs --judge MODEL"),
    ],
)
def test_invalid_options_are_rejected(run, options, message):
    code, _, error = run("eval", "rescore", *options, "--predictions", "nowhere.csv")
    assert code == 2
    assert message in error


def test_unknown_task_is_rejected(run, tmp_path):
    (tmp_path / "saved.csv").write_text(table(ROW))
    code, _, error = run("eval", "rescore", "--task", "mmstarr", "--predictions", tmp_path / "saved.csv")
    assert code == 2
    assert "did you mean mmstar" in error


ROW = {"index": 1, "question": "?", "A": "dog", "B": "cat", "answer": "B", "prediction": "cat"}


def table(*rows):
    """Return CSV text of rows like ROW."""
    names = list(ROW)
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_blank_formatted_rows_of_a_sheet_are_ignored(tmp_path):
    book = Workbook()
    sheet = book.active
    sheet.append(list(ROW))
    sheet.append(list(ROW.values()))
    for row in range(3, 8):
        for column in range(1, 9):
            cell = sheet.cell(row, column)
            cell.fill, cell.font = PatternFill("solid", "FFFF00"), Font(bold=True)
    sheet.cell(6, 2).value = "  "
    sheet.append([2, *list(ROW.values())[1:]])
    book.save(tmp_path / "x.xlsx")
    score = rescore(get("mmstar"), tmp_path / "x.xlsx")
    assert (score.n, score.score, score.bad_rows) == (2, 100, ())


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_rows_of_empty_cells_are_ignored(tmp_path, kind):
    text = table(ROW) + ",,,,,\n\n , ,,,,\n" + table({**ROW, "index": 2}).split("\n")[1] + "\n"
    (tmp_path / f"x.{kind}").write_text(text.replace(",", "\t") if kind == "tsv" else text)
    score = rescore(get("mmstar"), tmp_path / f"x.{kind}")
    assert (score.n, score.score) == (2, 100)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", table(ROW)),
        ("x.tsv", table(ROW).replace(",", "\t")),
        ("x.json", json.dumps([ROW])),
        ("x.jsonl", lines(ROW)),
    ],
)
def test_byte_order_mark_is_ignored(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert rescore(get("mmstar"), tmp_path / name).score == 100
    (prediction,) = load_predictions(tmp_path / name)
    assert str(prediction.row["index"]) == "1"


def test_byte_order_mark_in_mme_text_file_is_ignored(tmp_path):
    text = "1.jpg\tIs there a dog?\tYes\tyes\n1.jpg\tIs there a cat?\tNo\tno\n"
    (tmp_path / "OCR.txt").write_text(text, encoding="utf-8-sig")
    assert rescore(get("mme"), tmp_path / "OCR.txt").score == 200


def test_byte_order_mark_in_files_of_a_run_is_ignored(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_predictions("mmstar", [Prediction("1", "A", {"answer": "A"})])
    folder.write_metadata({"a": 1})
    for file in (folder.predictions_file("mmstar"), tmp_path / "run.json"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert folder.read_predictions("mmstar") == [Prediction("1", "A", {"answer": "A"})]
    assert folder.read_metadata() == {"a": 1}
    assert rescore(get("mmstar"), folder.predictions_file("mmstar")).score == 100


@pytest.mark.parametrize("column", ["pid", "index", "id", "Index"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_duplicate_row_ids_are_rejected(run, tmp_path, column, kind):
    rest = {name: value for name, value in ROW.items() if name != "index"}
    rows = [{column: name, **rest} for name in (5, 6, 5)]
    header = ",".join(rows[0]) + "\n"
    text = header + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    (tmp_path / f"x.{kind}").write_text(text if kind == "csv" else lines(*rows))
    code, out, error = run("eval", "rescore", "--task", "mmstar", "--predictions", tmp_path / f"x.{kind}")
    assert (code, out) == (2, "")
    assert f"rows 1 and 3 have the same {column.lower()}, 5" in error
    assert error.count("\n") == 1


def test_row_ids_are_compared_as_text_within_a_split(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(lines({**ROW, "split": "val"}, {**ROW, "split": "test"}))
    assert rescore(get("mmstar"), path).n == 2
    path.write_text(lines({**ROW, "index": 1}, {**ROW, "index": "1.0"}))
    with pytest.raises(SoloError, match="the same index, 1"):
        rescore(get("mmstar"), path)
    path.write_text(lines({**ROW, "index": None}, {**ROW, "index": float("nan")}, ROW))
    assert rescore(get("mmstar"), path).n == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "answer,prediction,Prediction\nA,A,B\n", "2 columns are called prediction"),
        (
            "x.jsonl",
            '{"answer": "A", "prediction": "A", "Prediction": "B"}\n',
            "two columns are called prediction",
        ),
        ("x.jsonl", '{"answer": "A", "prediction": "A", "prediction": "B"}\n', "called 'prediction'"),
        ("x.json", '{"1": {"answer": "A"}, "1": {"answer": "B"}}', "called '1'"),
    ],
)
def test_duplicate_names_with_different_values_are_rejected(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SoloError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("open-quote.csv", 'answer,prediction\nA,"B, since\nB,B\nC,C\n'),
        ("quote-within.tsv", 'answer\tprediction\nA\t"B" is right\nB\tB\n'),
        ("deep.json", "[" * 100_000),
        ("deep.jsonl", "[" * 100_000),
    ],
)
def test_malformed_table_is_rejected(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SoloError, match=f"cannot read .*{name}"):
        read_table(tmp_path / name)


def test_duplicate_columns_of_a_sheet_are_rejected(tmp_path):
    book = Workbook()
    book.active.append(["answer", "Prediction", "prediction", None, None])
    book.active.append(["A", "A", "B", None, None])
    book.save(tmp_path / "x.xlsx")
    with pytest.raises(SoloError, match="2 columns are called prediction"):
        read_table(tmp_path / "x.xlsx")


def test_dates_made_by_excel_are_rejected(tmp_path):
    book = Workbook()
    book.active.append(["answer", "prediction"])
    book.active.append(["A", datetime(2026, 3, 5)])
    book.save(tmp_path / "x.xlsx")
    with pytest.raises(SoloError, match="row 2 has a date"):
        read_table(tmp_path / "x.xlsx")


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "1", "response": "A", "row": ["answer"]}',
        '{"id": "1", "response": 5, "row": {"answer": "A"}}',
        '{"id": "1", "response": ["A"], "row": {"answer": "A"}}',
    ],
)
def test_malformed_prediction_of_a_run_is_rejected(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(SoloError, match="line 1 is not a prediction"):
        rescore(get("mmstar"), tmp_path / "x.jsonl")


def test_ids_of_a_run_are_compared_as_text(tmp_path):
    row = {"response": "A", "row": {"answer": "A"}}
    (tmp_path / "x.jsonl").write_text(lines({"id": 1, **row}, {"id": "1", **row}))
    with pytest.raises(SoloError, match="two predictions have the ID 1"):
        rescore(get("mmstar"), tmp_path / "x.jsonl")


@pytest.mark.parametrize(("cell", "n"), [("False", 1), ("0", 1), ("", 1), ("True", 2), ("1", 2)])
def test_has_image_as_text(tmp_path, cell, n):
    (tmp_path / "x.csv").write_text(f"has_image,answer,prediction\nTrue,A,A\n{cell},A,A\n")
    assert rescore(get("scienceqa"), tmp_path / "x.csv").n == n
