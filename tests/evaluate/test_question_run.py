"""Files of questions: scores, resume, and equality with the evaluation while training."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image
from tests.evaluate.evaluation_runs import ScriptedBackend
from tests.factories import (
    COLORS,
    image_rows,
    make_solo,
    read_steps,
    run_settings,
    text_rows,
    write_training_data,
)

from solo_vlm.evaluate.question_run import QuestionRun, load_files
from solo_vlm.evaluate.questions import QuestionSettings
from solo_vlm.evaluate.run import ModelInfo
from solo_vlm.train import Recipe, train
from solo_vlm.utils.errors import SoloError

MODEL = ModelInfo("model", "scripted", "0")


@pytest.fixture
def file(tmp_path):
    """Return a file of eight questions, one with options."""
    rows = []
    for number in range(8):
        color = COLORS[number % 3]
        Image.new("RGB", (64, 32 + 32 * (number % 2)), color).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what is this?", "answer": color})
    rows[5] |= {"options": ["red", "green"], "answer": "green"}
    (tmp_path / "colors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "colors.jsonl"


ANSWERS = ["red", "Blue.", "no", "red", "green", "(B)", "", "blue"]


def ask(file, out, answers=ANSWERS, model=MODEL, **options):
    backend = ScriptedBackend(answers)
    files = load_files({"colors": QuestionSettings(path=str(file))})
    (score,) = QuestionRun(out, model, **options).evaluate(backend, files)
    return score, backend


def test_scores_predictions_and_page_are_written(tmp_path, file):
    score, _ = ask(file, tmp_path / "out")
    assert (score.score, score.n, score.unreadable, score.partial) == (62.5, 8, 1, False)
    assert {name: part.n for name, part in score.breakdown.items()} == {"choice": 1, "exact": 7}
    (saved,) = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert saved == json.loads(json.dumps(score.as_dict()))
    lines = [
        json.loads(line) for line in (tmp_path / "out/predictions/colors.jsonl").read_text().splitlines()
    ]
    assert [line["response"] for line in lines] == ANSWERS
    assert lines[5]["row"]["metric"] == "choice"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 8
    assert "B. green" in page


def test_interrupted_run_reuses_answers_to_the_same_questions_only(tmp_path, file):
    ask(file, tmp_path / "out", limit=6)
    _, backend = ask(file, tmp_path / "out")
    assert sorted(backend.asked) == [6, 7]
    Image.new("RGB", (96, 96), "white").save(tmp_path / "2.png")
    assert ask(file, tmp_path / "out")[1].asked == [2]
    assert len(ask(file, tmp_path / "out", max_new_tokens=9)[1].asked) == 8
    with pytest.raises(SoloError, match="holds a run of another model"):
        ask(file, tmp_path / "out", model=ModelInfo("other", "scripted", "1"))


def test_limited_run_is_partial(tmp_path, file):
    score, _ = ask(file, tmp_path / "out", limit=3)
    assert score.name.endswith("(partial: 3 of 8)")


def test_unreadable_image_is_a_bad_row_and_asked_again(tmp_path, file):
    (tmp_path / "1.png").write_bytes(b"broken")
    score, _ = ask(file, tmp_path / "out")
    assert (score.bad_rows, score.score) == (("2",), 50.0)
    assert "2" in json.loads((tmp_path / "out/run.json").read_text())["tasks"]["colors"]["failures"]
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "1.png")
    score, backend = ask(file, tmp_path / "out")
    assert (backend.asked, score.bad_rows) == ([1], ())


def test_trained_model_gets_the_scores_that_training_logged(tmp_path, file, run):
    write_training_data(tmp_path, image_rows(8), text_rows(8))
    make_solo().save(tmp_path / "llama")
    data = run_settings(tmp_path, "")["data"] | {"sources": [{"path": "images.parquet"}]}
    asked = {"questions": {"colors": {"path": str(file)}}, "interval": 100}
    train(Recipe.parse(run_settings(tmp_path, tmp_path / "out", steps=40, data=data, validation=asked)))
    logged = read_steps(tmp_path / "out")[-1]
    records = map(json.loads, (tmp_path / "out/answers.jsonl").read_text().splitlines())
    model, questions = tmp_path / "out/model", f"{{colors: {{path: {file}}}}}"
    code, stdout, _ = run(
        *("eval", "run", "--model", model, "--out", tmp_path / "eval", "--questions", questions, "--json")
    )
    assert code == 0
    (score,) = json.loads(stdout)["scores"]
    assert score["score"] == pytest.approx(100 * logged["colors/accuracy"])
    assert score["interval"] == pytest.approx(
        [100 * logged["colors/accuracy_low"], 100 * logged["colors/accuracy_high"]]
    )
    predictions = map(json.loads, (tmp_path / "eval/predictions/colors.jsonl").read_text().splitlines())
    assert {line["id"]: line["response"] for line in predictions} == {
        record["id"]: record["answer"] for record in records
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--questions", "nothing.jsonl"), "no data files at nothing.jsonl"),
        (("--questions", "{path: a.jsonl, metrics: anls}"), "unknown key .*metrics; did you mean metric"),
        (("--questions", "{path: [}"), "cannot read the settings"),
        (("--questions", "a.jsonl", "--tasks", "mme"), "give either --tasks or --questions"),
    ],
)
def test_wrong_options_end_before_the_model_is_loaded(tmp_path, run, options, message):
    code, _, stderr = run("eval", "run", "--model", "no/model", "--out", tmp_path / "out", *options)
    assert code == 2
    assert re.search(message, stderr.replace("\n", " "))
