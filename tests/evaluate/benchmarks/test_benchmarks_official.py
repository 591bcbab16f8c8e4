"""Official scripts as references for scores, on made-up rows with edge cases.

`tests/golden/scores/TASK.json` has the script's name and version, rows with credits, and totals.
"""

from __future__ import annotations

import json

import pytest
from tests.factories import ROOT

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.predictions import Prediction, without_images

GOLDEN = ROOT / "tests" / "golden" / "scores"
TASKS = sorted(path.stem for path in GOLDEN.glob("*.json"))


def golden(task):
    content = json.loads((GOLDEN / f"{task}.json").read_text())
    rows = content["rows"]
    predictions = [
        Prediction(str(n), row["response"], without_images(row["row"])) for n, row in enumerate(rows)
    ]
    return predictions, [row["credit"] for row in rows], content["official"]


def test_every_usual_benchmark_has_golden_rows():
    assert set(TASKS) >= {
        "pope",
        "mmmu_val",
        "chartqa",
        "docvqa_val",
        "infovqa_val",
        "textvqa_val",
        "vqav2_val",
    }
    assert set(TASKS) >= {"ocrbench", "realworldqa", "hallusion_bench_image", "mmbench_en_dev"}


@pytest.mark.parametrize("task", TASKS)
def test_credit_of_every_row_equals_the_official_script(task):
    predictions, credits, _ = golden(task)
    assert len(predictions) >= 50
    answers = get(task).scorer(predictions)
    wrong = [
        (answer.prediction.response, answer.extracted, answer.reference, answer.credit, credit)
        for answer, credit in zip(answers, credits, strict=True)
        if answer.credit != pytest.approx(credit, abs=1e-9)
    ]
    assert wrong == []


@pytest.mark.parametrize("task", TASKS)
def test_total_equals_the_official_script(task):
    predictions, _, official = golden(task)
    score = get(task).score(predictions)
    assert score.score == pytest.approx(official["score"])
    metrics = {**score.raw, **{name.split(" ")[0]: part.score for name, part in score.breakdown.items()}}
    for name, value in official.items():
        if name != "score":
            assert metrics[name] == pytest.approx(value), name
