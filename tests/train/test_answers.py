"""Tables of answers in the trackers (the hosted one offline)."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tests.factories import run_settings

from solo_vlm.evaluate.questions import Answer, QuestionSettings, load_questions
from solo_vlm.train import Recipe
from solo_vlm.train.answers import AnswerLog
from solo_vlm.train.metrics import make_trackers


@pytest.fixture
def answered(tmp_path):
    """Return answers to two questions, one without an image."""
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "what | is this?", "answer": "red"},
        {"question": "2 + 2?", "answer": 4},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, _ = load_questions(QuestionSettings(path=str(tmp_path / "q.jsonl")).open())
    return [Answer.of(questions[0], "red"), Answer.of(questions[1], "<b>five</b>")]


def log(tmp_path, tracker, answered):
    recipe = Recipe.parse(run_settings(tmp_path, tmp_path / "out", trackers=[tracker]))
    (tmp_path / "out").mkdir()
    (destination,) = make_trackers(recipe, tmp_path / "out", 0)
    answers = AnswerLog(tmp_path / "out", [destination], 0)
    for step in (3, 6):
        answers.log(step, {"colors": answered})
        destination.log({"loss": 1.0}, step)
    destination.finish()


def test_tensorboard_gets_a_table_per_step_and_each_image_once(tmp_path, answered):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log(tmp_path, "tensorboard", answered)
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["colors/1"]
    assert [event.step for event in events.Images("colors/1")] == [3]
    tables = events.Tensors("colors/answers/text_summary")
    assert [event.step for event in tables] == [3, 6]
    text = tables[0].tensor_proto.string_val[0].decode()
    assert "| 1 | what \\| is this? | red | red | ✓ |" in text
    assert "| 2 | 2 + 2? | 4 | <b>five</b> | 0 |" in text


def test_wandb_gets_a_table_with_images(tmp_path, answered, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path, "wandb", answered)
    tables = list(tmp_path.glob("wandb/offline-run-*/files/media/table/colors/*.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["id", "image", "question", "expected", "answer", "credit"]
    assert table["data"][1] == ["2", None, "2 + 2?", "4", "<b>five</b>", 0.0]
    assert table["data"][0][:3] == ["1", "Image", "what | is this?"]


def test_resume_keeps_answers_with_unusual_line_separators(tmp_path, answered):
    (tmp_path / "out").mkdir()
    odd = Answer.of(answered[0].question, "one\u2028two\x85three\x0c\r")
    AnswerLog(tmp_path / "out", [], 0).log(3, {"colors": [odd, answered[1]]})
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    AnswerLog(tmp_path / "out", [], 3).log(6, {"colors": answered})
    after = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 4
    assert "step 3" in (tmp_path / "out" / "answers.html").read_text()


def test_page_leaves_out_a_step_that_a_crash_cut_short(tmp_path, answered):
    (tmp_path / "out").mkdir()
    AnswerLog(tmp_path / "out", [], 0).log(3, {"colors": answered})
    file = tmp_path / "out" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    AnswerLog(tmp_path / "out", [], 3).log(6, {"colors": answered})
    page = (tmp_path / "out" / "answers.html").read_text()
    assert "step 6" in page
    assert "step 3" not in page


def test_page_escapes_answers(tmp_path, answered):
    (tmp_path / "out").mkdir()
    AnswerLog(tmp_path / "out", [], 0).log(3, {"colors": answered})
    page = (tmp_path / "out" / "answers.html").read_text()
    assert "&lt;b&gt;five" in page
    assert "<b>five" not in page
