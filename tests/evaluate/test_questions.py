"""Files of questions, and the credit of responses to them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from tests.factories import png, tar_bytes

from solo_vlm.evaluate.questions import (
    Answer,
    QuestionFiles,
    QuestionSettings,
    load_questions,
    summarize,
)
from solo_vlm.utils.errors import SoloError

ROWS = [
    {"image": "a.png", "question": "what is this?", "answer": "red"},
    {"image": "a.png", "question": "how many?", "answer": 7},
    {"image": ["a.png", "a.png"], "question": "which?", "answer": "left", "options": ["left", "right"]},
    {"question": "capital of Italy?", "answer": ["Rome", "Roma"], "metric": "anls"},
]


def write_jsonl(path, rows):
    Image.new("RGB", (64, 32), "red").save(path.parent / "a.png")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return QuestionSettings(path=str(path))


def load(path, rows, **settings):
    file = write_jsonl(path, rows).model_copy(update=settings)
    return load_questions(file.open(), metric=file.metric)[0]


def test_every_kind_of_question_is_read(tmp_path):
    questions = load(tmp_path / "q.jsonl", ROWS)
    assert [question.metric for question in questions] == ["exact", "number", "choice", "anls"]
    assert [question.id for question in questions] == ["1", "2", "3", "4"]
    assert [question.expected for question in questions] == ["red", "7", "A. left", "Rome | Roma"]
    parts = questions[2].chat[0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]
    assert parts[0]["image"].size == (64, 32)
    assert questions[0].question == "what is this?"
    assert questions[3].row == {
        "question": "capital of Italy?",
        "answer": ["Rome", "Roma"],
        "options": [],
        "metric": "anls",
    }


def test_json_parquet_csv_and_tar_give_the_same_questions(tmp_path):
    image = png(Image.new("RGB", (64, 32), "red"))
    rows = [{"question": f"number {n}?", "answer": f"it is {n}"} for n in range(3)]
    (tmp_path / "a.png").write_bytes(image)
    named = [{"image": "a.png", **row} for row in rows]
    (tmp_path / "q.json").write_text(json.dumps(named))
    (tmp_path / "q.csv").write_text(
        "image,question,answer\n" + "".join(f"a.png,{row['question']},{row['answer']}\n" for row in rows)
    )
    stored = [{"images": [{"bytes": image, "path": None}], **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(stored), tmp_path / "q.parquet", row_group_size=2)
    members = {f"{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)}
    (tmp_path / "q.tar").write_bytes(tar_bytes({**members, **{f"{n}.png": image for n in range(3)}}))
    for kind in ("json", "csv", "parquet", "tar"):
        questions, total = load_questions(QuestionSettings(path=str(tmp_path / f"q.{kind}")).open())
        assert total == 3
        assert [(each.question, each.reference) for each in questions] == [
            (row["question"], row["answer"]) for row in rows
        ]
        assert all(each.image.size == (64, 32) for each in questions)


def test_samples_are_spread_over_the_file(tmp_path):
    settings = write_jsonl(tmp_path / "q.jsonl", [ROWS[0] | {"answer": f"no {n}"} for n in range(100)])
    questions, total = load_questions(settings.open(), samples=4)
    assert total == 100
    assert [question.reference for question in questions] == ["no 0", "no 33", "no 66", "no 99"]
    assert len(load_questions(settings.open(), samples=1000)[0]) == 100


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"image": "a.png", "query": "what?", "answer": "red"}], {},
         r"no field question; rows have image, query, answer, but questions has question, answer"),
        ([{"image": "a.png", "query": "what?", "answer": "red"}], {"columns": {"question": "qeury"}},
         r"columns reads question from qeury, but rows have .*did you mean query\?"),
        ([{"image": "a.png", "question": "what?", "label": "red"}], {"columns": {"anwser": "label"}},
         r"columns names anwser, but questions reads question, answer.*did you mean answer\?"),
        ([ROWS[0], ROWS[0] | {"answer": ""}], {}, r"q\.jsonl.*text-empty"),
        ([ROWS[0], ROWS[0] | {"metric": "exactly"}], {}, r"unknown metric exactly; did you mean exact\?"),
        ([ROWS[0] | {"metric": "choice"}], {}, "options and choice need each other"),
        ([ROWS[2] | {"metric": "anls"}], {}, "options and choice need each other"),
        ([ROWS[0] | {"metric": "number"}], {}, "metric number, but the answer is 'red'"),
        ([ROWS[0], {"question": "what?", "answer": "red", "photo": "a.png"}], {},
         "photo looks like an image"),
        ([], {}, "q.jsonl has no questions"),
    ],
)  # fmt: skip
def test_wrong_rows_give_one_line_with_found_and_expected(tmp_path, rows, settings, message):
    with pytest.raises(SoloError, match=message) as error:
        load(tmp_path / "q.jsonl", rows, **settings)
    assert "\n" not in str(error.value)


def test_columns_images_and_metric_are_settings(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "b.png")
    rows = [{"photo": "b.png", "query": "what?", "label": "red"}]
    (question,) = load(
        tmp_path / "q.jsonl",
        rows,
        columns={"image": "photo", "question": "query", "answer": "label"},
        images=str(tmp_path / "photos"),
        metric="anls",
    )
    assert (question.metric, question.reference, question.image.size) == ("anls", "red", (32, 32))


@pytest.mark.parametrize(
    ("row", "response", "credit"),
    [
        (ROWS[0], "Red.", 1),
        (ROWS[0], "It is red", 0),
        (ROWS[0], None, 0),
        (ROWS[0], "", 0),
        (ROWS[1], "There are 7 of them.", 1),
        (ROWS[1], "7.0", 1),
        (ROWS[1], "seven", 0),
        (ROWS[1] | {"answer": [7, 8]}, "8", 1),
        (ROWS[1] | {"answer": "1/3", "metric": "number"}, "0.3333333", 1),
        (ROWS[1] | {"answer": 0}, "0", 1),
        (ROWS[2], "A", 1),
        (ROWS[2], "The answer is (B).", 0),
        (ROWS[2], "left", 1),
        (ROWS[2], "A, B", 0),
        (ROWS[3], "roma", 1),
        (ROWS[3], "Romw", 0.75),
        (ROWS[3], "Milan", 0),
        (ROWS[0] | {"answer": 100, "metric": "relaxed"}, "104", 1),
        (ROWS[0] | {"answer": 100, "metric": "relaxed"}, "106", 0),
        (ROWS[0] | {"metric": "relaxed"}, "RED", 1),
    ],
)
def test_credit_of_a_response(tmp_path, row, response, credit):
    (question,) = load(tmp_path / "q.jsonl", [row])
    assert Answer.of(question, response).credit == credit


def test_summary_has_wilsons_interval_or_the_bootstraps(tmp_path):
    (question,) = load(tmp_path / "q.jsonl", [ROWS[3]])
    right, half, wrong = (Answer.of(question, response) for response in ("Rome", "Romw", "no"))
    score = summarize([right] * 3 + [wrong])
    assert (score.value, score.n) == (0.75, 4)
    assert (score.low, score.high) == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson's, by hand
    soft = summarize([right, half, half, wrong])
    assert soft.value == 0.625
    assert soft.low < 0.625 < soft.high


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("a.jsonl", ["questions"]),
        ({"path": "a.jsonl", "metric": "anls"}, ["questions"]),
        ({"digits": "a.jsonl", "docs": {"path": "b.jsonl", "metric": "anls"}}, ["digits", "docs"]),
    ],
)
def test_files_are_given_as_path_settings_or_by_name(given, names):
    files = TypeAdapter(QuestionFiles).validate_python(given)
    assert list(files) == names
    assert next(iter(files.values())).path == "a.jsonl"
    plain = {name: file.model_dump(mode="json") for name, file in files.items()}
    assert TypeAdapter(QuestionFiles).validate_python(plain) == files


@pytest.mark.parametrize("given", [[], 3, {"a/b": "a.jsonl"}, {"a": {"path": "x", "metrics": "anls"}}])
def test_other_settings_of_files_are_rejected(given):
    with pytest.raises(ValidationError):
        TypeAdapter(QuestionFiles).validate_python(given)
