"""Cost of questions, as the dry run shows it."""

from __future__ import annotations

import json

from PIL import Image
from tests.factories import image_rows, make_solo, run_settings, text_rows, write_training_data

from solo_vlm.models.flops import forward_flops
from solo_vlm.train.estimate.memory import find_device
from solo_vlm.train.estimate.plan import make_plan
from solo_vlm.train.recipe import Recipe


def test_dry_run_shows_questions_and_their_cost(tmp_path, run):
    write_training_data(tmp_path, image_rows(4), text_rows(4))
    solo = make_solo()
    solo.save(tmp_path / "llama")
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what is this?", "answer": "red"}
    (tmp_path / "q.jsonl").write_text((json.dumps(row) + "\n") * 20)
    asked = {"questions": "q.jsonl", "interval": 5, "samples": 18, "max_new_tokens": 8}
    recipe = Recipe.parse(run_settings(tmp_path, tmp_path / "out", validation=asked))
    plan = make_plan(recipe, 2, find_device("H100"), 0.4)
    (file,) = plan.questions
    assert (file.name, file.asked, file.total) == ("questions", 18, 20)
    assert file.example == ("what is this?", "red", "exact")
    one = forward_flops(plan.shape, [int(file.tokens) + 8], patches=2, predicted=8).forward
    assert file.flops == 18 * one
    assert plan.question_passes == 2 * 8  # 9 questions per process, in two batches
    settings = (tmp_path / "recipe.yaml", json.dumps(recipe.model_dump(mode="json")))
    settings[0].write_text(settings[1])
    code, stdout, _ = run("train", settings[0], "--dry-run", "--processes", 2, "--device", "H100")
    assert code == 0
    assert "questions: 18 of 20 in q.jsonl" in stdout
    assert "what is this? -> red (exact)" in stdout
    assert "every 5 steps, at most 16 forward passes per process" in stdout


def test_dry_run_says_why_questions_are_not_counted(tmp_path, run):
    write_training_data(tmp_path, image_rows(4), text_rows(4))
    make_solo().save(tmp_path / "llama")
    (tmp_path / "q.jsonl").write_text('{"query": "what is this?", "answer": "red"}\n')
    plain = run_settings(tmp_path, tmp_path / "out", validation={"questions": "q.jsonl"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
    code, stdout, _ = run("train", tmp_path / "recipe.yaml", "--dry-run")
    assert code == 0
    assert "questions   not counted: " in stdout
    assert "no field question; rows have query, answer, but questions has question" in stdout
