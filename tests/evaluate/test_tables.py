"""Files of predictions as spreadsheets and scripts leave them: rows are neither invented nor merged."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from openpyxl import Workbook
from openpyxl.styles import Font, PatternFill
from tests.evaluate.benchmark_rows import rescore

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.predictions import Prediction, load_predictions, read_table
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.utils.errors import SoloError

ROW = {"index": 1, "question": "?", "A": "dog", "B": "cat", "answer": "B", "prediction": "cat"}


def table(*rows):
    """CSV of rows like ROW."""
    names = list(ROW)
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_formatted_blank_rows_of_a_sheet_are_no_rows(tmp_path):
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
def test_rows_of_empty_cells_are_no_rows(tmp_path, kind):
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
def test_a_byte_order_mark_is_no_part_of_a_table(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert rescore(get("mmstar"), tmp_path / name).score == 100
    (prediction,) = load_predictions(tmp_path / name)
    assert str(prediction.row["index"]) == "1"


def test_a_byte_order_mark_does_not_part_the_two_questions_of_an_image(tmp_path):
    text = "1.jpg\tIs there a dog?\tYes\tyes\n1.jpg\tIs there a cat?\tNo\tno\n"
    (tmp_path / "OCR.txt").write_text(text, encoding="utf-8-sig")
    assert rescore(get("mme"), tmp_path / "OCR.txt").score == 200


def test_a_byte_order_mark_before_the_files_of_a_run(tmp_path):
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
def test_rows_with_one_name_are_refused(run, tmp_path, column, kind):
    rest = {name: value for name, value in ROW.items() if name != "index"}
    rows = [{column: name, **rest} for name in (5, 6, 5)]
    header = ",".join(rows[0]) + "\n"
    text = header + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    (tmp_path / f"x.{kind}").write_text(text if kind == "csv" else lines(*rows))
    code, out, error = run("eval", "rescore", "--task", "mmstar", "--predictions", tmp_path / f"x.{kind}")
    assert (code, out) == (2, "")
    assert f"rows 1 and 3 have the same {column.lower()}, 5" in error
    assert error.count("\n") == 1


def test_names_are_compared_within_a_split_and_whatever_their_type(tmp_path):
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
def test_two_values_under_one_name_are_refused(tmp_path, name, text, message):
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
def test_a_table_that_would_lose_rows_or_cannot_be_parsed_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SoloError, match=f"cannot read .*{name}"):
        read_table(tmp_path / name)


def test_two_columns_of_a_sheet_with_one_name_are_refused(tmp_path):
    book = Workbook()
    book.active.append(["answer", "Prediction", "prediction", None, None])
    book.active.append(["A", "A", "B", None, None])
    book.save(tmp_path / "x.xlsx")
    with pytest.raises(SoloError, match="2 columns are called prediction"):
        read_table(tmp_path / "x.xlsx")


def test_a_date_that_excel_made_of_an_answer_is_refused(tmp_path):
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
def test_a_line_of_a_run_that_is_no_prediction_is_refused(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(SoloError, match="line 1 is not a prediction"):
        rescore(get("mmstar"), tmp_path / "x.jsonl")


def test_ids_of_a_run_are_compared_as_text(tmp_path):
    row = {"response": "A", "row": {"answer": "A"}}
    (tmp_path / "x.jsonl").write_text(lines({"id": 1, **row}, {"id": "1", **row}))
    with pytest.raises(SoloError, match="two predictions have the ID 1"):
        rescore(get("mmstar"), tmp_path / "x.jsonl")


@pytest.mark.parametrize(("cell", "n"), [("False", 1), ("0", 1), ("", 1), ("True", 2), ("1", 2)])
def test_whether_a_row_has_an_image_as_a_table_says_it(tmp_path, cell, n):
    (tmp_path / "x.csv").write_text(f"has_image,answer,prediction\nTrue,A,A\n{cell},A,A\n")
    assert rescore(get("scienceqa"), tmp_path / "x.csv").n == n
