"""HallusionBench in the columns of VLMEvalKit's tables."""

from __future__ import annotations

import pytest
from tests.evaluate.benchmark_rows import predictions

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.predictions import Prediction


def test_vlmevalkit_columns_have_the_same_groups():
    answered = predictions("hallusion_bench_image", lambda row: "Yes" if row["set_id"] == "0" else "No")
    renamed = []
    for prediction in answered:
        row = prediction.row
        numbers = "_".join(row[name] for name in ("set_id", "figure_id", "question_id"))
        columns = {
            "index": f"image_VD_{row['subcategory']}_{numbers}",
            "answer": ("No", "Yes")[int(row["gt_answer"])],
            "category": row["category"],
            "l2_category": row["subcategory"],
        }
        renamed.append(Prediction(prediction.id, prediction.response, columns))
    ours, theirs = (get("hallusion_bench_image").score(each) for each in (answered, renamed))
    assert theirs.score == ours.score == 50
    assert theirs.breakdown == ours.breakdown
    assert theirs.raw == ours.raw
    assert ours.breakdown["qAcc (questions over all figures)"].score == pytest.approx(50)
    assert ours.breakdown["fAcc (figures over all questions)"].score == 0
