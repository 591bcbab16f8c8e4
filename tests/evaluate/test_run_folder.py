"""Files of an evaluation run."""

from __future__ import annotations

import pytest
from tests.evaluate.benchmark_rows import correct_response, make_rows

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.predictions import Prediction, without_images
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.utils.errors import SoloError


def test_round_trip(tmp_path):
    folder = RunFolder(tmp_path / "run")
    rows = make_rows("mme")
    answered = [
        Prediction(str(n), correct_response("mme", row), without_images(row)) for n, row in enumerate(rows)
    ]
    scores = [get("mme").score(answered)]
    folder.write_predictions("mme", answered)
    folder.write_scores(scores)
    folder.write_metadata({"model": "a"})
    assert folder.tasks == ["mme"]
    assert folder.read_predictions("mme") == answered
    assert folder.read_scores() == scores
    assert folder.read_metadata() == {"model": "a"}


@pytest.mark.parametrize("content", [None, "{", '[{"task": "mme"}]', '["mme"]'])
def test_invalid_scores_file_is_reported(content, tmp_path):
    if content is not None:
        (tmp_path / "scores.json").write_text(content)
    with pytest.raises(SoloError, match=r"scores\.json"):
        RunFolder(tmp_path).read_scores()


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": "1"}', '{"id": "1", "response": "A", "row": {}, "more": 1}']
)
def test_invalid_prediction_line_is_reported(line, tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_predictions("mme", [Prediction("1", "A", {})])
    with folder.predictions_file("mme").open("a") as lines:
        lines.write(line + "\n")
    with pytest.raises(SoloError, match=r"mme\.jsonl, line 2 is not a prediction"):
        folder.read_predictions("mme")


def test_without_images_keeps_image_names():
    assert without_images({"Image": "1.jpg", "L2-category": "x"}) == {
        "image": "1.jpg",
        "l2_category": "x",
        "has_image": True,
    }
    assert without_images({"image": {"bytes": b"1"}}) == {"has_image": True}
    assert without_images({"image": None, "hint": ""}) == {"has_image": False, "hint": ""}
    assert without_images({"image": "A" * 1000}) == {"has_image": True}
    assert without_images({"hint": ""}) == {"hint": ""}
