"""Evaluation runs through lmms-eval on synthetic benchmark files: scores, resuming, bad rows."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter

import pytest
from tests.evaluate.benchmark_rows import TASKS, USUAL, correct_response
from tests.evaluate.evaluation_runs import ScriptedBackend, open_task, write_data_root
from tests.factories import make_solo

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.run import EvaluationRun, ModelInfo
from solo_vlm.evaluate.run_folder import RunFolder, weights_hash
from solo_vlm.generate import GenerationOutput
from solo_vlm.utils.errors import SoloError

FACTS = ModelInfo("scripted", "test", "0" * 64)
HARNESS_PERFECT = {
    "mmstar": {"average": 1.0},
    "mme": {"mme_perception_score": 2000.0, "mme_cognition_score": 800.0},
    "seedbench": {"seed_image": 1.0, "seed_all": 1.0},
    "ai2d": {"exact_match": 1.0},
    "scienceqa": {"exact_match": 1.0},
    "mathvista": {},
    "pope": {"pope_accuracy": 1.0, "pope_f1_score": 1.0},
    "mmmu_val": {"mmmu_acc": 1.0},
    "chartqa": {"relaxed_overall": 1.0, "relaxed_human_split": 1.0},
    "docvqa_val": {"anls": 1.0},
    "infovqa_val": {"anls": 1.0},
    "textvqa_val": {"exact_match": 1.0},
    "vqav2_val": {"exact_match": 1.0},
    "ocrbench": {},  # lmms-eval adds up the scores of all runs in a process
    "realworldqa": {"exact_match": 1.0},
    "hallusion_bench_image": {},
    "mmbench_en_dev": {"gpt_eval_score": 100.0},
}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_data_root(tmp_path_factory.mktemp("data"), (*TASKS, *USUAL))


@pytest.fixture(scope="module")
def opened(data_root, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {task: open_task(task, data_root, cache) for task in (*TASKS, *USUAL)}


def correct_answers(task, rows):
    return [correct_response(task, row) for row in rows.columns]


def evaluate(task, rows, backend, out, **settings):
    (score,), _ = EvaluationRun(out, FACTS, **settings).evaluate(backend, [(get(task), rows)])
    return score


@pytest.mark.parametrize("task", [*TASKS, *USUAL])
def test_oracle_is_perfect_for_solo_vlm_and_lmms_eval(task, opened, tmp_path):
    rows = opened[task]
    score = evaluate(task, rows, ScriptedBackend(correct_answers(task, rows)), tmp_path)
    assert score.score == score.maximum
    assert (score.n, score.unreadable, score.bad_rows) == (len(rows), 0, ())
    for metric, value in HARNESS_PERFECT[task].items():
        assert score.raw[f"lmms-eval: {metric}"] == pytest.approx(value)
    assert f"partial: {len(rows)} of {get(task).size:,}" in score.name
    assert RunFolder(tmp_path).read_scores() == [score]


@pytest.mark.parametrize("task", TASKS)
def test_constant_answer_scores_its_share(task, opened, tmp_path):
    rows = opened[task]
    constant = "Yes" if task == "mme" else "B"
    score = evaluate(task, rows, ScriptedBackend([constant] * len(rows)), tmp_path)
    share = Counter(correct_answers(task, rows))[constant] / len(rows)
    assert 0 < share < 1
    # Each image of MME has one question of either answer: acc is 50 in all 14 subtasks, acc+ is 0.
    assert score.score == pytest.approx(14 * 50 if task == "mme" else 100 * share)


def test_seedbench_videos_are_filtered_and_counted(opened, tmp_path):
    rows = opened["seedbench"]
    backend = ScriptedBackend(["A"] * len(rows))
    score = evaluate("seedbench", rows, backend, tmp_path)
    assert sorted(backend.asked) == list(range(18))
    assert (score.n, score.filtered) == (18, 3)


@pytest.fixture(scope="module")
def whole_run(data_root, tmp_path_factory):
    """Run all six tasks with a tiny model through the command line."""
    folder = tmp_path_factory.mktemp("run")
    make_solo().save(folder / "model")
    return folder


def test_six_tasks_from_the_command_line(whole_run, data_root, run, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", whole_run / "cache")
    model, out = whole_run / "model", whole_run / "out"
    arguments = ["--model", model, "--data-root", data_root, "--out", out, "--max-new-tokens", 2, "--json"]
    code, stdout, stderr = run("eval", "run", *arguments)
    assert code == 0, stderr
    printed = json.loads(stdout)
    assert [score["task"] for score in printed["scores"]] == list(TASKS)
    assert printed["scores"] == json.loads((out / "scores.json").read_text())
    weights = (model / "model.safetensors").read_bytes()
    facts = json.loads((out / "run.json").read_text())
    assert facts["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert facts["versions"]["lmms_eval"] == "0.7.3"
    assert facts["tasks"]["mmstar"]["prompt"].endswith(
        "Answer with the option's letter from the given choices directly"
    )
    for task in TASKS:
        code, stdout, _ = run(
            "eval",
            "rescore",
            "--task",
            task,
            "--predictions",
            out / "predictions" / f"{task}.jsonl",
            "--json",
        )
        rescored, score = json.loads(stdout), next(s for s in printed["scores"] if s["task"] == task)
        assert rescored["score"] == score["score"]
        assert rescored["n"] == score["n"] == facts["tasks"][task]["rows"]
    assert "MathVista (testmini) (partial: 20 of 1,000)" in (out / "report.html").read_text()


def test_weights_hash_covers_all_files_in_order(tmp_path):
    for name, content in (
        ("model-2.safetensors", b"two"),
        ("model-1.safetensors", b"one"),
        ("x.json", b"{}"),
    ):
        (tmp_path / name).write_bytes(content)
    assert weights_hash(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()
    with pytest.raises(SoloError, match="has no weights"):
        weights_hash(tmp_path.parent)


def test_missing_data_error_has_the_download_command(whole_run, run, tmp_path):
    arguments = ["--model", whole_run / "model", "--tasks", "ai2d", "--out", tmp_path / "out"]
    code, _, error = run("eval", "run", *arguments, "--data-root", tmp_path)
    assert code == 2
    assert "hf download lmms-lab-encoder/ai2d" in error
    assert not (tmp_path / "out").exists()


class Endless(ScriptedBackend):
    """Backend that hangs after four batches, until the process is killed."""

    def generate(self, requests):
        for number, batch in enumerate(super().generate(requests)):
            if number == 4:
                time.sleep(600)
            yield batch


def test_killed_run_resumes(opened, tmp_path):
    rows = opened["mmstar"]
    answers = [
        response if number % 3 else "D" for number, response in enumerate(correct_answers("mmstar", rows))
    ]
    out = tmp_path / "out"
    killed = multiprocessing.get_context("fork").Process(
        target=evaluate, args=("mmstar", rows, Endless(answers), out)
    )
    killed.start()
    kept = out / "answers" / "mmstar.jsonl"
    for _ in range(600):
        if kept.exists() and kept.read_bytes().count(b"\n") == 12:
            break
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    there = {json.loads(line)["row"] for line in kept.read_text().splitlines()}
    assert len(there) == 12
    with kept.open("a") as lines:
        lines.write('{"row": 3, "request": "')  # killed in the middle of a line

    backend = ScriptedBackend(answers)
    score = evaluate("mmstar", rows, backend, out)
    assert set(backend.asked).isdisjoint(there)
    assert sorted({*backend.asked, *there}) == list(range(len(rows)))
    assert score == evaluate("mmstar", rows, ScriptedBackend(answers), tmp_path / "in one go")

    backend = ScriptedBackend(answers)
    assert evaluate("mmstar", rows, backend, out) == score
    assert backend.asked == []


def test_invalid_answer_file_is_reported(opened, tmp_path):
    evaluate("ai2d", opened["ai2d"], ScriptedBackend(["A"] * 6), tmp_path)
    (tmp_path / "answers" / "ai2d.jsonl").write_text("[1, 2]\n")
    with pytest.raises(SoloError, match="remove it"):
        evaluate("ai2d", opened["ai2d"], ScriptedBackend(["A"] * 6), tmp_path)


def test_changed_settings_regenerate_answers(opened, tmp_path):
    rows = opened["ai2d"]
    evaluate("ai2d", rows, ScriptedBackend(["A"] * 6), tmp_path, max_new_tokens=4)
    backend = ScriptedBackend(["A"] * 6)
    evaluate("ai2d", rows, backend, tmp_path, max_new_tokens=8)
    assert sorted(backend.asked) == list(range(6))


def test_replaced_image_regenerates_the_answer(tmp_path):
    from tests.evaluate.benchmark_rows import make_rows
    from tests.evaluate.evaluation_runs import noise, write_rows
    from tests.factories import png

    rows = make_rows("ai2d", image={"bytes": png(noise(0)), "path": None})
    write_rows(tmp_path / "data", "ai2d", rows)
    opened = open_task("ai2d", tmp_path / "data", tmp_path / "cache")
    evaluate("ai2d", opened, ScriptedBackend(["A"] * 6), tmp_path / "out")
    rows[2]["image"] = {"bytes": png(noise(1)), "path": None}
    write_rows(tmp_path / "mended", "ai2d", rows)
    backend = ScriptedBackend(["A"] * 6)
    mended = open_task("ai2d", tmp_path / "mended", tmp_path / "cache")
    evaluate("ai2d", mended, backend, tmp_path / "out")
    assert len(backend.asked) == 1


def test_folder_of_another_model_is_rejected(opened, tmp_path):
    rows = opened["ai2d"]
    evaluate("ai2d", rows, ScriptedBackend(["A"] * 6), tmp_path)
    other = EvaluationRun(tmp_path, ModelInfo("scripted", "test", "1" * 64))
    with pytest.raises(SoloError, match="another model"):
        other.evaluate(ScriptedBackend(["A"] * 6), [(get("ai2d"), rows)])
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep me")
    with pytest.raises(SoloError, match="exists already"):
        EvaluationRun(tmp_path / "precious", FACTS).evaluate(ScriptedBackend([]), [(get("ai2d"), rows)])


def test_bad_row_is_counted_as_wrong(tmp_path):
    from tests.evaluate.benchmark_rows import make_rows
    from tests.evaluate.evaluation_runs import noise, write_rows
    from tests.factories import png

    rows = make_rows("mmstar", image={"bytes": png(noise(0)), "path": None})[:10]
    rows[3]["image"] = {"bytes": png(noise(0))[:100], "path": None}
    rows[5]["image"] = None
    write_rows(tmp_path / "data", "mmstar", rows)
    opened = open_task("mmstar", tmp_path / "data", tmp_path / "cache")
    backend = ScriptedBackend(correct_answers("mmstar", opened))
    score = evaluate("mmstar", opened, backend, tmp_path / "out")
    assert sorted(backend.asked) == [0, 1, 2, 4, 6, 7, 8, 9]
    assert (score.n, score.score, score.bad_rows) == (10, 80.0, ("4", "6"))
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["tasks"]["mmstar"]["failures"].keys() == {"4", "6"}
    assert "the row has no image" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("task", "changed", "answer"),
    [
        ("mmstar", {"question": "How many?\nOptions: A: Two, B: One, C: , D: Three", "answer": "D"}, "D"),
        ("seedbench", {"choice_c": None, "answer": "D"}, "D"),
        ("ai2d", {"options": ["Two", "One", None, "Three"], "answer": "3"}, "Three"),
        ("scienceqa", {"choices": ["Two", "One", "", "Three"], "answer": 3}, "D"),
        ("mathvista", {"choices": ["Two", "One", None, "Three"], "answer": "Three"}, "D"),
    ],
)
def test_empty_option_keeps_later_letters_in_prompt_and_score(task, changed, answer, tmp_path):
    from tests.evaluate.benchmark_rows import make_rows
    from tests.evaluate.evaluation_runs import noise, write_rows
    from tests.factories import png

    image = {"bytes": png(noise(0)), "path": None}
    rows = [row for row in make_rows(task, image=image) if task != "mathvista" or row["choices"]][:2]
    rows[1] |= changed
    write_rows(tmp_path / "data", task, rows)
    opened = open_task(task, tmp_path / "data", tmp_path / "cache")
    backend = ScriptedBackend([correct_response(task, rows[0]), answer])
    score = evaluate(task, opened, backend, tmp_path / "out")
    assert (score.score, score.bad_rows, score.unreadable) == (100, (), 0)
    assert sorted(backend.asked) == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": None}, "KeyError: 'options'; its columns are: question, answer"),
        ({"answer": "9"}, "IndexError"),
    ],
)
def test_first_row_without_a_prompt_is_a_one_line_error(change, message, tmp_path):
    from tests.evaluate.benchmark_rows import make_rows
    from tests.evaluate.evaluation_runs import noise, write_rows
    from tests.factories import png

    rows = make_rows("ai2d", image={"bytes": png(noise(0)), "path": None})
    for row in rows:
        row |= change
        if row["options"] is None:
            del row["options"]
    write_rows(tmp_path / "data", "ai2d", rows)
    opened = open_task("ai2d", tmp_path / "data", tmp_path / "cache")
    with pytest.raises(SoloError, match=f"lmms-eval cannot use the first row .{message}"):
        evaluate("ai2d", opened, ScriptedBackend([]), tmp_path / "out")


def test_limit_that_lmms_eval_cannot_score_is_noted(opened, tmp_path):
    rows = opened["mme"]
    score = evaluate("mme", rows, ScriptedBackend(correct_answers("mme", rows)), tmp_path, limit=3)
    assert score.n == 3
    assert not any("lmms-eval" in name for name in score.raw)
    assert "lmms-eval could not score this" in (tmp_path / "report.md").read_text()


def test_failing_backend_keeps_finished_answers(opened, tmp_path):
    class Broken(ScriptedBackend):
        def generate(self, requests):
            yield [GenerationOutput(next(iter(requests)).request_id, "A")]
            raise SoloError("the server is offline")

    with pytest.raises(SoloError, match="the server is offline"):
        evaluate("ai2d", opened["ai2d"], Broken([]), tmp_path)
    backend = ScriptedBackend(["A"] * 6)
    evaluate("ai2d", opened["ai2d"], backend, tmp_path)
    assert sorted(backend.asked) == [1, 2, 3, 4, 5]


def test_missing_lmms_eval_error_has_the_install_command(opened, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "solo_vlm.evaluate.stock_tasks", raising=False)
    with pytest.raises(SoloError, match="pip install --no-deps lmms-eval=="):
        evaluate("ai2d", opened["ai2d"], ScriptedBackend(["A"] * 6), tmp_path)


def test_base_url_needs_a_server_engine(run, tmp_path):
    code, _, error = run(
        "eval", "run", "--model", "m", "--out", tmp_path, "--base-url", "http://localhost:1/v1"
    )
    assert code == 2
    assert "--engine vllm" in error
