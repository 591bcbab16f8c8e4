"""Paired comparison of two runs."""

from __future__ import annotations

import json

import pytest
from tests.evaluate.benchmark_rows import correct_response, make_rows

from solo_vlm.evaluate.predictions import Prediction, without_images
from solo_vlm.evaluate.run_folder import RunFolder


@pytest.fixture
def make_run(tmp_path):
    def make(name, task, wrong=(), rows=None):
        answered = [
            Prediction(str(n), "?" if n in wrong else correct_response(task, row), without_images(row))
            for n, row in enumerate(rows or make_rows(task))
        ]
        RunFolder(tmp_path / name).write_predictions(task, answered)
        return tmp_path / name

    return make


def test_compare_json(run, make_run):
    rows = make_rows("ai2d", full=True)[:200]
    first = make_run("a", "ai2d", wrong=range(60), rows=rows)
    second = make_run("b", "ai2d", wrong=range(50, 70), rows=[*rows, rows[0]])
    make_run("b", "mme")
    code, out, error = run("eval", "compare", first, second, "--json")
    assert (code, error) == (0, "")
    (task,) = json.loads(out)["tasks"]
    assert (task["task"], task["n"], task["left_out"]) == ("ai2d", 200, 1)
    assert (task["first"], task["second"], task["difference"]) == pytest.approx((70, 90, 20))
    assert (task["only_first"], task["only_second"]) == (10, 50)
    assert 0 < task["interval"][0] < 20 < task["interval"][1]
    assert task["p_value"] < 0.001


def test_mme_is_compared_per_image(run, make_run):
    first, second = make_run("a", "mme"), make_run("b", "mme", wrong=[0])
    _, out, _ = run("eval", "compare", first, second, "--json")
    (task,) = json.loads(out)["tasks"]
    assert (task["first"], task["second"]) == (2800, 2800 - 75)
    assert task["p_value"] > 0.3  # one image of two


def test_compare_table(run, make_run):
    code, out, _ = run("eval", "compare", make_run("a", "mmstar"), make_run("b", "mmstar", wrong=[0, 1, 2]))
    assert code == 0
    assert "-10.0" in out
    assert "Paired bootstrap" in out


def test_runs_on_different_data_are_rejected(run, make_run):
    other = [{**row, "question": "Another?"} for row in make_rows("ai2d")]
    code, _, error = run("eval", "compare", make_run("a", "ai2d"), make_run("b", "ai2d", rows=other))
    assert code == 2
    assert "row 0 is another question" in error


def test_runs_without_a_common_task_are_rejected(run, make_run, tmp_path):
    for other in (make_run("b", "mme"), tmp_path / "nowhere"):
        code, _, error = run("eval", "compare", make_run("a", "ai2d"), other)
        assert code == 2
        assert "no task in common" in error
