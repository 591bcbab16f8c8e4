"""VLMEvalKit's tables as files of questions, compared with their reading by pandas and base64."""

from __future__ import annotations

import ast
import base64
import json
from io import BytesIO
from string import ascii_uppercase

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tests.evaluate.evaluation_runs import ScriptedBackend
from tests.factories import image_rows, make_solo, png, run_settings, text_rows, write_training_data

from solo_vlm.data.sources import open_source
from solo_vlm.evaluate.question_run import QuestionRun, load_files
from solo_vlm.evaluate.questions import Answer, QuestionSettings, load_questions
from solo_vlm.evaluate.run import ModelInfo
from solo_vlm.train import Recipe, train
from solo_vlm.utils.errors import SoloError


def encoded(number: int) -> str:
    noise = np.random.default_rng(number).integers(0, 256, (32, 64, 3), np.uint8)
    return base64.b64encode(png(Image.fromarray(noise))).decode()


def write(path, rows, **settings):
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return QuestionSettings(path=str(path), **settings)


def read_by_pandas(path):
    """Return (images, question, options, answer) of each row, as VLMEvalKit's documentation defines them."""
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, na_values=[""])
    stored = dict(zip(table["index"], table.get("image", table["index"]), strict=True))
    found = []
    for row in table.to_dict("records"):
        cell = row.get("image")
        cell = stored.get(cell, cell)
        cells = ast.literal_eval(cell) if cell.startswith("[") else [cell]
        images = [Image.open(BytesIO(base64.b64decode(each))).convert("RGB") for each in cells]
        options = {letter: row[letter] for letter in ascii_uppercase if isinstance(row.get(letter), str)}
        found.append((images, row["question"], options, row["answer"]))
    return found


CHOICES = [
    {
        "index": 241 + 1_000_000 * turn,  # rotations of a question, as in MMBench
        "image": encoded(1) if turn == 0 else "241",
        "question": 'What is "this",\nif anything?',
        "hint": "Look closely." if turn == 0 else None,
        **dict(zip("ABCD", np.roll(["a dog", "None", "3", "NA"], turn).tolist(), strict=True)),
        "answer": "ABCD"[turn],
        "category": "object",
        "l2-category": "coarse",
        "split": "dev" if turn else "test",
    }
    for turn in range(4)
] + [
    {
        "index": 7,
        "image": str([encoded(2), encoded(3)]),
        "image_path": str(["7_1.jpg", "7_2.jpg"]),
        "question": "<image 2> or <image 1>?",
        "A": "<image 1>",
        "B": "both",
        "answer": "B",
        "category": "count",
        "split": "dev",
    },
]


def test_multiple_choice_is_as_pandas_reads_it(tmp_path):
    settings = write(tmp_path / "q.tsv", CHOICES)
    questions, total = load_questions(settings.open())
    assert total == 5
    assert [question.metric for question in questions] == ["choice"] * 5
    reference = read_by_pandas(tmp_path / "q.tsv")
    for question, (images, text, options, answer) in zip(questions, reference, strict=True):
        parts = question.chat[0]["content"]
        shown = [np.asarray(part["image"]) for part in parts if part["type"] == "image"]
        if "<image" in text:
            images = [images[1], images[0], images[0]]
        assert [each.tolist() for each in shown] == [np.asarray(each).tolist() for each in images]
        if "<image" not in text:
            assert text in question.question
            listed = "\n".join(f"{letter}. {option}" for letter, option in options.items())
            assert listed in question.question
        assert list(question.options) == list(options.values())
        assert question.answers == (answer,)
    assert questions[0].question.startswith("Hint: Look closely.\nWhat")
    assert "Hint" not in questions[1].question


def test_other_questions_are_as_the_columns_tell(tmp_path):
    rows = [
        {"index": 1, "image": encoded(1), "question": "Is it red? Please answer yes or no.", "answer": "Yes"},
        {"index": 2, "image": "1", "question": "Is it blue?", "answer": "No"},
        {"index": 3, "image": encoded(2), "question": "Brand?", "answer": "['nokia', \"O'Neill\"]"},
        {"index": 4, "image": encoded(2), "question": "Box?", "answer": "[1, 2, 3, 4]"},
        {"index": 5, "image": encoded(2), "question": "How many?", "answer": "007"},
    ]
    questions, _ = load_questions(write(tmp_path / "q.tsv", rows).open())
    assert [question.metric for question in questions] == ["yes_no", "yes_no", "exact", "exact", "exact"]
    assert [question.answers for question in questions] == [
        ("Yes",),
        ("No",),
        ("nokia", "O'Neill"),
        ("[1, 2, 3, 4]",),
        ("007",),
    ]
    said = ["Yes, it is.", "Nothing", "o'neill", "[1, 2, 3, 4]", "7"]
    credits = [Answer.of(*pair).credit for pair in zip(questions, said, strict=True)]
    assert credits == [1, 0, 1, 1, 0]
    numbers = [row | {"answer": 3 + row["index"]} for row in rows]
    questions, _ = load_questions(write(tmp_path / "n.tsv", numbers).open())
    assert [question.metric for question in questions] == ["number"] * 5


def test_metric_of_the_file_precedes_yes_or_no(tmp_path):
    rows = [
        {"index": n, "image": encoded(n), "question": "What?", "answer": a}
        for n, a in enumerate(("No", "4 pm"))
    ]
    questions, _ = load_questions(write(tmp_path / "q.tsv", rows).open(), metric="anls")
    assert [question.metric for question in questions] == ["anls", "anls"]
    with pytest.raises(
        SoloError, match=r"q\.tsv, row 1: metric yes_no, but the answer is '4 pm': write yes or no"
    ):
        load_questions(write(tmp_path / "q.tsv", rows).open(), metric="yes_no")


def test_paths_are_read_beside_the_table_or_in_the_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.JPG").write_bytes(base64.b64decode(encoded(number)))
    rows = [{"index": 0, "image_path": "images/0.JPG", "question": "Q", "answer": "a"}]
    (question,), _ = load_questions(write(tmp_path / "q.tsv", rows).open())
    assert question.image.size == (64, 32)
    rows = [{"index": 0, "image_path": str(["0.JPG", "1.JPG"]), "question": "Q", "answer": "a"}]
    settings = write(tmp_path / "q.tsv", rows, images=str(tmp_path / "images"))
    (question,), _ = load_questions(settings.open())
    assert question.sample.images == [f"{tmp_path}/images/{number}.JPG" for number in range(2)]


def test_filter_chooses_a_split_and_scores_have_categories(tmp_path):
    settings = write(tmp_path / "q.tsv", CHOICES, filter='split == "dev"')
    files = load_files({"q": settings})
    assert [question.id for question in files["q"].questions] == ["2", "3", "4", "5"]
    backend = ScriptedBackend(["(B)", "A", "D", "both"])
    (score,) = QuestionRun(tmp_path / "out", ModelInfo("m", "scripted", "0")).evaluate(backend, files)
    assert (score.score, score.n, score.expected_n) == (75.0, 4, 4)
    assert {(part.group, name): (part.score, part.n) for name, part in score.breakdown.items()} == {
        ("category", "count"): (100.0, 1),
        ("category", "object"): (pytest.approx(200 / 3), 3),
        ("l2-category", "coarse"): (pytest.approx(200 / 3), 3),
        ("split", "dev"): (75.0, 4),
    }
    lines = (tmp_path / "out/predictions/q.jsonl").read_text().splitlines()
    assert json.loads(lines[3])["row"]["categories"] == {"split": "dev", "category": "count"}
    with pytest.raises(SoloError, match=r"q\.tsv has no questions"):
        load_questions(write(tmp_path / "q.tsv", CHOICES, filter='split == "val"').open())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "row 2: no-answer: the row has no answer"),
        ({"answer": "E"}, r"row 2: no-answer: answer \['E'\] is not the letter"),
        ({"D": None, "answer": "D"}, "row 2: no-answer"),
        ({"question": None}, "row 2: text: question is NoneType, not text"),
    ],
)
def test_unclear_rows_are_refused_by_file_and_row(tmp_path, change, message):
    rows = [*CHOICES[:2], CHOICES[2] | change]
    with pytest.raises(SoloError, match=rf"q\.tsv, {message}"):
        load_questions(write(tmp_path / "q.tsv", rows).open())


def test_table_without_answers_is_refused(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in CHOICES]
    with pytest.raises(SoloError, match="no field answer; rows have index, image, question"):
        load_questions(write(tmp_path / "q.tsv", rows).open())


def test_table_trains_as_it_is_asked(tmp_path):
    settings = write(tmp_path / "q.tsv", CHOICES)
    asked, _ = load_questions(settings.open())
    trained = open_source(tmp_path / "q.tsv", format="auto").read(0)
    assert [row["messages"] for row in trained] == [row["messages"] for row in settings.open().read(0)]
    assert [row["messages"][1]["content"][0]["text"] for row in trained] == [each.reference for each in asked]


def test_command_evaluates_a_table(tmp_path, run):
    write(tmp_path / "q.tsv", CHOICES)
    make_solo().save(tmp_path / "model")
    out = ("--out", tmp_path / "out", "--json", "--max-new-tokens", 2)
    code, stdout, error = run(
        "eval", "run", "--model", tmp_path / "model", "--questions", tmp_path / "q.tsv", *out
    )
    assert code == 0, error
    (score,) = json.loads(stdout)["scores"]
    assert (score["n"], score["bad_rows"]) == (5, 0)
    assert {"object", "count", "coarse", "dev", "test"} == set(score["breakdown"])


def test_table_is_asked_while_training(tmp_path):
    write_training_data(tmp_path, image_rows(8), text_rows(8))
    make_solo().save(tmp_path / "llama")
    write(tmp_path / "q.tsv", CHOICES)
    data = run_settings(tmp_path, "")["data"] | {"sources": [{"path": "images.parquet"}]}
    asked = {"questions": {"mmb": {"path": "q.tsv", "filter": 'split == "dev"'}}, "interval": 100}
    train(Recipe.parse(run_settings(tmp_path, tmp_path / "out", steps=1, data=data, validation=asked)))
    records = map(json.loads, (tmp_path / "out/answers.jsonl").read_text().splitlines())
    expected = load_questions(write(tmp_path / "q.tsv", CHOICES).open())[0][1:]
    assert [(record["id"], record["question"]) for record in records] == [
        (q.id, q.question) for q in expected
    ]
